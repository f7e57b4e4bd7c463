// SPDX-License-Identifier: Apache-2.0
// Replay: a plan is loaded ahead of demand, window by window, followed where the program goes on, and dropped when it is wrong.
#include <poll.h>
#include <sys/uio.h>

#include "writing.h"

enum { BLOCK = 4096, BLOCKS = 512, LENGTH = BLOCKS * BLOCK };

static struct uf_pager *pager;

static struct uf_memory *replayed(uint64_t budget)
{
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_MEMORY, .address = test_reference(LENGTH),
				      .budget = budget, .no_readahead = true};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	return m;
}

struct wanted {
	struct uf_memory *m;
	uint64_t blocks;
};

static bool replayed_so_far(void *arg)
{
	struct wanted *w = arg;
	return test_stats(w->m).blocks_replay >= w->blocks;
}

static void follows(void)
{
	static const uint64_t plan[] = {300, 10, 7, 1, 100, 30, 600, 5}; // the last one lies outside
	struct uf_memory *m = replayed(0);
	CHECK(!uf_memory_replay(m, plan, 4));
	struct wanted w = {m, 41};
	CHECK(test_wait(replayed_so_far, &w), "%llu blocks", (unsigned long long)test_stats(m).blocks_replay);
	const uint8_t *at = uf_memory_address(m);
	for (uint64_t b = 300; b < 310; b++)
		CHECK(test_touch_right(at, b * BLOCK) == 0);
	CHECK(test_stats(m).faults == 0 && test_stats(m).blocks_replay == 41);
	uf_memory_destroy(m);
}

// A plan of all the memory in a quarter of it: half a budget at a time, each after a fault that asks for it.
static void windows(void)
{
	const uint64_t plan[] = {0, BLOCKS}, window = BLOCKS / 8;
	struct uf_memory *m = replayed(LENGTH / 4);
	CHECK(!uf_memory_replay(m, plan, 1));
	const uint8_t *at = uf_memory_address(m);
	struct wanted w = {m, window};
	for (uint64_t b = 0; b < BLOCKS; b++) {
		if (b % (window + 1) == 0)
			CHECK(test_wait(replayed_so_far, &w), "at %llu: %llu blocks", (unsigned long long)b,
			      (unsigned long long)test_stats(m).blocks_replay);
		w.blocks = uf_min(test_stats(m).blocks_replay + window, BLOCKS - BLOCKS / (window + 1) - 1);
		CHECK(test_touch_right(at, b * BLOCK) == 0);
	}
	struct uf_stats s = test_stats(m);
	CHECK(s.faults <= BLOCKS / window + 2, "%llu faults", (unsigned long long)s.faults);
	CHECK(s.resident_peak <= LENGTH / 4 + UF_EXTENT && s.replays_dropped == 0);
	uf_memory_destroy(m);
}

static void dropped(void)
{
	uint64_t plan[2 * 64];
	for (uint64_t i = 0; i < 64; i++)
		plan[2 * i] = BLOCKS / 2 + 2 * i, plan[2 * i + 1] = 1;
	struct uf_memory *m = replayed(BLOCK * 32); // windows of 16
	CHECK(!uf_memory_replay(m, plan, 64));
	struct wanted w = {m, 16};
	CHECK(test_wait(replayed_so_far, &w));
	const uint8_t *at = uf_memory_address(m);
	for (uint64_t b = 0; b < 100; b++)
		CHECK(test_touch_right(at, b * BLOCK) == 0);
	CHECK(test_stats(m).replays_dropped == 1 && test_stats(m).blocks_replay == 16);
	CHECK(test_touch_right(at, plan[40] * BLOCK) == 0); // of the plan, but nothing follows
	poll(NULL, 0, 20);
	CHECK(test_stats(m).blocks_replay == 16);
	CHECK(!uf_memory_replay(m, plan, 64)); // another one may come
	uf_memory_destroy(m);
}

