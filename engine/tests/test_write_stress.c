// SPDX-License-Identifier: Apache-2.0
// No update lost, no stale read: threads write stamps and count in every page of an array four times its budget, while it is
// flushed and evicted, write-backs are slow and one in sixteen fails, and the process forks. tests/mutants shows that this
// test sees it when the engine breaks one of its rules.
// UF_STRESS_SECONDS says for how long each part runs (0.8); an argument names the only part to run.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "internal.h"
#include "support.h"

enum { LENGTH = 12 << 20, BUDGET = 3 << 20, PAGES = LENGTH / 4096, THREADS = 4, OWN = 64 };

// What a page holds: of each thread a stamp near its beginning and once more near its end, and a counter in the middle.
struct page {
	struct {
		uint64_t value, unused[7];
	} head[THREADS];
	uint64_t count, unused[4096 / 8 - 2 * 8 * THREADS - 1];
	struct {
		uint64_t value, unused[7];
	} tail[THREADS];
};
_Static_assert(sizeof(struct page) == 4096, "a page");

// What was written: begun before the write, ended after it. A forked child has them as of the fork.
static uint64_t begun[THREADS][PAGES], ended[THREADS][PAGES];
static uint64_t count_begun[PAGES], count_ended[PAGES];
// By each thread: the page's counter, and the next thread's stamp.
static uint64_t seen[THREADS][PAGES], others[THREADS][PAGES];

static struct uf_pager *pager;
static struct uf_memory *memory;
static struct page *pages;
static uint64_t block;
static atomic_bool trouble;
static atomic_ulong writes, failures;

static uint64_t get(const uint64_t *at)
{
	return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

static void set(uint64_t *at, uint64_t value)
{
	__atomic_store_n(at, value, __ATOMIC_RELEASE);
}

// The store, instead of libc's: slow, and one write in sixteen fails.
ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
	static _Thread_local uint64_t random;
	if (atomic_load(&trouble)) {
		random = random ? random : (uint64_t)syscall(SYS_gettid) * 0x9e3779b97f4a7c15u;
		uint64_t r = test_random(&random);
		atomic_fetch_add(&writes, 1);
		if (r % 16) {
			usleep((useconds_t)(r >> 8) % 1500);
		} else {
			atomic_fetch_add(&failures, 1);
			errno = EIO;
			return -1;
		}
	}
	return syscall(SYS_pwrite64, fd, bytes, n, at);
}

#ifndef __SANITIZE_THREAD__ // which learns from write(2) who waits for whom
// The engine's log, without the complaint that follows each first failure.
ssize_t write(int fd, const void *bytes, size_t n)
{
	if (fd == STDERR_FILENO && memmem(bytes, n, "Nothing is lost", 15))
		return (ssize_t)n;
	return syscall(SYS_write, fd, bytes, n);
}
#endif

static void own(int me, uint64_t k)
{
	uint64_t head = get(&pages[k].head[me].value), tail = get(&pages[k].tail[me].value), want = ended[me][k];
	CHECK(head == want && tail == want, "thread %d wrote %llu to page %llu and reads %llu and %llu (block %llu, state %d)", me,
	      (unsigned long long)want, (unsigned long long)k, (unsigned long long)head, (unsigned long long)tail,
	      (unsigned long long)(k * 4096 / block), test_state(memory, k * 4096 / block));
}

static void stamp(int me, uint64_t k)
{
	uint64_t value = ended[me][k] + 1;
	set(&begun[me][k], value);
	set(&pages[k].head[me].value, value);
	set(&pages[k].tail[me].value, value);
	set(&ended[me][k], value);
}

