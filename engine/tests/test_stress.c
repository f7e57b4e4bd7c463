// SPDX-License-Identifier: Apache-2.0
// Everything at once: memories of all kinds in shared and own budgets, read, scanned, prefetched, evicted, advised, closed
// and created again by several threads while the limit changes. Every byte is checked, and the counters in the end.
// UF_STRESS_SECONDS says for how long (5).
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "support.h"
#include "uapi.h"

enum { LENGTH = 12 << 20, MEMORIES = 8, THREADS = 5 };
enum kind { MEMORY, DISK, TMPFS, WORKER };

static struct uf_pager *pager;
static int disk, tmpfs;
static uint32_t source;

struct place {
	pthread_rwlock_t lock; // for writing by who closes the memory and creates another
	struct uf_memory *m;
	uint64_t block, budget;
};
static struct place places[MEMORIES];

static void create(struct place *at, unsigned number)
{
	static const uint64_t blocks[] = {4096, 65536, 16384, 2 << 20, 65536, 1 << 20, 262144};
	at->block = blocks[number % 7];
	at->budget = number % 3 == 2 ? 4 << 20 : 0;
	enum kind kind = (enum kind)(number % 4);
	struct uf_memory_options o = {
		.nbytes = LENGTH - number % 5 * 777,
		.block = at->block,
		.budget = at->budget,
		.source = kind == MEMORY ? UF_SOURCE_MEMORY : kind == WORKER ? UF_SOURCE_WORKER : UF_SOURCE_FILE,
		.address = test_reference(LENGTH),
		.fd = kind == DISK ? disk : tmpfs,
		.source_id = source,
	};
	test_memory_source(pager, &o, &at->m);
}

static void stress(struct test_crowd *c, int number)
{
	uint64_t r = 88172645463325252u + (uint64_t)number * 7919;
	uint64_t least = LENGTH - 4 * 777;
	while (!atomic_load(&c->stop)) {
		struct place *p = &places[test_random(&r) % MEMORIES];
		unsigned what = (unsigned)(test_random(&r) % 64);
		if (what == 0) {
			pthread_rwlock_wrlock(&p->lock);
			uf_memory_destroy(p->m);
			create(p, (unsigned)(test_random(&r) % 1000));
			pthread_rwlock_unlock(&p->lock);
			continue;
		}
		pthread_rwlock_rdlock(&p->lock);
		const uint8_t *at = uf_memory_address(p->m);
		uint64_t blocks = LENGTH / p->block, first = test_random(&r) % blocks;
		struct uf_failure why;
		uint8_t states[64];
		if (what < 8) { // a scan, of any direction
			uint64_t k = test_random(&r) % least, n = 2 << 20;
			for (uint64_t i = 0; i < n && k < least - 4096; i += 4096, k += what < 6 ? 4096 : 5 * 4096)
				CHECK(at[k] == test_byte(k), "byte %llu", (unsigned long long)k);
		} else if (what < 10) {
			int err = uf_memory_prefetch(p->m, first, (test_random(&r) % (3 << 20)) / p->block + 1, what == 9, &why);
			CHECK(err == 0, "%s", why.message);
		} else if (what < 12) {
			uf_memory_evict(p->m, first, (test_random(&r) % (4 << 20)) / p->block + 1);
		} else if (what == 12) {
			uf_memory_advise(p->m, (enum uf_advice)(test_random(&r) % 3));
		} else if (what == 13) {
			uf_pager_set_limit(pager, (12 + test_random(&r) % 20) << 20);
		} else if (what == 14) {
			uf_memory_states(p->m, 0, blocks < 64 ? blocks : 64, states);
			CHECK(test_stats(p->m).errors == 0);
			test_pager_stats(pager);
			CHECK(uf_is_paged(at + first, 1));
		} else {
			for (int i = 0; i < 16; i++) {
				uint64_t k = test_random(&r) % (least - 5000), n = test_random(&r) % 5000 + 1;
				CHECK(test_differs(at + k, k, n) == UINT64_MAX, "byte %llu", (unsigned long long)k);
			}
		}
		pthread_rwlock_unlock(&p->lock);
		atomic_fetch_add(&c->work, 1);
	}
}

// No readahead is under way any more, nor what it evicts.
static bool settled(void *arg)
{
	(void)arg;
	uint64_t sum = 0;
	for (int i = 0; i < MEMORIES; i++) {
		struct place *p = &places[i];
		uint64_t blocks = (LENGTH + p->block - 1) / p->block - 1;
		uint8_t *states = malloc(blocks);
		uf_memory_states(p->m, 0, blocks, states);
		bool moves = memchr(states, UF_LOADING, blocks) || memchr(states, UF_EVICTING, blocks);
		free(states);
		if (moves)
			return false;
		sum += test_stats(p->m).resident;
	}
	return sum == test_pager_stats(pager).resident && sum <= test_pager_stats(pager).limit;
}

