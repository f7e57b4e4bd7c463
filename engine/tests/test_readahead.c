// SPDX-License-Identifier: Apache-2.0
// Readahead: scans fault rarely, strides are recognised, random access asks for nothing, advice is heeded, budgets hold.
#include <poll.h>
#include <sys/mman.h>

#include "support.h"

enum { BLOCK = 65536, LENGTH = 64 << 20, BLOCKS = LENGTH / BLOCK };

static struct uf_pager *pager;
static uint32_t source;

static struct uf_memory *create(bool worker, uint64_t block, uint64_t budget)
{
	struct uf_memory_options o = {
		.nbytes = LENGTH,
		.block = block,
		.budget = budget,
		.source = worker ? UF_SOURCE_WORKER : UF_SOURCE_MEMORY,
		.address = test_reference(LENGTH),
		.source_id = source,
	};
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	return m;
}

static void scan(struct uf_memory *m)
{
	CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
}

static void sequential(bool worker, uint64_t block, uint64_t budget)
{
	struct uf_memory *m = create(worker, block, budget);
	uint64_t blocks = LENGTH / block;
	scan(m);
	struct uf_stats s = test_stats(m);
	CHECK(s.faults < blocks / 8 + 4, "%llu faults for %llu blocks", (unsigned long long)s.faults, (unsigned long long)blocks);
	CHECK(s.blocks_readahead + s.blocks_demand >= blocks && s.bytes_read >= LENGTH);
	CHECK(s.errors == 0);
	if (budget) {
		CHECK(s.resident_peak <= budget + UF_EXTENT, "%llu resident, budget %llu", (unsigned long long)s.resident_peak,
		      (unsigned long long)budget);
		// The window is a part of the budget: nothing that it brings is evicted unread and read again.
		CHECK(s.bytes_read <= LENGTH + LENGTH / 8, "%llu bytes read", (unsigned long long)s.bytes_read);
	} else {
		CHECK(s.bytes_read == LENGTH, "%llu bytes read", (unsigned long long)s.bytes_read);
	}
	if (uf_memory_uses_extents(m) && !worker && !budget)
		CHECK(s.bytes_extent > LENGTH / 2, "%llu bytes as extents", (unsigned long long)s.bytes_extent);
	uf_memory_destroy(m);
}

struct wanted {
	struct uf_memory *m;
	uint64_t block;
};

static bool there(void *arg)
{
	struct wanted *w = arg;
	return test_state(w->m, w->block) == UF_CLEAN;
}

static void strided(bool worker, int64_t stride)
{
	struct uf_memory *m = create(worker, BLOCK, 0);
	const uint8_t *at = uf_memory_address(m);
	uint64_t touches = 0, block = stride > 0 ? 1 : BLOCKS - 2;
	for (; block < BLOCKS; block += (uint64_t)stride, touches++) {
		CHECK(test_touch_right(at, block * BLOCK + 4000) == 0);
		// A reader that does something with what it reads: the pager comes to its queue.
		if (touches % 8 == 7) {
			struct wanted w = {m, block + (uint64_t)stride};
			if (w.block < BLOCKS && touches > 8)
				for (int i = 0; i < 200 && !there(&w); i++)
					poll(NULL, 0, 1);
		}
	}
	struct uf_stats s = test_stats(m);
	CHECK(s.blocks_readahead > touches / 4, "%llu of %llu blocks came ahead", (unsigned long long)s.blocks_readahead,
	      (unsigned long long)touches);
	CHECK(s.faults < touches * 3 / 4, "stride %lld: %llu faults for %llu touches", (long long)stride, (unsigned long long)s.faults,
	      (unsigned long long)touches);
	CHECK(s.blocks_demand + s.blocks_readahead <= touches + 40, "blocks that nobody asked for");
	uf_memory_destroy(m);
}

static void at_random(bool worker)
{
	struct uf_memory *m = create(worker, 4096, 0);
	const uint8_t *at = uf_memory_address(m);
	uint64_t r = 88172645463325252u, touches = 1500;
	for (uint64_t i = 0; i < touches; i++)
		CHECK(test_touch_right(at, test_random(&r) % LENGTH) == 0);
	struct uf_stats s = test_stats(m);
	CHECK(s.blocks_readahead < touches / 10, "%llu blocks ahead of random reads", (unsigned long long)s.blocks_readahead);
	uf_memory_destroy(m);
}

