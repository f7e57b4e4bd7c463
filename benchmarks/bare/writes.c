// Tracking of writes as a shared library (`cc -shared`): the bare calls, and the ways that came before them.
#include <signal.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "touch.h"
#include "uffd.h"

enum {
	PAGE_IS_WRITTEN = 1 << 1,
	PM_SCAN_WP_MATCHING = 1 << 0,
	PM_SCAN_CHECK_WPASYNC = 1 << 1,
	COMPARED = 1 << 20, // bytes of a snapshot that are looked at in one go
};

static const uint64_t FEATURE_WP_ASYNC = 1 << 15;
static const unsigned long PAGEMAP_SCAN_IOCTL = 0xc0606610;
static const uint64_t SOFT_DIRTY = 1ULL << 55;

struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

// Registers and arms memory; returns the userfaultfd, which is to be closed, and writes the nanoseconds to `time`.
int arm(int pagemap, uint64_t start, uint64_t length, double *time)
{
	uint64_t began = touch_now();
	int uffd = uffd_open(O_CLOEXEC | O_NONBLOCK, FEATURE_WP_ASYNC);
	uffd_register(uffd, (char *)start, length, UFFD_REGISTER_WP);
	struct pm_scan_arg scan = {
		.size = sizeof(scan), .flags = PM_SCAN_WP_MATCHING, .start = start, .end = start + length
	};
	if (ioctl(pagemap, PAGEMAP_SCAN_IOCTL, &scan) < 0)
		die("PAGEMAP_SCAN");
	*time = (double)(touch_now() - began);
	return uffd;
}

// Finds the written pages and protects them again; writes the nanoseconds to `time`. `vector` holds `capacity` regions,
// more than can be found. Returns how many bytes were written, -1 where the kernel refused.
int64_t take(int pagemap, uint64_t start, uint64_t length, struct page_region *vector, uint64_t capacity, double *time)
{
	uint64_t began = touch_now();
	struct pm_scan_arg scan = {
		.size = sizeof(scan),
		.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
		.start = start,
		.end = start + length,
		.vec = (uintptr_t)vector,
		.vec_len = capacity,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
	int regions = ioctl(pagemap, PAGEMAP_SCAN_IOCTL, &scan);
	*time = (double)(touch_now() - began);
	if (regions < 0 || (uint64_t)regions == capacity)
		return -1;
	int64_t found = 0;
	for (int i = 0; i < regions; i++)
		found += (int64_t)(vector[i].end - vector[i].start);
	return found;
}

// Writes a byte of every so many pages, and returns the nanoseconds.
double write_pages(char *start, uint64_t length, uint64_t page, uint64_t every, int value)
{
	uint64_t began = touch_now();
	for (uint64_t at = 0; at < length; at += every * page)
		*(volatile char *)(start + at) = (char)value;
	return (double)(touch_now() - began);
}

// --- mprotect and SIGSEGV ------------------------------------------------------------------------------------

static struct {
	char *start;
	uint64_t length, page;
	unsigned char *written;
	struct sigaction before;
} trap;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)context;
	uint64_t at = (uint64_t)((char *)info->si_addr - trap.start);
	if (at >= trap.length) {
		sigaction(number, &trap.before, NULL); // not ours: it comes again, and ends the process
		return;
	}
	trap.written[at / trap.page] = 1;
	mprotect(trap.start + at / trap.page * trap.page, trap.page, PROT_READ | PROT_WRITE);
}

int trap_arm(char *start, uint64_t length, uint64_t page)
{
	trap.start = start;
	trap.length = length;
	trap.page = page;
	trap.written = calloc(length / page, 1);
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER };
	return !trap.written || sigaction(SIGSEGV, &action, &trap.before) || mprotect(start, length, PROT_READ);
}

int64_t trap_take(void)
{
	if (mprotect(trap.start, trap.length, PROT_READ))
		return -1;
	int64_t found = 0;
	for (uint64_t i = 0; i < trap.length / trap.page; i++)
		found += trap.written[i];
	memset(trap.written, 0, trap.length / trap.page);
	return found * (int64_t)trap.page;
}

int trap_end(void)
{
	free(trap.written);
	return mprotect(trap.start, trap.length, PROT_READ | PROT_WRITE) || sigaction(SIGSEGV, &trap.before, NULL);
}

// --- soft-dirty bits ------------------------------------------------------------------------------------------

int soft_arm(void)
{
	int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
	int bad = fd < 0 || write(fd, "4", 1) != 1;
	close(fd);
	return bad;
}

int64_t soft_take(int pagemap, uint64_t start, uint64_t length, uint64_t page)
{
	static uint64_t entries[1 << 16];
	int64_t found = 0;
	for (uint64_t at = 0; at < length / page;) {
		ssize_t count = pread(pagemap, entries, sizeof(entries), (off_t)((start / page + at) * 8)) / 8;
		if (count <= 0)
			return -1;
		for (ssize_t i = 0; i < count && at < length / page; i++, at++)
			found += (entries[i] & SOFT_DIRTY) != 0;
	}
	return soft_arm() ? -1 : found * (int64_t)page;
}

// --- a forked child that keeps the memory as it was --------------------------------------------------------------

static pid_t snapshot;

int fork_arm(void)
{
	snapshot = fork();
	if (!snapshot)
		for (;;)
			pause();
	return snapshot < 0;
}

int fork_end(void)
{
	kill(snapshot, SIGKILL);
	return waitpid(snapshot, NULL, 0) < 0;
}

int64_t fork_take(char *start, uint64_t length, uint64_t page)
{
	static char before[COMPARED];
	int64_t found = 0;
	for (uint64_t at = 0; at < length; at += COMPARED) {
		uint64_t size = length - at < COMPARED ? length - at : COMPARED;
		struct iovec here = { before, size }, there = { start + at, size };
		if (process_vm_readv(snapshot, &here, 1, &there, 1, 0) != (ssize_t)size)
			return -1;
		for (uint64_t i = 0; i < size; i += page)
			found += memcmp(before + i, start + at + i, page) != 0;
	}
	if (fork_end() || fork_arm())
		return -1;
	return found * (int64_t)page;
}
