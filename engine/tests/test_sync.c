// SPDX-License-Identifier: Apache-2.0
// A disk that fails to take what it was given, under an fdatasync that says so once: the next flush must bring it there. A model
// of the kernel stands in for the disk: fdatasync takes over pages that were written since the last one, and a failing one
// forgets them, as the page cache does.
#include "writing.h"

enum { BLOCK = 16384, LENGTH = 2 << 20, PAGES = LENGTH / 4096 };

static uint8_t disk[LENGTH];
static atomic_bool written[PAGES];
static atomic_int failures;

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
	ssize_t r = pwrite64(fd, bytes, n, at);
	for (off_t page = at / 4096; r > 0 && page < PAGES && page * 4096 < at + r; page++)
		atomic_store(&written[page], true);
	return r;
}

int fdatasync(int fd)
{
	bool fails = atomic_load(&failures) > 0 && atomic_fetch_sub(&failures, 1) > 0;
	for (int page = 0; page < PAGES; page++)
		if (atomic_exchange(&written[page], false) && !fails)
			CHECK(pread(fd, disk + page * 4096, 4096, page * 4096) == 4096);
	errno = fails ? EIO : 0;
	return fails ? -1 : 0;
}

static void disk_right(const struct array *a, const char *when)
{
	for (uint64_t i = 0; i < LENGTH; i++)
		CHECK(disk[i] == a->want[i], "%s: byte %llu (block %llu) of the disk is %d, not %d", when, (unsigned long long)i,
		      (unsigned long long)(i / BLOCK), disk[i], a->want[i]);
}

static int flush(struct array *a, struct uf_failure *why, uint32_t *n)
{
	return uf_memory_flush(a->m, 0, a->blocks, why, 1, n);
}

static void sync_fails(uint64_t budget)
{
	struct uf_pager *p = test_pager(1 << 30);
	int fd = memfd_create("file", MFD_CLOEXEC);
	CHECK(fd >= 0 && pwrite(fd, test_reference(LENGTH), LENGTH, 0) == LENGTH);
	memcpy(disk, test_reference(LENGTH), LENGTH);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd, .store = UF_STORE_SOURCE,
				      .budget = budget};
	struct array a = array_of(p, o, test_reference(LENGTH));
	struct uf_failure why;
	uint32_t n;
	for (uint64_t round = 0; round < 8; round++) {
		for (uint64_t b = round % 3; b < a.blocks; b += 1 + round % 3)
			array_write(&a, b * BLOCK + 100, 5000, 1, b + round);
		uf_memory_evict(a.m, round % 2 ? a.blocks / 2 : 0, a.blocks / 4); // some are not in memory any more
		atomic_store(&failures, 1 + (int)(round % 2));
		CHECK(flush(&a, &why, &n) == -EIO && n == 1 && why.block == UINT64_MAX && strstr(why.message, "fdatasync"), "%s", why.message);
		CHECK(round % 4 || test_stats(a.m).write_errors > 0);
		if (round % 2) // and again, with other writes before it
			for (uint64_t b = 1; b < a.blocks; b += 7)
				array_write(&a, b * BLOCK, 10, 1, b + round);
		while (atomic_load(&failures))
			CHECK(flush(&a, &why, &n) == -EIO && why.block == UINT64_MAX);
		CHECK(flush(&a, &why, &n) == 0, "%s", why.message);
		disk_right(&a, "after the flush that succeeded");
		array_right(&a, "in memory");
	}
	array_end(&a);
	close(fd);
	pager_end(p);
}

int main(void)
{
	test_reference(8 << 20);
	test_guard();
	sync_fails(0);
	sync_fails(BLOCK * 16);
	CHECK(test_threads_left(test_base_threads()));
	return 0;
}