// One fault far ahead takes nothing from a plan that fits.
static void ahead(void)
{
	uint32_t source = test_worker_source(pager, "slow:2000");
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_WORKER, .no_readahead = true,
				      .source_id = source};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	uint64_t plan[2 * 100];
	for (uint64_t i = 0; i < 100; i++)
		plan[2 * i] = 2 * i, plan[2 * i + 1] = 1;
	CHECK(!uf_memory_replay(m, plan, 100));
	CHECK(test_touch_right(uf_memory_address(m), 2 * 95 * BLOCK) == 0);
	struct wanted w = {m, 99};
	CHECK(test_wait(replayed_so_far, &w), "%llu of 99", (unsigned long long)test_stats(m).blocks_replay);
	uf_memory_destroy(m);
	uf_source_drop(pager, source);
}

// A run that leaves out a part of the plan, however long, is followed from where it goes on.
static void skips(void)
{
	enum { EXTENTS = 2000 };
	static uint64_t plan[2 * EXTENTS];
	struct uf_memory_options o = {.nbytes = 2ULL * EXTENTS * BLOCK, .block = BLOCK, .source = UF_SOURCE_MEMORY,
				      .address = test_reference(2ULL * EXTENTS * BLOCK), .budget = BLOCK * 200, .no_readahead = true};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	for (uint64_t i = 0; i < EXTENTS; i++)
		plan[2 * i] = 2 * i, plan[2 * i + 1] = 1;
	CHECK(!uf_memory_replay(m, plan, EXTENTS));
	struct wanted w = {m, 100};
	CHECK(test_wait(replayed_so_far, &w));
	const uint8_t *at = uf_memory_address(m);
	for (uint64_t i = 1500; i < EXTENTS; i++) {
		if ((i - 1500) % 101 == 1) // a window is on its way
			CHECK(test_wait(replayed_so_far, &w), "at %llu: %llu blocks", (unsigned long long)i,
			      (unsigned long long)test_stats(m).blocks_replay);
		if ((i - 1500) % 101 == 0)
			w.blocks = uf_min(test_stats(m).blocks_replay + 100, 100 + 500 - 5);
		CHECK(test_touch_right(at, 2 * i * BLOCK) == 0);
	}
	struct uf_stats s = test_stats(m);
	CHECK(s.faults < 20 && !s.replays_dropped, "%llu faults", (unsigned long long)s.faults);
	uf_memory_destroy(m);
}

// What was evicted and is needed again says nothing of how far the program has come.
static void behind(void)
{
	const uint64_t plan[] = {0, BLOCKS}, window = BLOCKS / 8;
	struct uf_memory *m = replayed(LENGTH / 4);
	CHECK(!uf_memory_replay(m, plan, 1));
	struct wanted w = {m, window};
	CHECK(test_wait(replayed_so_far, &w));
	for (uint64_t b = 3; b < 9; b++) {
		uf_memory_evict(m, b, 1);
		CHECK(test_touch_right(uf_memory_address(m), b * BLOCK) == 0);
	}
	poll(NULL, 0, 30);
	CHECK(test_stats(m).blocks_replay == window);
	uf_memory_destroy(m);
}

// A plan that was followed to its end is over: another phase of the program cannot make it wrong.
static void ends(void)
{
	const uint64_t plan[] = {0, 32 + 1 + 32}; // a window, the fault, a window
	struct uf_memory *m = replayed(LENGTH / 8);
	const uint8_t *at = uf_memory_address(m);
	CHECK(!uf_memory_replay(m, plan, 1));
	struct wanted w = {m, 32};
	CHECK(test_wait(replayed_so_far, &w));
	for (uint64_t b = 0; b < 33; b++)
		CHECK(test_touch_right(at, b * BLOCK) == 0);
	w.blocks = 64;
	CHECK(test_wait(replayed_so_far, &w));
	poll(NULL, 0, 20);
	for (uint64_t b = 100; b < 130; b++)
		CHECK(test_touch_right(at, b * BLOCK) == 0);
	CHECK(test_stats(m).replays_dropped == 0);
	uf_memory_destroy(m);
}

