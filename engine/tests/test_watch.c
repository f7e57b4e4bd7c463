// SPDX-License-Identifier: Apache-2.0
// Watching: what is touched is told, block by block, reads and writes apart; nothing is lost between two intervals; what
// cannot be seen is said.
#include <poll.h>
#include <sys/syscall.h>

#include "writing.h"

enum { BLOCK = 4096, BLOCKS = 512, LENGTH = BLOCKS * BLOCK, WORDS = BLOCKS / 64 };

struct seen {
	uint64_t accessed[WORDS], written[WORDS], blind[WORDS];
};

static struct uf_pager *pager;

static struct seen take(struct uf_memory *m, bool rearm)
{
	struct seen s;
	CHECK(!uf_memory_watched(m, s.accessed, s.written, s.blind, rearm));
	return s;
}

static bool bit(const uint64_t *words, uint64_t block)
{
	return words[block / 64] >> block % 64 & 1;
}

static struct array scratch_array(uint64_t budget, enum uf_delivery delivery)
{
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .store = UF_STORE_SCRATCH, .source = UF_SOURCE_ZERO,
				      .budget = budget, .delivery = delivery};
	struct array a = array_of(pager, o, NULL);
	for (uint64_t b = 0; b < BLOCKS; b++)
		array_write(&a, b * BLOCK, 8, 1, b);
	return a;
}

static uint8_t sum; // what is read must be used

// Each third block is read, each seventh written, through whatever the budget evicts meanwhile.
static void patterns(uint64_t budget, enum uf_delivery delivery, bool accesses)
{
	struct array a = scratch_array(budget, delivery);
	CHECK(!uf_memory_watch(a.m, accesses));
	struct seen s = take(a.m, true);
	for (uint64_t i = 0; i < WORDS; i++)
		CHECK(!s.accessed[i] && !s.written[i] && !s.blind[i], "word %llu before anything", (unsigned long long)i);
	for (int round = 0; round < 3; round++) {
		for (uint64_t b = 0; b < BLOCKS; b++) {
			if (b % 3 == 0)
				sum ^= a.at[b * BLOCK + 100];
			if (b % 7 == (uint64_t)round)
				array_write(&a, b * BLOCK + 16, 4, 1, b + 1000);
		}
		struct seen peek = take(a.m, false);
		s = take(a.m, true);
		CHECK(!memcmp(peek.written, s.written, sizeof(s.written)));
		for (uint64_t b = 0; b < BLOCKS; b++) {
			bool wrote = b % 7 == (uint64_t)round, read = b % 3 == 0;
			CHECK(bit(s.written, b) == wrote, "round %d block %llu written", round, (unsigned long long)b);
			CHECK(!accesses || bit(s.accessed, b) == (wrote || read), "round %d block %llu accessed", round, (unsigned long long)b);
			CHECK(!bit(s.blind, b), "round %d block %llu blind", round, (unsigned long long)b);
		}
	}
	array_right(&a, "watched");
	uf_memory_unwatch(a.m, accesses);
	CHECK(uf_memory_watched(a.m, s.accessed, s.written, s.blind, true) == -EINVAL);
	array_right(&a, "unwatched");
	array_end(&a);
}

// A pinned block stays where it is, and a prefetched one comes without a fault: both are blind, and count as touched.
static void blind(void)
{
	struct array a = scratch_array(0, UF_DELIVERY_THREAD);
	struct uf_failure why;
	CHECK(!uf_memory_pin(a.m, 5, 2, &why));
	CHECK(!uf_memory_watch(a.m, true));
	CHECK(!uf_memory_prefetch(a.m, 20, 3, true, &why));
	for (int round = 0; round < 2; round++) {
		struct seen s = take(a.m, true);
		for (uint64_t b = 0; b < BLOCKS; b++)
			CHECK(bit(s.blind, b) == (b == 5 || b == 6 || (!round && b >= 20 && b < 23)), "round %d block %llu", round,
			      (unsigned long long)b);
	}
	CHECK(!uf_memory_unpin(a.m, 5, 2));
	take(a.m, true);
	struct seen s = take(a.m, true);
	for (uint64_t i = 0; i < WORDS; i++)
		CHECK(!s.blind[i]);
	uf_memory_unwatch(a.m, true);
	array_end(&a);
}

struct storm {
	struct array *a;
	_Atomic uint64_t stamp[BLOCKS]; // writes so far
};

static void write_blocks(struct test_crowd *c, int number)
{
	struct storm *s = c->arg;
	uint64_t r = (uint64_t)number + 1;
	while (!atomic_load(&c->stop)) {
		uint64_t b = test_random(&r) % (BLOCKS / 4) * 4 + (uint64_t)number % 4;
		uint64_t n = atomic_load_explicit(&s->stamp[b], memory_order_relaxed) + 1;
		*(volatile uint64_t *)(s->a->at + b * BLOCK + 512) = n;
		// After the write: who reads the stamp and then ends an interval must be told of this block.
		atomic_store(&s->stamp[b], n);
		atomic_fetch_add(&c->work, 1);
	}
}

