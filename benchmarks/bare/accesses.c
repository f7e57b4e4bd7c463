// Access tracking of shared memory by dropping and scanning, as a shared library (`cc -shared`): the bare calls.
#include "touch.h"
#include "uffd.h"

enum {
	PAGE_IS_WRITTEN = 1 << 1,
	PAGE_IS_PRESENT = 1 << 3,
	PM_SCAN_WP_MATCHING = 1 << 0,
	PM_SCAN_CHECK_WPASYNC = 1 << 1,
	WRITEPROTECT_WP = 1,
	SYS_PROCESS_MADVISE = 440,
	ADVICE_DONTNEED = 4,
	MAX_RANGES = 1024,
	LONG_RANGE = 1 << 20,
};

static const uint64_t FEATURE_WP_ASYNC = 1 << 15;
static const unsigned long PAGEMAP_SCAN_IOCTL = 0xc0606610;

struct page_region {
	uint64_t start, end, categories;
};

struct range {
	uint64_t start, length;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

// Registers and arms memory; returns the userfaultfd, which is to be closed, and writes the nanoseconds to `time`.
int arm(uint64_t start, uint64_t length, double *time)
{
	uint64_t began = touch_now();
	int uffd = uffd_open(O_CLOEXEC | O_NONBLOCK, FEATURE_WP_ASYNC);
	uffd_register(uffd, (char *)start, length, UFFD_REGISTER_WP);
	struct uffd_writeprotect protect = { .start = start, .len = length, .mode = WRITEPROTECT_WP };
	if (madvise((void *)start, length, MADV_DONTNEED) || ioctl(uffd, UFFD_WRITEPROTECT_IOCTL, &protect))
		die("arm");
	*time = (double)(touch_now() - began);
	return uffd;
}

static int drop(int pidfd, struct range *ranges, size_t count)
{
	// Kernels before 6.13 take this advice for other processes' sake only.
	if (count && syscall(SYS_PROCESS_MADVISE, pidfd, ranges, count, ADVICE_DONTNEED, 0) >= 0)
		return 0;
	for (size_t i = 0; i < count; i++)
		if (madvise((void *)ranges[i].start, ranges[i].length, MADV_DONTNEED))
			return -1;
	return 0;
}

// Finds what was touched and makes it as if it had not been; writes the nanoseconds to `time`. `vector` holds
// `capacity` regions, more than can be found. Returns how many bytes were touched, -1 where the kernel refused.
int64_t take(int pagemap, int pidfd, uint64_t start, uint64_t length, struct page_region *vector, uint64_t capacity,
	     double *time)
{
	uint64_t began = touch_now();
	struct pm_scan_arg scan = {
		.size = sizeof(scan),
		.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
		.start = start,
		.end = start + length,
		.vec = (uintptr_t)vector,
		.vec_len = capacity,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
	};
	int regions = ioctl(pagemap, PAGEMAP_SCAN_IOCTL, &scan);
	if (regions < 0 || (uint64_t)regions == capacity)
		return -1;
	static struct range ranges[MAX_RANGES];
	size_t count = 0;
	int64_t found = 0;
	for (int i = 0; i < regions; i++) {
		struct range range = { vector[i].start, vector[i].end - vector[i].start };
		while (i + 1 < regions && vector[i + 1].start == range.start + range.length)
			i++, range.length += vector[i].end - vector[i].start;
		found += (int64_t)range.length;
		if (range.length >= LONG_RANGE) {
			if (madvise((void *)range.start, range.length, MADV_DONTNEED))
				return -1;
			continue;
		}
		ranges[count++] = range;
		if (count == MAX_RANGES) {
			if (drop(pidfd, ranges, count))
				return -1;
			count = 0;
		}
	}
	if (drop(pidfd, ranges, count))
		return -1;
	*time = (double)(touch_now() - began);
	return found;
}
