// SPDX-License-Identifier: Apache-2.0
// Cold pages by read-write protection (Linux 7.3): found, written to a store, dropped, and back with their bytes when they are
// accessed, whoever does it, and while they go.
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "cold.h"
#include "support.h"

enum { PAGE = 4096, N = 1536 };

static uint8_t *p;
static int store;

static void begin(struct uf_cold **c)
{
	p = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p != MAP_FAILED);
	madvise(p, N * PAGE, MADV_NOHUGEPAGE);
	for (uint64_t i = 0; i < N; i++)
		*(uint64_t *)(p + i * PAGE + 8) = i + 1;
	store = memfd_create("store", MFD_CLOEXEC);
	CHECK(store >= 0 && ftruncate(store, N * PAGE) == 0);
	int err = uf_cold_create((uintptr_t)p, (uintptr_t)p + N * PAGE, store, 0, c);
	CHECK(err == 0, "%s", strerror(-err));
}

static void end(struct uf_cold *c)
{
	CHECK(uf_cold_close(c) == 0);
	CHECK(test_threads_left(test_base_threads()));
	munmap(p, N * PAGE);
	close(store);
}

static uint64_t word(uint64_t page)
{
	return *(volatile uint64_t *)(p + page * PAGE + 8);
}

// Marks in `went` what was evicted.
static int evict(struct uf_cold *c, uint64_t first, uint64_t count, uint8_t *went)
{
	struct uf_span run = {(uintptr_t)p + first * PAGE, (uintptr_t)p + (first + count) * PAGE}, *out;
	size_t n;
	int err = uf_cold_evict(c, &run, 1, &out, &n);
	memset(went, 0, N);
	for (size_t i = 0; i < n; i++) {
		CHECK(out[i].start >= run.start && out[i].end <= run.end && out[i].start < out[i].end);
		memset(went + (out[i].start - (uintptr_t)p) / PAGE, 1, (out[i].end - out[i].start) / PAGE);
	}
	free(out);
	return err;
}

static struct uf_cold_stats stats_of(struct uf_cold *c)
{
	struct uf_cold_stats s;
	uf_cold_stats(c, &s);
	return s;
}

static void cold_pages_go(void)
{
	static uint8_t went[N], present[N];
	struct uf_cold *c;
	begin(&c);
	CHECK(evict(c, 0, N, went) == 0);
	CHECK(!memchr(went, 1, N), "before it was looked, all is hot");
	for (int round = 0; round < 3; round++) {
		CHECK(uf_cold_detect(c) == 0);
		for (uint64_t i = 0; i < N; i += 5)
			CHECK(word(i) == i + 1);
		for (uint64_t i = 0; i < N; i += 7)
			p[i * PAGE] = (uint8_t)(round + 1);
		CHECK(evict(c, 10, N - 20, went) == 0);
		CHECK(mincore(p, N * PAGE, present) == 0);
		for (uint64_t i = 0; i < N; i++) {
			bool cold = i >= 10 && i < N - 10 && i % 5 && i % 7, was_out = round == 2 && i < N / 2;
			CHECK(went[i] == (cold && !was_out), "round %d: page %llu: %d", round, (unsigned long long)i, went[i]);
			CHECK((present[i] & 1) == !cold);
			uint64_t there = 0;
			CHECK(!cold || (pread(store, &there, 8, (off_t)(i * PAGE + 8)) == 8 && there == i + 1));
		}
		CHECK(stats_of(c).out > N / 2 && stats_of(c).kept == 0);
		for (uint64_t i = round == 1 ? N / 2 : 0; i < N; i++)
			CHECK(word(i) == i + 1 && p[i * PAGE] == (i % 7 ? 0 : round + 1), "page %llu", (unsigned long long)i);
	}
	CHECK(stats_of(c).out == 0 && stats_of(c).loaded > N);
	CHECK(uf_cold_detect(c) == 0);
	CHECK(evict(c, 0, N, went) == 0 && memchr(went, 0, N) == NULL);
	end(c); // brings them back
}

static void brought_back_at_the_end(void)
{
	static uint8_t went[N];
	struct uf_cold *c;
	begin(&c);
	CHECK(uf_cold_detect(c) == 0 && evict(c, 0, N, went) == 0 && went[0] && went[N - 1]);
	CHECK(uf_cold_close(c) == 0);
	for (uint64_t i = 0; i < N; i++)
		CHECK(word(i) == i + 1);
	munmap(p, N * PAGE);
	close(store);
}

static void counting(struct test_crowd *crowd, int number)
{
	uint64_t random = (uint64_t)number + 9, counter[N] = {0};
	while (!atomic_load(&crowd->stop)) {
		uint64_t page = test_random(&random) % (N / (1 + test_random(&random) % 8));
		volatile uint64_t *at = (void *)(p + page * PAGE + 64 + number * 8);
		CHECK(*at == counter[page], "page %llu: %llu, not %llu", (unsigned long long)page, (unsigned long long)*at,
		      (unsigned long long)counter[page]);
		if (random % 3)
			*at = ++counter[page];
		atomic_fetch_add_explicit(&crowd->work, 1, memory_order_relaxed);
	}
}

