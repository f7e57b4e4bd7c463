// The faulting loop as a shared library (`cc -shared`), for the userfault side of the random-fault rows.
#include "touch.h"

int touch(const char *base, size_t pages, size_t page_size, uint64_t seed, struct touch_result *ret)
{
	return touch_pages(base, pages, page_size, seed, ret);
}