static void advised(void)
{
	struct uf_memory *m = create(false, BLOCK, 0);
	uf_memory_advise(m, UF_RANDOM);
	scan(m);
	struct uf_stats s = test_stats(m);
	CHECK(s.faults == BLOCKS && s.blocks_readahead == 0 && s.blocks_demand == BLOCKS, "%llu faults", (unsigned long long)s.faults);
	uf_memory_evict(m, 0, BLOCKS);
	CHECK(test_stats(m).resident == 0);
	uf_memory_advise(m, UF_NORMAL);
	scan(m);
	s = test_stats(m);
	CHECK(s.faults < BLOCKS + BLOCKS / 8, "%llu faults", (unsigned long long)s.faults);
	uf_memory_destroy(m);

	// One touch, and the pager goes on by itself.
	m = create(false, BLOCK, 0);
	uf_memory_advise(m, UF_SEQUENTIAL);
	CHECK(test_touch_right(uf_memory_address(m), 10 * BLOCK) == 0);
	struct wanted w = {m, 30};
	CHECK(test_wait(there, &w));
	CHECK(test_stats(m).faults == 1 && test_stats(m).blocks_readahead >= 20);
	uf_memory_destroy(m);

	struct uf_memory_options o = {
		.nbytes = LENGTH, .source = UF_SOURCE_MEMORY, .address = test_reference(LENGTH), .no_readahead = true};
	test_memory_source(pager, &o, &m);
	scan(m);
	CHECK(test_stats(m).faults == BLOCKS && test_stats(m).blocks_readahead == 0);
	uf_memory_destroy(m);
}

// Several scans at once, each its own stream.
static void scanner(struct test_crowd *c, int number)
{
	const uint8_t *at = uf_memory_address(c->arg);
	uint64_t part = LENGTH / 3, first = part * (uint64_t)number;
	CHECK(test_differs(at + first, first, part) == UINT64_MAX);
}

static void streams(bool worker)
{
	static struct test_crowd c;
	struct uf_memory *m = create(worker, BLOCK, 0);
	test_crowd_start(&c, 3, scanner, m);
	test_crowd_join(&c, "scans");
	struct uf_stats s = test_stats(m);
	CHECK(s.faults < BLOCKS / 4, "%llu faults for %d blocks by three scans", (unsigned long long)s.faults, BLOCKS);
	uf_memory_destroy(m);
}

static void extents(void)
{
	struct uf_memory *m = create(false, BLOCK, 0);
	const struct uf_host *h = uf_host_probe();
	struct uf_failure why;
	CHECK(uf_memory_uses_extents(m) == (h->move && h->wp && h->thp));
	CHECK(uf_memory_prefetch(m, 0, BLOCKS, true, &why) == 0);
	if (uf_memory_uses_extents(m))
		CHECK(test_stats(m).bytes_extent > LENGTH / 2, "%llu", (unsigned long long)test_stats(m).bytes_extent);
	scan(m);
	CHECK(test_stats(m).faults == 0);
	uf_memory_destroy(m);

	struct uf_pager_options o = test_options(1 << 30);
	struct uf_pager *plain, *old = pager;
	o.no_extents = true;
	CHECK(uf_pager_create(&o, &plain) == 0);
	pager = plain;
	m = create(false, BLOCK, 0);
	CHECK(!uf_memory_uses_extents(m));
	scan(m);
	CHECK(test_stats(m).bytes_extent == 0);
	uf_memory_destroy(m);
	test_settle(plain);
	CHECK(uf_pager_destroy(plain) == 0);
	pager = old;
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	test_reference(LENGTH);
	const char *only = argc == 2 ? argv[1] : NULL;
	pager = test_pager(1 << 30);
	source = test_worker_source(pager, "ok");
	for (int worker = 0; worker < 2; worker++) {
		if (RUN("sequential")) {
			sequential(worker, BLOCK, 0);
			sequential(worker, BLOCK, 8 << 20);
			sequential(worker, 4096, 0);
			sequential(worker, 4096, 4 << 20);
		}
		if (RUN("strided")) {
			strided(worker, 4);
			strided(worker, 3);
			strided(worker, -2);
		}
		if (RUN("random"))
			at_random(worker);
		if (RUN("streams"))
			streams(worker);
	}
	if (RUN("advised"))
		advised();
	if (RUN("extents"))
		extents();
	CHECK(uf_source_drop(pager, source) == 0);
	test_settle(pager);
	test_end(pager);
	return 0;
}