// Extents that overlap, or reach beyond the memory.
static void odd_plans(void)
{
	static const uint64_t beyond[] = {500, 100, 700, 3}, twice[] = {0, 10, 5, 2, 8, 10, 3, 0, 8, 1};
	struct uf_memory *m = replayed(0);
	CHECK(!uf_memory_replay(m, beyond, 2));
	struct wanted w = {m, 12};
	CHECK(test_wait(replayed_so_far, &w));
	CHECK(!uf_memory_replay(m, twice, 5));
	w.blocks += 18;
	CHECK(test_wait(replayed_so_far, &w));
	poll(NULL, 0, 20);
	CHECK(test_stats(m).blocks_replay == 30);
	CHECK(!uf_memory_replay(m, twice, 0));
	uf_memory_destroy(m);
}

// A part of the plan is skipped; some faults outside of it are no reason to drop it, a quarter of what was loaded is.
static void tolerates(void)
{
	struct uf_memory *m = replayed(BLOCK * 64); // windows of 32
	const uint8_t *at = uf_memory_address(m);
	uint64_t plan[2 * 128];
	for (uint64_t i = 0; i < 128; i++)
		plan[2 * i] = 256 + 2 * i, plan[2 * i + 1] = 1;
	CHECK(!uf_memory_replay(m, plan, 128));
	struct wanted w = {m, 32};
	CHECK(test_wait(replayed_so_far, &w));
	CHECK(!test_touch_right(at, plan[2 * 60] * BLOCK));
	w.blocks = 64;
	CHECK(test_wait(replayed_so_far, &w));
	for (uint64_t b = 0; b < 16; b++)
		CHECK(!test_touch_right(at, b * BLOCK));
	CHECK(test_stats(m).replays_dropped == 0);
	CHECK(!test_touch_right(at, 20 * BLOCK));
	CHECK(test_stats(m).replays_dropped == 1);
	uf_memory_destroy(m);
}

static atomic_bool cold;

ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int flags)
{
	if (!atomic_load(&cold))
		return preadv(fd, v, n, at);
	if (flags & RWF_NOWAIT) {
		errno = EAGAIN;
		return -1;
	}
	poll(NULL, 0, 1);
	return preadv(fd, v, n, at);
}

// A file that is not in the page cache: more reads than there are jobs.
static void cold_file(void)
{
	int fd = test_file(LENGTH, true);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	uint64_t plan[2 * 200];
	for (uint64_t i = 0; i < 200; i++)
		plan[2 * i] = 2 * i, plan[2 * i + 1] = 1;
	atomic_store(&cold, true);
	CHECK(!uf_memory_replay(m, plan, 200));
	struct wanted w = {m, 200};
	CHECK(test_wait(replayed_so_far, &w), "%llu of 200", (unsigned long long)test_stats(m).blocks_replay);
	atomic_store(&cold, false);
	uf_memory_destroy(m);
	close(fd);
}

// The program's own requests come first, and advice does not end the plan.
static void beside(void)
{
	struct uf_memory_options o = {.nbytes = 32 << 20, .block = BLOCK, .source = UF_SOURCE_MEMORY, .address = test_reference(32 << 20)};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	const uint64_t plan[] = {0, 8192};
	CHECK(!uf_memory_replay(m, plan, 1));
	uf_memory_advise(m, UF_RANDOM);
	struct wanted w = {m, 8192 - UF_EXTENT / BLOCK}; // the piece under way may be forgotten
	CHECK(test_wait(replayed_so_far, &w), "%llu of 8192", (unsigned long long)test_stats(m).blocks_replay);
	uf_memory_destroy(m);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	const char *only = argc > 1 ? argv[1] : NULL;
	test_reference(32 << 20);
	pager = test_pager(64 << 20);
	if (RUN("follows"))
		follows();
	if (RUN("windows"))
		windows();
	if (RUN("dropped"))
		dropped();
	if (RUN("ahead"))
		ahead();
	if (RUN("skips"))
		skips();
	if (RUN("behind"))
		behind();
	if (RUN("ends"))
		ends();
	if (RUN("odd-plans"))
		odd_plans();
	if (RUN("tolerates"))
		tolerates();
	if (RUN("cold-file"))
		cold_file();
	if (RUN("beside"))
		beside();
	pager_end(pager);
	return 0;
}