static void everything(void)
{
	const char *text = getenv("UF_STRESS_SECONDS");
	int seconds = text ? atoi(text) : 5;
	pager = test_pager(32 << 20);
	source = test_worker_source(pager, "ok");
	for (unsigned i = 0; i < MEMORIES; i++) {
		pthread_rwlock_init(&places[i].lock, NULL);
		create(&places[i], i);
	}
	static struct test_crowd c;
	test_crowd_start(&c, THREADS, stress, NULL);
	for (int i = 0; i < seconds; i++) {
		test_crowd_work(&c, 20, "stress");
		struct timespec second = {1, 0};
		nanosleep(&second, NULL);
	}
	test_crowd_stop(&c, "stress");

	// What is in flight adds at most an extent for each thread that installs.
	const uint64_t flying = (THREADS + 1 + 4) * (uint64_t)UF_EXTENT;
	uf_pager_set_limit(pager, 16 << 20);
	struct uf_failure why;
	for (int i = 0; i < MEMORIES; i++)
		CHECK(uf_memory_prefetch(places[i].m, 0, 1, true, &why) == 0);
	CHECK(test_wait(settled, NULL), "memories hold %llu, the pager counts %llu", (unsigned long long)test_stats(places[0].m).resident,
	      (unsigned long long)test_pager_stats(pager).resident);
	for (int i = 0; i < MEMORIES; i++) {
		struct place *p = &places[i];
		struct uf_stats s = test_stats(p->m);
		uint64_t blocks = (LENGTH + p->block - 1) / p->block, clean = 0;
		CHECK(s.errors == 0 && s.poisoned == 0);
		CHECK(s.blocks_demand + s.blocks_readahead + s.blocks_prefetch >= s.evictions);
		uint64_t most = p->budget > 8 * p->block ? p->budget : 8 * p->block; // eight blocks always fit
		if (p->budget)
			CHECK(s.resident_peak <= most + flying && s.resident <= most, "%llu of %llu",
			      (unsigned long long)s.resident_peak, (unsigned long long)most);
		uint8_t *states = malloc(blocks);
		uf_memory_states(p->m, 0, blocks - 1, states);
		for (uint64_t b = 0; b < blocks - 1; b++) {
			clean += states[b] == UF_CLEAN;
			CHECK(states[b] == UF_CLEAN || states[b] == UF_ABSENT, "%d", states[b]);
		}
		free(states);
		CHECK(s.resident >= clean * p->block, "%llu blocks are there, %llu bytes counted", (unsigned long long)clean,
		      (unsigned long long)s.resident);
		uf_memory_destroy(p->m);
	}
	CHECK(test_pager_stats(pager).resident_peak <= (32u << 20) + flying, "%llu",
	      (unsigned long long)test_pager_stats(pager).resident_peak);
	CHECK(uf_source_drop(pager, source) == 0);
	test_settle(pager);
	test_end(pager);
}

// --- more threads inside the engine than it has records for

// A source that answers when we like: its pages are missing, and this test's own userfaultfd resolves them.
struct tap {
	char *area;
	int fd;
};

static bool tap_open(struct tap *t)
{
	if (uf_host_probe()->open_via == 3)
		return false; // the engine's COPY could not wait for it
	t->fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (t->fd < 0)
		return false;
	struct uffdio_api a = {.api = UFFD_API};
	t->area = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct uffdio_register r = {{(uintptr_t)t->area, LENGTH}, UFFDIO_REGISTER_MODE_MISSING, 0};
	CHECK(t->area != MAP_FAILED && !ioctl(t->fd, UFFDIO_API, &a) && !ioctl(t->fd, UFFDIO_REGISTER, &r));
	return true;
}

// Waits until so many threads wait for the source.
static void tap_waits(struct tap *t, int n)
{
	for (int i = 0; i < 20000 && n > 0; i++) {
		struct uffd_msg m;
		while (n > 0 && read(t->fd, &m, sizeof(m)) == sizeof(m))
			n--;
		if (n > 0)
			poll(NULL, 0, 1);
	}
	CHECK(n == 0, "%d reads fewer than were to come", n);
}

static void tap_flow(struct tap *t)
{
	struct uffdio_copy c = {(uintptr_t)t->area, (uintptr_t)test_reference(LENGTH), LENGTH, 0, 0};
	CHECK(ioctl(t->fd, UFFDIO_COPY, &c) == 0);
}

static void tap_close(struct tap *t)
{
	close(t->fd);
	munmap(t->area, LENGTH);
}

static void prefetcher(struct test_crowd *c, int number)
{
	struct uf_failure why;
	CHECK(uf_memory_prefetch(c->arg, (uint64_t)number, 1, true, &why) == 0, "%s", why.message);
}

static void toucher(struct test_crowd *c, int number)
{
	CHECK(test_touch_right(uf_memory_address(c->arg), (uint64_t)number * 5 * 65536 + 100) == 0);
}