// Every write is told in the interval in which it happened, whatever happens at the same time.
static void nothing_lost(bool accesses, enum uf_delivery delivery)
{
	struct array a = scratch_array(LENGTH / 2, delivery);
	struct storm s = {.a = &a};
	struct test_crowd crowd = {0};
	CHECK(!uf_memory_watch(a.m, accesses));
	static uint64_t before[BLOCKS], told[BLOCKS];
	memset(told, 0, sizeof(told));
	test_crowd_start(&crowd, 4, write_blocks, &s);
	int rounds = test_rounds(120);
	for (int round = 0; round < rounds; round++) {
		for (uint64_t b = 0; b < BLOCKS; b++)
			before[b] = atomic_load(&s.stamp[b]);
		struct seen now = take(a.m, true);
		for (uint64_t b = 0; b < BLOCKS; b++) {
			// Written since it was told last, and before this interval ended.
			if (before[b] > told[b])
				CHECK(bit(now.written, b) || bit(now.blind, b), "round %d: block %llu lost a write", round, (unsigned long long)b);
			if (bit(now.written, b) || bit(now.blind, b))
				told[b] = atomic_load(&s.stamp[b]); // until its block trapped again
		}
	}
	test_crowd_stop(&crowd, "writers");
	for (uint64_t b = 0; b < BLOCKS; b++)
		memcpy(a.want + b * BLOCK + 512, &(uint64_t){atomic_load(&s.stamp[b])}, atomic_load(&s.stamp[b]) ? 8 : 0);
	array_right(&a, "storm");
	uf_memory_unwatch(a.m, accesses);
	array_end(&a);
}

static int bits(const uint64_t *words)
{
	int n = 0;
	for (int i = 0; i < WORDS; i++)
		n += __builtin_popcountll(words[i]);
	return n;
}

static uint32_t source;

static struct uf_memory *of_worker(const char *mode)
{
	source = test_worker_source(pager, mode);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_WORKER, .no_readahead = true,
				      .source_id = source};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	return m;
}

static void *read_five(void *m)
{
	sum ^= ((volatile uint8_t *)uf_memory_address(m))[5 * BLOCK];
	return NULL;
}

// The interval ends while the source still reads: the access is told before and after, and what follows without a trap too.
static void late(void)
{
	struct uf_memory *m = of_worker("slow:200000");
	CHECK(!uf_memory_watch(m, true));
	pthread_t t;
	CHECK(!pthread_create(&t, NULL, read_five, m));
	poll(NULL, 0, 50);
	CHECK(bit(take(m, true).accessed, 5));
	pthread_join(t, NULL);
	poll(NULL, 0, 20);
	read_five(m); // no trap
	struct seen s = take(m, true);
	CHECK(bit(s.accessed, 5) && bits(s.accessed) == 1);
	s = take(m, true);
	CHECK(!bits(s.accessed) && !bits(s.blind));
	read_five(m);
	s = take(m, true);
	CHECK(bit(s.accessed, 5) && !bits(s.blind));
	uf_memory_unwatch(m, true);
	uf_memory_destroy(m);
	uf_source_drop(pager, source);
}

// A fault meets a prefetch under way: the block that it meant is accessed, all others that came along are blind.
static void met(void)
{
	struct uf_memory *m = of_worker("slow:100000");
	struct uf_failure why;
	CHECK(!uf_memory_watch(m, true));
	CHECK(!uf_memory_prefetch(m, 16, 8, false, &why));
	const volatile uint8_t *at = uf_memory_address(m);
	poll(NULL, 0, 20);
	sum ^= at[19 * BLOCK];
	sum ^= at[16 * BLOCK];
	struct seen s = take(m, true);
	for (uint64_t b = 16; b < 24; b++)
		CHECK(bit(s.accessed, b) || bit(s.blind, b), "block %llu", (unsigned long long)b);
	CHECK(bit(s.accessed, 19) && !bit(s.accessed, 23));
	uf_memory_unwatch(m, true);
	uf_memory_destroy(m);
	uf_source_drop(pager, source);
}

// What is resident and clean lets reads pass, pinned or not; a new watch knows nothing of the last one.
static void pinned_reads(void)
{
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_MEMORY, .address = test_reference(LENGTH)};
	struct uf_memory *m;
	struct uf_failure why;
	test_memory_source(pager, &o, &m);
	CHECK(!uf_memory_pin(m, 5, 2, &why) && !uf_memory_pin(m, 70, 1, &why));
	CHECK(!uf_memory_watch(m, true));
	for (int i = 0; i < 3; i++) {
		struct seen s = take(m, true);
		CHECK(bit(s.blind, 5) && bit(s.blind, 6) && bit(s.blind, 70) && bits(s.blind) == 3);
	}
	uf_memory_unwatch(m, true);
	CHECK(!uf_memory_unpin(m, 5, 2) && !uf_memory_unpin(m, 70, 1));
	CHECK(!uf_memory_watch(m, true));
	struct seen s = take(m, true);
	CHECK(!bits(s.blind) && !bits(s.accessed));
	// Readahead is off as long as somebody watches accesses, and no longer.
	CHECK(!uf_memory_watch(m, false));
	uf_memory_unwatch(m, true);
	uint64_t before = test_stats(m).faults;
	for (uint64_t b = 100; b < 200; b++)
		CHECK(!test_touch_right(uf_memory_address(m), b * BLOCK));
	CHECK(test_stats(m).faults < before + 50);
	uf_memory_unwatch(m, false);
	uf_memory_destroy(m);
}

