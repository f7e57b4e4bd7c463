// SPDX-License-Identifier: Apache-2.0
// Other code in the process has its way with our range: drops pages, splits the mapping, writes, maps something over it.
// Right bytes or a signal; no endless loop, no hang.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "support.h"

enum { BLOCK = 65536, LENGTH = 16 << 20, BLOCKS = LENGTH / BLOCK };

static struct uf_pager *pager;
static uint32_t source;
static int file;

static struct uf_memory *create(int kind, uint64_t block, uint64_t budget)
{
	struct uf_memory_options o = {.name = "foreign", .nbytes = LENGTH, .block = block, .budget = budget};
	o.source = kind == 0 ? UF_SOURCE_MEMORY : kind == 1 ? UF_SOURCE_FILE : UF_SOURCE_WORKER;
	o.address = test_reference(LENGTH);
	o.fd = file;
	o.source_id = source;
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	return m;
}

static void reader(struct test_crowd *c, int number)
{
	const uint8_t *at = uf_memory_address(c->arg);
	uint64_t r = 88172645463325252u + (uint64_t)number * 7919;
	while (!atomic_load(&c->stop)) {
		uint64_t k = test_random(&r) % (LENGTH - 300);
		CHECK(test_differs(at + k, k, 300) == UINT64_MAX, "thread %d: byte %llu", number, (unsigned long long)k);
		atomic_fetch_add(&c->work, 1);
	}
}

static double cpu_seconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void dropped(int kind, uint64_t block, uint64_t budget)
{
	static struct test_crowd c;
	struct uf_memory *m = create(kind, block, budget);
	char *at = uf_memory_address(m);
	uint64_t r = 4711;
	struct uf_failure why;
	CHECK(budget || uf_memory_prefetch(m, 0, LENGTH / block, true, &why) == 0);
	test_log_begin();
	test_crowd_start(&c, 3, reader, m);
	for (int i = 0; i < 1500; i++) {
		uint64_t page = test_random(&r) % (LENGTH / 4096 - 64), n = i % 8 ? test_random(&r) % 8 + 1 : 64;
		madvise(at + page * 4096, n * 4096, MADV_DONTNEED);
		if (i % 100 == 0) {
			unsigned long seen = atomic_load(&c.work); // so that there is something to drop
			for (int w = 0; w < 20000 && atomic_load(&c.work) < seen + 20; w++)
				poll(NULL, 0, 1);
			madvise(at, LENGTH, MADV_DONTNEED);
		}
	}
	unsigned long work = atomic_load(&c.work);
	bool progress = true;
	for (int i = 0; i < 20000 && (progress = atomic_load(&c.work) < work + 3000); i++)
		poll(NULL, 0, 1);
	char *log = test_log_end();
	CHECK(!progress, "readers do not come on");
	test_crowd_stop(&c, "readers of dropped pages");
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
	static bool said; // the log is kept short: not each time
	said |= strstr(log, "other code dropped pages") != NULL;
	CHECK(said, "%s", log);
	// Somebody must be able to read it, and a full pipe on stderr must not stop the faults.
	CHECK(test_count(log, "\n") < 100, "%d lines of log", test_count(log, "\n"));
	free(log);
	CHECK(test_stats(m).errors == 0);
	double before = cpu_seconds();
	poll(NULL, 0, 300);
	CHECK(cpu_seconds() - before < 0.2, "busy with nothing");
	uf_memory_destroy(m);
}

