// SPDX-License-Identifier: Apache-2.0
// Right bytes from every kind of source, at every block size, within the budget.
#include <fcntl.h>
#include <sys/mman.h>

#include "support.h"

static uint8_t *buffer;
enum { LENGTH = 9 * 1024 * 1024 + 12345 };

// Of the memory alone: there is room behind it, where the kernel puts small mappings.
static uint64_t resident_kib(const void *start, uint64_t length)
{
	FILE *f = fopen("/proc/self/smaps", "r");
	CHECK(f);
	char line[512];
	uint64_t sum = 0, lo = 0, hi = 0;
	uintptr_t a = (uintptr_t)start;
	while (fgets(line, sizeof(line), f)) {
		unsigned long x, y, kib;
		if (sscanf(line, "%lx-%lx ", &x, &y) == 2) {
			lo = x;
			hi = y;
		} else if (sscanf(line, "Rss: %lu kB", &kib) == 1 && lo >= a && hi <= a + length) {
			sum += kib;
		}
	}
	fclose(f);
	return sum;
}

static void whole(struct uf_memory *m, const char *what, uint64_t block)
{
	const uint8_t *at = uf_memory_address(m);
	uint64_t wrong = test_wrong(at, 0, LENGTH);
	CHECK(wrong == UINT64_MAX, "%s, block %llu: byte %llu is wrong", what, (unsigned long long)block,
	      (unsigned long long)wrong);
	uint64_t padded = (LENGTH + block - 1) / block * block;
	for (uint64_t i = LENGTH; i < padded; i++)
		CHECK(at[i] == 0, "%s: byte %llu after the end", what, (unsigned long long)i);
}

static void random_reads(struct uf_memory *m, int n)
{
	const volatile uint8_t *at = uf_memory_address(m);
	uint64_t r = 88172645463325252u;
	for (int i = 0; i < n; i++) {
		uint64_t k = test_random(&r) % LENGTH;
		CHECK(at[k] == test_byte(k), "byte %llu", (unsigned long long)k);
	}
}

// Readahead that is under way may bring blocks back once.
static bool all_evicted(void *arg)
{
	struct uf_stats s;
	uf_memory_evict(arg, 0, UINT32_MAX);
	uf_memory_stats(arg, &s);
	return s.resident == 0;
}

static void one(struct uf_pager *p, struct uf_memory_options o, const char *what)
{
	struct uf_memory *m;
	struct uf_stats s;
	test_memory_source(p, &o, &m);
	whole(m, what, o.block);
	uf_memory_stats(m, &s);
	CHECK(s.faults > 0 && s.faults < (LENGTH + o.block - 1) / o.block + 8, "%llu faults", (unsigned long long)s.faults);
	random_reads(m, 2000);
	uf_memory_stats(m, &s);
	if (o.budget) {
		// While readahead goes on, the kernel's walk counts a block here, and there the one that took its place meanwhile.
		uint64_t length = (LENGTH + o.block - 1) / o.block * o.block;
		uint64_t rss = resident_kib(uf_memory_address(m), length) << 10;
		for (int i = 0; rss > o.budget && i < 100; i++) {
			usleep(10000);
			rss = resident_kib(uf_memory_address(m), length) << 10;
		}
		CHECK(s.resident_peak <= o.budget, "peak %llu", (unsigned long long)s.resident_peak);
		CHECK(rss > 0 && rss <= o.budget, "%s: /proc says %llu resident, budget %llu", what, (unsigned long long)rss,
		      (unsigned long long)o.budget);
		CHECK(s.evictions > 0);
	}
	CHECK(s.errors == 0 && s.poisoned == 0);
	uint64_t blocks = (LENGTH + o.block - 1) / o.block;
	CHECK(test_wait(all_evicted, m), "%s: something stays resident", what);
	if (!o.budget) {
		struct uf_failure why;
		CHECK(uf_memory_prefetch(m, 0, blocks, true, &why) == 0, "%s", why.message);
		uf_memory_stats(m, &s);
		CHECK(s.resident == blocks * o.block, "%llu", (unsigned long long)s.resident);
		uint64_t faults = s.faults;
		whole(m, what, o.block);
		uf_memory_stats(m, &s);
		CHECK(s.faults == faults, "faults after prefetch");
	}
	uf_memory_destroy(m);
}

static bool all_resident(void *arg)
{
	struct uf_stats s;
	uf_memory_stats(arg, &s);
	return s.resident >= LENGTH;
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	buffer = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	test_fill(buffer, 0, LENGTH);
	char path[] = "/var/tmp/uf-test-XXXXXX";
	int disk = mkstemp(path), shm = memfd_create("test", MFD_CLOEXEC);
	CHECK(disk >= 0 && shm >= 0);
	unlink(path);
	CHECK(pwrite(disk, "HEADER!", 7, 0) == 7 && pwrite(disk, buffer, LENGTH, 7) == LENGTH);
	CHECK(pwrite(shm, buffer, LENGTH, 0) == LENGTH);
	int fds = test_fd_count();

	struct uf_pager *p = test_pager(1ull << 30);
	uint64_t blocks[] = {4096, 16384, 65536, 1 << 20, 2 << 20}, budgets[] = {0, 4 << 20};
	for (int i = 0; i < 5; i++) {
		for (int k = 0; k < 2; k++) {
			struct uf_memory_options o = {.nbytes = LENGTH, .block = blocks[i], .budget = budgets[k]};
			if (o.budget && o.budget < 8 * o.block)
				o.budget = 8 * o.block;
			if (o.budget >= LENGTH)
				continue;
			o.source = UF_SOURCE_MEMORY;
			o.address = buffer;
			one(p, o, "memory");
			o.source = UF_SOURCE_FILE;
			o.fd = disk;
			o.offset = 7;
			one(p, o, "file");
			o.fd = shm;
			o.offset = 0;
			one(p, o, "tmpfs");
			o.source = UF_SOURCE_WORKER;
			o.source_id = test_worker_source(p, "ok");
			one(p, o, "worker");
			CHECK(uf_source_drop(p, o.source_id) == 0);
		}
	}

	// Background prefetch.
	struct uf_memory *m;
	struct uf_memory_options o = {.nbytes = LENGTH, .source = UF_SOURCE_MEMORY, .address = buffer};
	struct uf_failure why;
	test_memory_source(p, &o, &m);
	CHECK(uf_memory_prefetch(m, 0, UINT32_MAX, false, &why) == 0);
	CHECK(test_wait(all_resident, m));
	uf_memory_destroy(m);

	// Zeros.
	o = (struct uf_memory_options){.nbytes = 3 << 20, .source = UF_SOURCE_ZERO};
	test_memory_source(p, &o, &m);
	const uint8_t *at = uf_memory_address(m);
	for (int i = 0; i < 3 << 20; i++)
		CHECK(at[i] == 0);

	// Refused.
	o = (struct uf_memory_options){.name = "x", .nbytes = 4096, .block = 4096, .source = UF_SOURCE_MEMORY, .address = at};
	struct uf_memory *none;
	CHECK(uf_memory_create(p, &o, &none) == -35, "paged memory as a source");
	o.address = buffer;
	o.block = 12288;
	CHECK(uf_memory_create(p, &o, &none) == -22);
	CHECK(uf_pager_shutdown(p) == -16);
	uf_memory_destroy(m);

	test_end(p);
	CHECK(test_fd_count() == fds, "%d descriptors, %d at the start", test_fd_count(), fds);
	CHECK(test_threads_left(test_base_threads()));
	return 0;
}