static bool whole(void *arg)
{
	return test_stats(arg).resident == LENGTH;
}

static void crowded(void)
{
	enum { THERE = 16, THREADS_WAITING = 48 }; // at least so many are let in at once; the others queue
	static struct test_crowd a, b;
	struct uf_failure why;
	struct tap t;
	pager = test_pager(1 << 30);
	for (int round = 0; round < 4 && tap_open(&t); round++) {
		struct uf_memory *slow, *other;
		struct uf_memory_options o = {.nbytes = LENGTH, .source = UF_SOURCE_MEMORY, .address = t.area};
		test_memory_source(pager, &o, &slow);
		o.address = test_reference(LENGTH);
		test_memory_source(pager, &o, &other);
		if (round % 2)
			uf_memory_evict(other, 0, 1);
		test_crowd_start(&a, THREADS_WAITING, prefetcher, slow);
		tap_waits(&t, THERE);
		// The pager's records are short. A fault, a prefetch and an eviction come all the same.
		if (round % 2)
			CHECK(uf_memory_prefetch(other, 0, LENGTH / 65536, false, &why) == 0);
		else
			test_crowd_start(&b, 3, toucher, other);
		struct pollfd none;
		for (int i = 0; i < 100; i++)
			poll(&none, 0, 1); // lets the fault thread come to it; if it does not, the test shows less
		tap_flow(&t);
		test_crowd_join(&a, "prefetches");
		if (round % 2)
			CHECK(test_wait(whole, other), "a background prefetch stands still at %llu bytes",
			      (unsigned long long)test_stats(other).resident);
		else
			test_crowd_join(&b, "faults that came when all records were taken");
		uf_memory_destroy(slow);
		uf_memory_destroy(other);
		tap_close(&t);
	}
	test_settle(pager);
	test_end(pager);
}

// --- faults that meet an eviction

static void hammer(struct test_crowd *c, int number)
{
	const uint8_t *at = uf_memory_address(c->arg);
	uint64_t r = 99 + (uint64_t)number;
	while (!atomic_load(&c->stop)) {
		if (number < 2) {
			uf_memory_evict(c->arg, 0, 16);
			continue;
		}
		uint64_t k = test_random(&r) % 65536;
		CHECK(at[k] == test_byte(k));
		atomic_fetch_add(&c->work, 1);
	}
}

static void evicted(void)
{
	static struct test_crowd c;
	pager = test_pager(1 << 30);
	for (int fd = 0; fd < 2; fd++) {
		struct uf_memory_options o = {.nbytes = 65536, .block = 4096, .address = test_reference(LENGTH), .fd = tmpfs};
		o.source = fd ? UF_SOURCE_FILE : UF_SOURCE_MEMORY;
		struct uf_memory *m;
		test_memory_source(pager, &o, &m);
		test_crowd_start(&c, 5, hammer, m);
		test_crowd_work(&c, TEST_TSAN ? 10000 : 60000, "faults that meet an eviction");
		test_crowd_stop(&c, "faults that meet an eviction");
		uf_memory_destroy(m);
	}
	test_settle(pager);
	test_end(pager);
}

// --- background fills of two memories share the jobs

static void turns(void)
{
	struct uf_failure why;
	pager = test_pager(1 << 30);
	source = test_worker_source(pager, "slow:2000");
	for (int round = 0; round < 6; round++) {
		struct uf_memory *a, *b;
		struct uf_memory_options o = {.nbytes = LENGTH, .block = 4096, .source = UF_SOURCE_WORKER, .source_id = source};
		test_memory_source(pager, &o, &a);
		test_memory_source(pager, &o, &b);
		// Every second block first, so that each block is a read of its own.
		for (uint64_t k = 0; k < 200; k += 2)
			CHECK(uf_memory_prefetch(a, k, 1, false, &why) == 0);
		CHECK(uf_memory_prefetch(a, 0, LENGTH / 4096, false, &why) == 0);
		CHECK(uf_memory_prefetch(b, 0, LENGTH / 4096, false, &why) == 0);
		if (round % 2)
			uf_memory_close(a);
		CHECK(test_wait(whole, b), "a background prefetch stands still at %llu bytes", (unsigned long long)test_stats(b).resident);
		uf_memory_destroy(a);
		uf_memory_destroy(b);
	}
	CHECK(uf_source_drop(pager, source) == 0);
	test_settle(pager);
	test_end(pager);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	test_reference(LENGTH);
	test_guard();
	disk = test_file(LENGTH, true);
	tmpfs = test_file(LENGTH, false);
	const char *only = argc == 2 ? argv[1] : NULL;
	if (RUN("crowded"))
		crowded();
	if (RUN("evicted"))
		evicted();
	if (RUN("turns"))
		turns();
	if (RUN("everything"))
		everything();
	CHECK(test_threads_left(test_base_threads()));
	return 0;
}