static void writer(struct test_crowd *c, int me)
{
	uint64_t r = 88172645463325252u + (uint64_t)me * 7919;
	int next = (me + 1) % THREADS;
	while (!atomic_load(&c->stop)) {
		// Mostly in a part somewhat larger than the budget, which drifts: so blocks are written to while they leave.
		// One visit in four goes to pages of the thread's own: there nobody else would wake it by chance.
		uint64_t drift = atomic_load(&c->work) / 512, at = test_random(&r) % PAGES, kind = test_random(&r) % 16;
		if (kind)
			at = (drift + at % (BUDGET / 4096 * 5 / 4)) % PAGES;
		bool alone = kind < 4;
		for (int i = 0; i < 16; i++, at = (at + test_random(&r) % 3) % PAGES) {
			at = alone ? (uint64_t)me * OWN + at % OWN : at < THREADS * OWN ? at + THREADS * OWN : at;
			unsigned what = (unsigned)(test_random(&r) % 4);
			own(me, at);
			if (what < 2)
				stamp(me, at);
			if (what == 1) {
				__atomic_fetch_add(&count_begun[at], 1, __ATOMIC_ACQ_REL);
				uint64_t was = __atomic_fetch_add(&pages[at].count, 1, __ATOMIC_ACQ_REL);
				__atomic_fetch_add(&count_ended[at], 1, __ATOMIC_ACQ_REL);
				CHECK(was >= seen[me][at], "page %llu: a counter goes back from %llu to %llu", (unsigned long long)at,
				      (unsigned long long)seen[me][at], (unsigned long long)was);
				seen[me][at] = was + 1;
			}
			if (what == 3) {
				uint64_t done = get(&ended[next][at]), value = get(&pages[at].head[next].value);
				CHECK(value >= done && value >= others[me][at] && value <= get(&begun[next][at]),
				      "page %llu: %llu where %llu was written", (unsigned long long)at, (unsigned long long)value,
				      (unsigned long long)done);
				others[me][at] = value;
			}
			atomic_fetch_add(&c->work, 1);
		}
	}
}

static void flusher(struct test_crowd *c, int me)
{
	uint64_t r = 4711 + (uint64_t)me, blocks = LENGTH / block;
	while (!atomic_load(&c->stop)) {
		uint64_t count = test_random(&r) % 16 + 1;
		uint64_t first = test_random(&r) % (test_random(&r) % 4 ? blocks : THREADS * OWN * sizeof(struct page) / block);
		struct uf_failure why[4];
		uint32_t n;
		if (me) {
			uf_memory_evict(memory, first, count);
		} else {
			int err = uf_memory_flush(memory, first, count, why, 4, &n);
			CHECK(err == 0 || (err == -EIO && n > 0), "%d, %u failures", err, n);
		}
		// The engine pauses evictions for a second after a failure. Here that would be always.
		pthread_mutex_lock(&pager->lock);
		memory->write_not_before_ns = 0;
		pthread_mutex_unlock(&pager->lock);
		poll(NULL, 0, me ? 0 : 1); // who evicts hardly rests: few faults meet a block just then
	}
}

// In a forked child: all that was written before the fork is there, and nothing that was not begun.
static void child_checks(void *arg)
{
	(void)arg;
	atomic_store(&trouble, false);
	for (uint64_t i = 0; i < PAGES; i++) {
		uint64_t k = i * 769 % PAGES;
		for (int t = 0; t < THREADS; t++) {
			uint64_t head = pages[k].head[t].value, tail = pages[k].tail[t].value;
			CHECK(head >= ended[t][k] && head <= begun[t][k] && tail >= ended[t][k] && tail <= head,
			      "in a child: page %llu has %llu and %llu of thread %d, which wrote %llu", (unsigned long long)k,
			      (unsigned long long)head, (unsigned long long)tail, t, (unsigned long long)ended[t][k]);
		}
		CHECK(pages[k].count >= count_ended[k] && pages[k].count <= count_begun[k]);
		pages[k].head[0].value = pages[k].tail[0].value = begun[0][k] + 1000000; // no business of the parent's
	}
	for (uint64_t k = 0; k < PAGES; k++)
		CHECK(pages[k].head[0].value == begun[0][k] + 1000000 && pages[k].tail[0].value == begun[0][k] + 1000000,
		      "a child lost its own write to page %llu", (unsigned long long)k);
}

static void all_right(const struct page *at, const char *where)
{
	for (uint64_t k = 0; k < PAGES; k++) {
		for (int t = 0; t < THREADS; t++)
			CHECK(at[k].head[t].value == ended[t][k] && at[k].tail[t].value == ended[t][k],
			      "%s: page %llu has %llu and %llu of thread %d, which wrote %llu", where, (unsigned long long)k,
			      (unsigned long long)at[k].head[t].value, (unsigned long long)at[k].tail[t].value, t,
			      (unsigned long long)ended[t][k]);
		CHECK(at[k].count == count_ended[k], "%s: page %llu counts %llu of %llu", where, (unsigned long long)k,
		      (unsigned long long)at[k].count, (unsigned long long)count_ended[k]);
	}
}

static bool nothing_leaves(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&pager->lock);
	bool none = pager->slots_used == 0;
	pthread_mutex_unlock(&pager->lock);
	return none;
}

// Whether everything that is to be tried came about.
static bool enough(void)
{
	struct uf_stats s = test_stats(memory);
	unsigned least = getenv("UF_TEST_SLOW") ? 1 : 10;
	return s.writebacks > 10 * least && atomic_load(&failures) >= least && s.reinstalled >= least && s.upgrades > least;
}