// Mappings that other code has split: COPY, MOVE, WAKE and DONTNEED across the borders.
static void split(int kind, uint64_t block)
{
	static struct test_crowd c;
	struct uf_memory *m = create(kind, block, 0);
	char *at = uf_memory_address(m);
	struct uf_failure why;
	for (uint64_t k = 0; k < LENGTH / 2; k += 1 << 20) {
		CHECK(mprotect(at + k + 8192, 4096, PROT_NONE) == 0 && mprotect(at + k + 8192, 4096, PROT_READ) == 0);
		CHECK(madvise(at + k + BLOCK, 4096, MADV_RANDOM) == 0);
		CHECK(madvise(at + k + 3 * BLOCK - 4096, 8192, MADV_DODUMP) == 0);
		madvise(at + k + (512 << 10), 128 << 10, MADV_NOHUGEPAGE);
	}
	uint64_t wrong = test_differs(at, 0, LENGTH);
	CHECK(wrong == UINT64_MAX, "byte %llu", (unsigned long long)wrong);
	uf_memory_evict(m, 0, LENGTH / block);
	CHECK(uf_memory_prefetch(m, 0, LENGTH / block, true, &why) == 0, "%s", why.message);
	uint64_t faults = test_stats(m).faults;
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
	CHECK(test_stats(m).faults == faults, "pages were left out");
	// While others read.
	test_crowd_start(&c, 2, reader, m);
	uint64_t r = 1;
	for (int i = 0; i < 200; i++) {
		uint64_t page = test_random(&r) % (LENGTH / 4096 - 4);
		madvise(at + page * 4096, 4 * 4096, i % 2 ? MADV_SEQUENTIAL : MADV_NORMAL);
		uf_memory_evict(m, test_random(&r) % (LENGTH / block), 4);
	}
	test_crowd_work(&c, 100, "readers of a split mapping");
	test_crowd_stop(&c, "readers of a split mapping");
	// No access, then access again: what was there is there.
	CHECK(mprotect(at, LENGTH, PROT_NONE) == 0);
	CHECK(test_touch_right((uint8_t *)at, 9) == SIGSEGV);
	CHECK(mprotect(at, LENGTH, PROT_READ) == 0);
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
	uf_memory_close(m);
	CHECK(test_touch_right((uint8_t *)at, 9) == SIGSEGV && test_touch_right((uint8_t *)at, LENGTH - 1) == SIGSEGV);
	uf_memory_destroy(m);
}

// Writes into memory that is only to be read.
static void writes(int kind)
{
	static struct test_crowd c;
	struct uf_memory *m = create(kind, BLOCK, 0);
	uint8_t *at = uf_memory_address(m);
	struct uf_failure why;
	int fds[2];
	test_log_begin();
	int absent = test_poke(at + 3 * BLOCK + 100);
	int there = test_touch_right(at, 5 * BLOCK) == 0 ? test_poke(at + 5 * BLOCK + 5000) : -1;
	int err = uf_memory_prefetch(m, 64, 64, true, &why); // whole extents
	int huge = test_poke(at + 70 * BLOCK + 5000), again = test_poke(at + 70 * BLOCK + 5000);
	int pages = 0;
	for (int i = 0; i < 16; i++)
		pages += test_poke(at + 80 * BLOCK + i * 4096) == SIGSEGV;
	CHECK(pipe(fds) == 0 && write(fds[1], "zeros and ones", 14) == 14);
	ssize_t n = read(fds[0], at + 7 * BLOCK, 14);
	int n_errno = errno;
	ssize_t k = read(fds[0], at + 90 * BLOCK, 14);
	int k_errno = errno;
	char *log = test_log_end();
	CHECK(absent == SIGSEGV && there == SIGSEGV && err == 0 && huge == SIGSEGV && again == SIGSEGV && pages == 16,
	      "%d %d %d %d %d %d", absent, there, err, huge, again, pages);
	CHECK(n == -1 && n_errno == EFAULT && k == -1 && k_errno == EFAULT, "%zd %d %zd %d", n, n_errno, k, k_errno);
	if (uf_memory_uses_extents(m))
		CHECK(strstr(log, "a write to this read-only memory"), "%s", log);
	free(log);
	close(fds[0]);
	close(fds[1]);
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX, "a write came through");
	uf_memory_evict(m, 0, BLOCKS);
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
	uf_memory_evict(m, 0, BLOCKS);
	CHECK(uf_memory_prefetch(m, 0, BLOCKS, true, &why) == 0);

	// While it is read, filled and evicted.
	uint64_t r = 99;
	int bad = 0;
	test_log_begin();
	test_crowd_start(&c, 2, reader, m);
	for (int i = 0; i < 300; i++) {
		uint64_t block = test_random(&r) % BLOCKS;
		if (i % 3 == 0)
			uf_memory_evict(m, block, 8);
		bad += test_poke(at + block * BLOCK + test_random(&r) % 3 * 4096) != SIGSEGV;
	}
	free(test_log_end());
	test_crowd_work(&c, 100, "readers among writes");
	test_crowd_stop(&c, "readers among writes");
	CHECK(bad == 0, "%d writes", bad);
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
	uf_memory_destroy(m);
}

