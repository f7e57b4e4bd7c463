// Bare PAGEMAP_SCAN loop as a shared library (`cc -shared`): finds the written pages of a range, again and again.
//
// The definitions are ours: the header of a build host is often older than its kernel (PAGEMAP_SCAN came with 6.7).
#include <stdint.h>
#include <sys/ioctl.h>

#include "touch.h"

enum { PAGE_IS_WRITTEN = 1 << 1 };

struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

static const unsigned long PAGEMAP_SCAN_IOCTL = 0xc0606610;

// Scans `rounds` times and writes the nanoseconds of each to `times`. `vector` holds `capacity` regions, more than
// can be found. Returns how many bytes the last scan found, or -1 where the kernel refused.
int64_t scan_written(int pagemap, uint64_t start, uint64_t length, struct page_region *vector, uint64_t capacity,
		     int rounds, double *times)
{
	int64_t found = 0;
	for (int round = 0; round < rounds; round++) {
		uint64_t began = touch_now();
		struct pm_scan_arg scan = {
			.size = sizeof(scan),
			.start = start,
			.end = start + length,
			.vec = (uintptr_t)vector,
			.vec_len = capacity,
			.category_mask = PAGE_IS_WRITTEN,
			.return_mask = PAGE_IS_WRITTEN,
		};
		int regions = ioctl(pagemap, PAGEMAP_SCAN_IOCTL, &scan);
		times[round] = (double)(touch_now() - began);
		// Not `walk_end`: after more than 512 regions the kernel leaves an earlier place in it.
		if (regions < 0 || (uint64_t)regions == capacity)
			return -1;
		found = 0;
		for (int i = 0; i < regions; i++)
			found += (int64_t)(vector[i].end - vector[i].start);
	}
	return found;
}