static void under_threads(void)
{
	static uint8_t went[N];
	static struct test_crowd crowd;
	struct uf_cold *c;
	begin(&c);
	test_crowd_start(&crowd, 4, counting, NULL);
	for (int round = 0; round < test_rounds(200); round++) {
		CHECK(uf_cold_detect(c) == 0);
		usleep(200);
		CHECK(evict(c, 0, N, went) == 0);
		if (round % 10 == 0) {
			pid_t pid = fork();
			CHECK(pid >= 0);
			if (!pid) {
				alarm(60);
				for (uint64_t i = 0; i < N; i++)
					if (word(i) != i + 1)
						_exit(3);
				_exit(0);
			}
			int status;
			if (round % 20)
				CHECK(uf_cold_detect(c) == 0 && evict(c, 0, N, went) == 0);
			CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %d", status);
		}
	}
	test_crowd_stop(&crowd, "counts");
	struct uf_cold_stats s = stats_of(c);
	printf("  evicted %llu, back %llu, kept %llu\n", (unsigned long long)s.evicted, (unsigned long long)s.loaded,
	       (unsigned long long)s.kept);
	CHECK(s.evicted > N && s.loaded > 0);
	for (uint64_t i = 0; i < N; i++)
		CHECK(word(i) == i + 1);
	end(c);
}

static void a_full_store(void)
{
	static uint8_t went[N];
	struct uf_cold *c;
	begin(&c);
	int full = open("/dev/full", O_RDWR);
	struct uf_cold *d;
	CHECK(full >= 0);
	CHECK(uf_cold_create((uintptr_t)p, (uintptr_t)p + PAGE, full, 0, &d) == -EBUSY);
	CHECK(uf_cold_close(c) == 0);
	CHECK(uf_cold_create((uintptr_t)p, (uintptr_t)p + N * PAGE, full, 0, &d) == 0);
	CHECK(uf_cold_detect(d) == 0);
	CHECK(evict(d, 0, N, went) == -ENOSPC);
	CHECK(!memchr(went, 1, N));
	for (uint64_t i = 0; i < N; i++)
		CHECK(word(i) == i + 1);
	close(full);
	end(d);
}

static void dropped_and_moved(void)
{
	static uint8_t went[N];
	struct uf_cold *c;
	begin(&c);
	CHECK(uf_cold_detect(c) == 0 && evict(c, 0, N, went) == 0 && went[5] && went[N - 1]);
	CHECK(madvise(p + 4 * PAGE, 4 * PAGE, MADV_DONTNEED) == 0);
	for (uint64_t i = 0; i < 12; i++)
		CHECK(word(i) == (i >= 4 && i < 8 ? 0 : i + 1), "page %llu", (unsigned long long)i);
	CHECK(munmap(p + 20 * PAGE, 4 * PAGE) == 0);
	uint8_t *q = mremap(p + 64 * PAGE, 32 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
	CHECK(q != MAP_FAILED);
	for (uint64_t i = 0; i < 32; i++)
		CHECK(*(uint64_t *)(q + i * PAGE + 8) == 64 + i + 1, "moved page %llu", (unsigned long long)i);
	CHECK(word(19) == 20 && word(24) == 25 && word(63) == 64 && word(96) == 97);
	munmap(q, 64 * PAGE);
	CHECK(uf_cold_close(c) == 0);
	CHECK(word(200) == 201);
	munmap(p, N * PAGE);
	close(store);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	struct uf_cold *c;
	uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int err = uf_cold_create((uintptr_t)page, (uintptr_t)page + PAGE, 0, 0, &c);
	if (err == -ENOSYS || err == -EPERM) {
		printf("no read-write protection here (Linux 7.3), or no faults of the kernel\n");
		return 77;
	}
	CHECK(err == 0 && uf_cold_close(c) == 0, "%s", strerror(-err));
	CHECK(uf_cold_create((uintptr_t)page + 1, (uintptr_t)page + PAGE, 0, 0, &c) == -EINVAL);
	CHECK(mprotect(page, PAGE, PROT_READ) == 0);
	CHECK(uf_cold_create((uintptr_t)page, (uintptr_t)page + PAGE, 0, 0, &c) == -EINVAL, "it cannot be moved");
	const char *only = argc > 1 ? argv[1] : NULL;
	if (RUN("cold"))
		cold_pages_go();
	if (RUN("end"))
		brought_back_at_the_end();
	if (RUN("threads"))
		under_threads();
	if (RUN("full"))
		a_full_store();
	if (RUN("dropped"))
		dropped_and_moved();
	return 0;
}
