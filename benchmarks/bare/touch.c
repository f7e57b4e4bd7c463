// The touching loops as a shared library (`cc -shared`), for the userfault side of the rows that touch in C.
#define _GNU_SOURCE
#include "threads.h"
#include "touch.h"

int touch(char *base, size_t pages, size_t page_size, uint64_t seed, int write, struct touch_result *ret)
{
	return touch_pages(base, pages, page_size, seed, write, ret);
}

int touch_threads(const struct threads_plan *plan, struct threads_result *ret)
{
	return threads_touch(plan, ret);
}