// What waits in its slot as the tripwire of a scan would stay LOADING for ever.
static void held(void)
{
	source = test_worker_source(pager, "slow:1000");
	struct uf_memory_options o = {.nbytes = 8 * LENGTH, .block = BLOCK, .source = UF_SOURCE_WORKER, .source_id = source};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	const volatile uint8_t *at = uf_memory_address(m);
	for (uint64_t b = 0; b < 400; b++)
		sum ^= at[b * BLOCK];
	poll(NULL, 0, 100);
	CHECK(!uf_memory_watch(m, true));
	static uint64_t accessed[8 * WORDS], written[8 * WORDS], blind[8 * WORDS];
	CHECK(!uf_memory_watched(m, accessed, written, blind, true));
	sum ^= at[3000 * BLOCK];
	CHECK(!uf_memory_watched(m, accessed, written, blind, true));
	for (uint64_t b = 0; b < 8 * BLOCKS; b++)
		CHECK(bit(accessed, b) == (b == 3000) && !bit(blind, b), "block %llu", (unsigned long long)b);
	uf_memory_unwatch(m, true);
	uf_memory_destroy(m);
	uf_source_drop(pager, source);
}

static void in_child(void *arg)
{
	struct array *a = arg;
	a->at[7 * BLOCK] = 9;
	struct seen s = take(a->m, true);
	CHECK(bit(s.written, 7) || bit(s.blind, 7));
}

// After a fork nothing traps on what is resident: the child must not say that nothing was written.
static void forked(void)
{
	struct array a = scratch_array(0, UF_DELIVERY_THREAD);
	CHECK(!uf_memory_watch(a.m, false));
	CHECK(test_in_child(in_child, &a) == 0);
	a.at[9 * BLOCK] = a.want[9 * BLOCK] = 3;
	struct seen s = take(a.m, true);
	CHECK(bit(s.written, 9) && bits(s.written) == 1);
	uf_memory_unwatch(a.m, false);
	array_right(&a, "parent");
	array_end(&a);
}

static atomic_bool full;
static atomic_uint refused;

ssize_t pwrite64(int fd, const void *bytes, size_t n, off_t at);
ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
	if (!atomic_load(&full))
		return syscall(SYS_pwrite64, fd, bytes, n, at);
	atomic_fetch_add(&refused, 1);
	errno = ENOSPC;
	return -1;
}
ssize_t pwrite64(int fd, const void *bytes, size_t n, off_t at)
{
	return pwrite(fd, bytes, n, at);
}

// What cannot be written back is still writable: blind until it can. It is not tried over and over.
static void failing(void)
{
	int fd = test_file(LENGTH, true);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .store = UF_STORE_SOURCE, .source = UF_SOURCE_FILE, .fd = fd};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	volatile uint8_t *at = uf_memory_address(m);
	CHECK(!uf_memory_watch(m, false));
	at[9 * BLOCK] = 1;
	atomic_store(&full, true);
	take(m, true);
	CHECK(atomic_load(&refused) < 20, "%u writes refused", atomic_load(&refused));
	at[9 * BLOCK] = 2;
	struct seen s = take(m, true);
	CHECK(bit(s.blind, 9) || bit(s.written, 9));
	atomic_store(&full, false);
	take(m, true);
	s = take(m, true);
	CHECK(!bits(s.blind) && !bits(s.written));
	uf_memory_unwatch(m, false);
	uf_memory_destroy(m);
	close(fd);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	const char *only = argc > 1 ? argv[1] : NULL;
	pager = test_pager(64 << 20);
	for (int direct = 0; direct < 2; direct++) {
		enum uf_delivery d = direct ? UF_DELIVERY_DIRECT : UF_DELIVERY_THREAD;
		if (RUN("patterns")) {
			patterns(0, d, true);
			patterns(0, d, false);
			patterns(LENGTH / 4, d, true);
			patterns(LENGTH / 4, d, false);
		}
		if (RUN("nothing-lost")) {
			nothing_lost(true, d);
			nothing_lost(false, d);
		}
	}
	if (RUN("blind"))
		blind();
	if (RUN("late"))
		late();
	if (RUN("met"))
		met();
	if (RUN("pinned-reads"))
		pinned_reads();
	if (RUN("held"))
		held();
	if (RUN("forked"))
		forked();
	if (RUN("failing"))
		failing();
	pager_end(pager);
	return 0;
}
