// SPDX-License-Identifier: Apache-2.0
// Stores that hang or refuse, and other code that drops pages, all at once: what can go on goes on. By the name of a part only
// that is run.
#include <poll.h>

#include "writing.h"

static atomic_bool full, hold, held;
static atomic_int sync_failures;
enum { HELD_BLOCK = 16384, HOLD_AT = 5 * HELD_BLOCK }; // writes there wait while `hold`
static uint8_t disk[2 << 20];
static atomic_bool written[sizeof(disk) / 4096];

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
	if (atomic_load(&full)) {
		errno = ENOSPC;
		return -1;
	}
	ssize_t r = pwrite64(fd, bytes, n, at);
	for (uint64_t page = (uint64_t)at / 4096; r > 0 && page < sizeof(disk) / 4096 && page * 4096 < (uint64_t)at + n; page++)
		atomic_store(&written[page], true);
	while (at <= HOLD_AT && HOLD_AT < at + (off_t)n && atomic_load(&hold)) {
		atomic_store(&held, true);
		usleep(1000);
	}
	return r;
}

// See test_sync.c.
int fdatasync(int fd)
{
	bool fails = atomic_load(&sync_failures) > 0 && atomic_fetch_sub(&sync_failures, 1) > 0;
	for (uint64_t page = 0; page < sizeof(disk) / 4096; page++)
		if (atomic_exchange(&written[page], false) && !fails)
			CHECK(pread(fd, disk + page * 4096, 4096, (off_t)page * 4096) == 4096);
	errno = fails ? EIO : 0;
	return fails ? -1 : 0;
}

static struct array file_array(uint64_t length, uint64_t block, uint64_t budget, int *fd)
{
	*fd = memfd_create("file", MFD_CLOEXEC);
	CHECK(*fd >= 0 && pwrite64(*fd, test_reference(length), length, 0) == (ssize_t)length);
	struct uf_memory_options o = {.nbytes = length, .block = block, .source = UF_SOURCE_FILE, .fd = *fd, .store = UF_STORE_SOURCE,
				      .budget = budget, .no_readahead = true};
	return array_of(test_pager(1 << 30), o, test_reference(length));
}

static void end(struct array *a, int fd)
{
	array_end(a);
	close(fd);
	pager_end(a->pager);
}

// Other code drops a page of many dirty blocks, which then are to leave: an I/O thread makes each whole again, by a fault that
// another I/O thread has to serve.
static void repairs(void)
{
	int fd;
	struct array a = file_array(16 << 20, 16384, 4 << 20, &fd);
	atomic_store(&a.m->no_nowait, true); // as on a disk, where a try without waiting is in vain
	for (uint64_t b = 0; b < 200; b++)
		array_write(&a, b * a.block, 1, 1, b);
	for (uint64_t b = 0; b < 200; b++)
		CHECK(madvise(a.at + b * a.block + 4096, 4096, MADV_DONTNEED) == 0);
	for (uint64_t b = 200; b < 900; b++)
		array_write(&a, b * a.block, 1, 1, b);
	array_right(&a, "repaired");
	end(&a, fd);
}

// A disk without space left: what cannot leave must not keep in memory what could.
static void full_disk(void)
{
	int fd;
	struct array a = file_array(64 << 20, 4096, 16 << 20, &fd);
	atomic_store(&full, true);
	for (uint64_t b = 0; b < 3000; b++)
		array_write(&a, b * a.block, 1, 1, b);
	array_right(&a, "read beside what is dirty");
	struct uf_stats s = test_stats(a.m);
	CHECK(s.dirty == 3000 * 4096 && s.resident <= (16 << 20) + (1 << 20), "%llu KiB are resident, %llu KiB dirty",
	      (unsigned long long)s.resident >> 10, (unsigned long long)s.dirty >> 10);
	atomic_store(&full, false);
	flush_well(&a, "with space again");
	file_right(&a, fd, "with space again");
	end(&a, fd);
}

static void *flush_thread(void *arg)
{
	struct array *a = arg;
	struct uf_failure why;
	uint32_t n;
	return (void *)(intptr_t)uf_memory_flush(a->m, 0, a->blocks, &why, 1, &n);
}

// One write hangs in the kernel: the program goes on within its budget. And the sync that fails meanwhile takes that write with
// it: the next flush must wait for it, and write it again.
static void hanging_write(void)
{
	int fd;
	struct array a = file_array(sizeof(disk), HELD_BLOCK, 16 * HELD_BLOCK, &fd);
	memcpy(disk, test_reference(sizeof(disk)), sizeof(disk));
	atomic_store(&hold, true);
	for (uint64_t b = 5; b < 60; b++) // far more than the budget: each has to leave beside the one that hangs
		array_write(&a, b * a.block, 5000, 1, b);
	CHECK(atomic_load(&held), "nothing left memory: the test shows nothing");
	array_write(&a, 0, 100, 1, 99);
	atomic_store(&sync_failures, 1);
	struct uf_failure why;
	uint32_t n;
	CHECK(uf_memory_flush(a.m, 0, 1, &why, 1, &n) == -EIO);
	pthread_t t;
	void *err;
	CHECK(pthread_create(&t, NULL, flush_thread, &a) == 0);
	poll(NULL, 0, 200);
	atomic_store(&hold, false);
	CHECK(pthread_join(t, &err) == 0 && err == NULL);
	for (uint64_t i = 0; i < sizeof(disk); i++)
		CHECK(disk[i] == a.want[i], "byte %llu (block %llu) of the disk is %d, not %d", (unsigned long long)i,
		      (unsigned long long)(i / a.block), disk[i], a.want[i]);
	end(&a, fd);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	const char *only = argc == 2 ? argv[1] : NULL;
	test_reference(64 << 20);
	if (RUN("repairs"))
		repairs();
	if (RUN("full_disk"))
		full_disk();
	if (RUN("hanging_write"))
		hanging_write();
	CHECK(test_threads_left(test_base_threads()));
	return 0;
}