static void finish_and_check(int fd, enum uf_store_kind store, bool no_move)
{
	atomic_store(&trouble, false);
	CHECK(test_wait(nothing_leaves, NULL), "write-backs do not end");
	all_right(pages, "in memory");
	struct uf_failure why;
	uint32_t n;
	CHECK(uf_memory_flush(memory, 0, UINT64_MAX, &why, 1, &n) == 0 && n == 0, "%s", why.message);
	struct uf_stats s = test_stats(memory);
	CHECK(store != UF_STORE_SOURCE || s.dirty == 0, "%llu bytes are dirty after a flush", (unsigned long long)s.dirty);
	uf_memory_evict(memory, 0, LENGTH / block);
	all_right(pages, "read again");
	struct page *kept = mmap(NULL, LENGTH, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(kept != MAP_FAILED);
	if (store == UF_STORE_SOURCE)
		all_right(kept, "in the store");
	for (uint64_t k = 0; k < PAGES && store != UF_STORE_SOURCE; k++)
		CHECK(kept[k].head[0].value == 0 && kept[k].count == 0, "private changes went to the source");
	munmap(kept, LENGTH);
	uint64_t total = 0;
	for (uint64_t k = 0; k < PAGES; k++)
		for (int t = 0; t < THREADS; t++)
			total += ended[t][k];
	printf("  %s, store %d: %llu stamps, %llu written back, %lu of %lu writes failed, %llu came back from a slot, %llu upgrades\n",
	       no_move ? "copies" : "moves", store, (unsigned long long)total, (unsigned long long)s.writebacks,
	       atomic_load(&failures), atomic_load(&writes), (unsigned long long)s.reinstalled, (unsigned long long)s.upgrades);
	CHECK(enough(), "this was no stress");
	uf_memory_destroy(memory);
	close(fd);
	test_settle(pager);
	test_end(pager);
}

static void stress(bool no_move, enum uf_store_kind store, uint64_t block_size, uint64_t unit, bool forks)
{
	const char *text = getenv("UF_STRESS_SECONDS");
	double seconds = text ? atof(text) : 0.8;
	static struct test_crowd c, d;
	struct uf_pager_options po = test_options(1 << 30);
	po.no_move = no_move;
	po.attempts = 1;
	int fd = memfd_create("store", MFD_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, LENGTH) == 0);
	CHECK(uf_pager_create(&po, &pager) == 0);
	struct uf_memory_options o = {
		.name = "stress",
		.nbytes = LENGTH,
		.block = block = block_size,
		.source = UF_SOURCE_FILE,
		.fd = fd,
		.budget = BUDGET,
		.store = store,
		.write_unit = unit,
	};
	test_memory_source(pager, &o, &memory);
	pages = uf_memory_address(memory);
	memset(seen, 0, sizeof(seen));
	memset(others, 0, sizeof(others));
	memset(begun, 0, sizeof(begun));
	memset(ended, 0, sizeof(ended));
	memset(count_begun, 0, sizeof(count_begun));
	memset(count_ended, 0, sizeof(count_ended));
	atomic_store(&writes, 0);
	atomic_store(&failures, 0);
	atomic_store(&trouble, true);
	test_crowd_start(&c, THREADS, writer, NULL);
	test_crowd_start(&d, 2, flusher, NULL);
	// Where all is slow, some of it is rare.
	uint64_t end = uf_now_ns() + (uint64_t)(seconds * 1e9), latest = end + 20000000000;
	do {
		test_crowd_work(&c, 50, "writers");
		poll(NULL, 0, 20);
		if (forks) {
			int status = test_in_child(child_checks, NULL);
			CHECK(status == 0, "a child: status %#x", status);
		}
	} while (uf_now_ns() < end || (!enough() && uf_now_ns() < latest));
	test_crowd_stop(&c, "writers");
	test_crowd_stop(&d, "flush and evict");
	finish_and_check(fd, store, no_move);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	const char *only = argc == 2 ? argv[1] : NULL;
	bool forks = !TEST_TSAN; // see test_fork.c
	if (RUN("file"))
		stress(false, UF_STORE_SOURCE, 65536, 0, false);
	if (RUN("scratch"))
		stress(false, UF_STORE_SCRATCH, 16384, 65536, forks);
	if (RUN("file_copied"))
		stress(true, UF_STORE_SOURCE, 16384, 65536, false);
	if (RUN("scratch_copied"))
		stress(true, UF_STORE_SCRATCH, 65536, 0, forks);
	return 0;
}