// A part is mapped over: that part is the other code's, the rest is ours.
static void mapped_over(int kind)
{
	static struct test_crowd c;
	struct uf_memory *m = create(kind, BLOCK, 0);
	uint8_t *at = uf_memory_address(m);
	struct uf_failure why;
	const uint64_t first = 33 * BLOCK + 4096, length = 3 * BLOCK; // begins and ends inside blocks
	CHECK(mmap(at + first, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at + first);
	test_crowd_start(&c, 1, reader, create(kind, BLOCK, 2 << 20));
	CHECK(test_differs(at, 0, first) == UINT64_MAX);
	CHECK(test_differs(at + first + length, first + length, LENGTH - first - length) == UINT64_MAX);
	CHECK(test_touch_right(at, first) == SIGSEGV && test_touch_right(at, first + length - 1) == SIGSEGV);
	uf_memory_evict(m, 0, BLOCKS);
	CHECK(uf_memory_prefetch(m, 0, BLOCKS, true, &why) == 0, "%s", why.message);
	CHECK(test_touch_right(at, first + BLOCK) == SIGSEGV);
	test_crowd_work(&c, 200, "readers of another memory");
	test_crowd_stop(&c, "readers of another memory");
	uf_memory_destroy(c.arg);
	uf_memory_close(m);
	CHECK(test_touch_right(at, 0) == SIGSEGV && test_touch_right(at, LENGTH - 1) == SIGSEGV);
	uf_memory_destroy(m);
}

// The log goes to a pipe that nobody empties: faults are served all the same.
static void log_is_stuck(void)
{
	static struct test_crowd c;
	struct uf_memory *m = create(0, 4096, 0);
	char *at = uf_memory_address(m);
	int fds[2], saved = dup(2);
	CHECK(pipe2(fds, O_NONBLOCK) == 0 && saved >= 0);
	while (write(fds[1], "....", 4) > 0)
		;
	CHECK(fcntl(fds[1], F_SETFL, 0) == 0 && dup2(fds[1], 2) == 2);
	test_crowd_start(&c, 2, reader, m);
	for (int i = 0; i < 200; i++)
		madvise(at, LENGTH, MADV_DONTNEED);
	unsigned long work = atomic_load(&c.work);
	bool stuck = true;
	for (int i = 0; i < 10000 && (stuck = atomic_load(&c.work) < work + 200); i++)
		poll(NULL, 0, 1);
	dup2(saved, 2);
	close(saved);
	char rest[4096];
	CHECK(read(fds[0], rest, sizeof(rest)) > 0);
	CHECK(!stuck, "a full pipe on stderr stops the fault thread");
	test_crowd_stop(&c, "readers");
	close(fds[0]);
	close(fds[1]);
	uf_memory_destroy(m);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	test_reference(LENGTH);
	test_guard();
	file = test_file(LENGTH, false);
	const char *only = argc == 2 ? argv[1] : NULL;
	for (int extents = 1; extents >= 0; extents--) {
		struct uf_pager_options o = test_options(1 << 30);
		o.no_extents = !extents;
		CHECK(uf_pager_create(&o, &pager) == 0);
		source = test_worker_source(pager, "ok");
		for (int kind = 0; kind < 3; kind++) {
			if (RUN("dropped")) {
				dropped(kind, BLOCK, 0);
				dropped(kind, 4096, 4 << 20);
			}
			if (RUN("split")) {
				split(kind, BLOCK);
				split(kind, 1 << 20);
			}
			if (RUN("writes"))
				writes(kind);
			if (RUN("mapped_over"))
				mapped_over(kind);
		}
		if (RUN("log_is_stuck"))
			log_is_stuck();
		CHECK(uf_source_drop(pager, source) == 0);
		test_settle(pager);
		test_end(pager);
	}
	return 0;
}
