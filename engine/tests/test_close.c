// SPDX-License-Identifier: Apache-2.0
// A memory that closes: who waits in it or comes later dies with SIGSEGV, system calls fail, nobody reads zeros or hangs,
// nothing is left; and its source may go when uf_memory_destroy has returned.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>

#include "support.h"

enum { BLOCK = 65536, LENGTH = 16 << 20, BLOCKS = LENGTH / BLOCK };
enum kind { MEMORY, DISK, TMPFS, WORKER, SLOW, KINDS };

static struct uf_pager *pager;
static int disk, tmpfs;
static uint32_t ok, slow;

static struct uf_memory *create(enum kind kind, uint64_t block, uint64_t budget)
{
	struct uf_memory_options o = {.name = "closing", .nbytes = LENGTH, .block = block, .budget = budget};
	o.source = kind == MEMORY ? UF_SOURCE_MEMORY : kind >= WORKER ? UF_SOURCE_WORKER : UF_SOURCE_FILE;
	o.address = test_reference(LENGTH);
	o.fd = kind == DISK ? disk : tmpfs;
	o.source_id = kind == SLOW ? slow : ok;
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	return m;
}

// --- threads that wait in a fault

struct blocked {
	struct uf_memory *m;
	const uint8_t *at;
	int pipe;
};

static void blocked_thread(struct test_crowd *c, int number)
{
	struct blocked *b = c->arg;
	if (number == 0) {
		ssize_t n = write(b->pipe, b->at + 7 * BLOCK, 64);
		CHECK(n == -1 && errno == EFAULT, "write(2) from a closed memory: %zd, %s", n, strerror(errno));
		return;
	}
	// Two threads a block, and a thread beyond what one batch of messages or the jobs hold.
	int sig = test_touch_right(b->at, (uint64_t)(number / 2) * BLOCK + 333);
	CHECK(sig == SIGSEGV, "thread %d: signal %d", number, sig);
}

struct faults {
	struct uf_memory *m;
	uint64_t n;
};

static bool faulted(void *arg)
{
	struct faults *f = arg;
	struct uf_stats s = test_stats(f->m);
	return s.faults + s.duplicates >= f->n;
}

static void waiting(int threads)
{
	struct uf_pager_options o = test_options(1 << 30);
	struct uf_pager *p;
	CHECK(uf_pager_create(&o, &p) == 0);
	uint32_t hang = test_worker_source(p, "hang");
	struct uf_memory_options mo = {.nbytes = LENGTH, .source = UF_SOURCE_WORKER, .source_id = hang, .no_readahead = true};
	struct uf_memory *m;
	static struct test_crowd c;
	int fds[2];
	CHECK(pipe(fds) == 0);
	test_memory_source(p, &mo, &m);
	struct blocked b = {m, uf_memory_address(m), fds[1]};
	test_crowd_start(&c, threads, blocked_thread, &b);
	// Of two threads of a block, one may come when nobody can tell (its fault waits for a job): the first ones do.
	struct faults f = {m, threads > 64 ? 64 : (uint64_t)threads};
	CHECK(test_wait(faulted, &f), "%llu faults", (unsigned long long)test_stats(m).faults);
	uf_memory_close(m);
	test_crowd_join(&c, "threads in a closed memory");
	struct uf_failure why;
	CHECK(uf_memory_prefetch(m, 0, 1, true, &why) == -EBADF && uf_memory_prefetch(m, 0, 1, false, &why) == -EBADF);
	CHECK(uf_memory_evict(m, 0, BLOCKS) == 0);
	CHECK(test_touch_right(b.at, LENGTH - 1) == SIGSEGV && test_touch_right(b.at, 0) == SIGSEGV);
	CHECK(test_poke((uint8_t *)b.at) == SIGSEGV);
	CHECK(test_pager_stats(p).resident == 0 && test_pager_stats(p).memories == 0);
	uf_memory_close(m);
	uf_memory_destroy(m);
	close(fds[0]);
	close(fds[1]);
	CHECK(uf_source_drop(p, hang) == 0);
	test_settle(p);
	test_end(p);
}

// --- readers at any moment

static void until_closed(struct test_crowd *c, int number)
{
	const uint8_t *at = c->arg;
	uint64_t r = 88172645463325252u + (uint64_t)number * 1237;
	int sig;
	do
		atomic_fetch_add(&c->work, 1);
	while (!(sig = test_touch_right(at, test_random(&r) % LENGTH)));
	CHECK(sig == SIGSEGV, "signal %d", sig);
}

static void whole(struct test_crowd *c, int number)
{
	CHECK(test_differs(c->arg, 0, LENGTH) == UINT64_MAX, "thread %d", number);
}

// Closes under load, with reads of all sorts under way, and takes the addresses for the next memory at once.
static void under_load(void)
{
	static struct test_crowd c, d;
	struct uf_failure why;
	uint64_t r = 4711;
	for (int round = 0; round < test_rounds(TEST_TSAN ? 20 : 60); round++) {
		enum kind kind = (enum kind)(round % KINDS);
		struct uf_memory *m = create(kind, round % 3 ? BLOCK : 4096, round % 2 ? 2 << 20 : 0);
		test_crowd_start(&c, 4, until_closed, uf_memory_address(m));
		test_crowd_work(&c, test_random(&r) % (kind == SLOW ? 50 : 1500), "readers");
		if (round % 4 < 2)
			uf_memory_prefetch(m, 0, UINT32_MAX, false, &why);
		uf_memory_close(m);
		test_crowd_join(&c, "readers of a closed memory");
		CHECK(test_touch_right(uf_memory_address(m), 4096) == SIGSEGV);
		uf_memory_destroy(m);

		// In flight when it goes: nobody reads, the pager does.
		struct uf_memory *gone[3];
		for (int i = 0; i < 3; i++) {
			gone[i] = create((enum kind)((round + i) % KINDS), BLOCK, 0);
			uf_memory_prefetch(gone[i], 0, UINT32_MAX, false, &why);
		}
		CHECK(test_touch_right(uf_memory_address(gone[1]), 5 * BLOCK) == 0);
		for (int i = 0; i < 3; i++)
			uf_memory_destroy(gone[i]);
		m = create((enum kind)(test_random(&r) % SLOW), BLOCK, round % 2 ? 0 : 4 << 20);
		test_crowd_start(&d, 2, whole, uf_memory_address(m));
		test_crowd_join(&d, "readers of the next memory");
		uf_memory_destroy(m);
	}
}

// --- close during an explicit prefetch

struct prefetch {
	struct uf_memory *m;
	int err;
};

static void prefetch_thread(struct test_crowd *c, int number)
{
	struct prefetch *f = c->arg;
	struct uf_failure why;
	f[number].err = uf_memory_prefetch(f[number].m, 0, BLOCKS, true, &why);
	atomic_fetch_add(&c->work, 1);
}

static bool some_begun(void *arg)
{
	return test_state(arg, 0) != UF_ABSENT;
}

static void during_prefetch(void)
{
	static struct test_crowd c;
	int closed = 0;
	// Slow enough that the memory is closed while it is read, however busy the machine.
	uint32_t was = slow;
	slow = test_worker_source(pager, "slow:100000");
	for (int round = 0; round < test_rounds(40); round++) {
		enum kind kind = (enum kind)(round % KINDS);
		struct uf_memory *m = create(kind, 4096, 0);
		struct prefetch f[2] = {{m, 0}, {m, 0}};
		test_crowd_start(&c, 2, prefetch_thread, f);
		CHECK(test_wait(some_begun, m));
		uf_memory_close(m);
		test_crowd_join(&c, "prefetch of a closed memory");
		for (int i = 0; i < 2; i++) {
			CHECK(f[i].err == -EBADF || f[i].err == 0, "%s", strerror(-f[i].err));
			closed += f[i].err == -EBADF;
		}
		uf_memory_destroy(m);
	}
	CHECK(closed > 0, "none of the prefetches was cut short");
	CHECK(uf_source_drop(pager, slow) == 0);
	slow = was;
}

// A prefetch waits for a read that hangs: closing ends it, not the deadline.
static void during_hanging_prefetch(void)
{
	struct uf_pager *p = test_pager(1 << 30);
	uint32_t hang = test_worker_source(p, "hang");
	struct uf_memory_options o = {.nbytes = LENGTH, .source = UF_SOURCE_WORKER, .source_id = hang};
	struct prefetch f = {0};
	static struct test_crowd c;
	test_memory_source(p, &o, &f.m);
	test_crowd_start(&c, 1, prefetch_thread, &f);
	struct pollfd none;
	for (int i = 0; i < 5000 && test_state(f.m, 0) != UF_LOADING; i++)
		poll(&none, 0, 1);
	uf_memory_close(f.m);
	test_crowd_join(&c, "prefetch of a closed memory whose worker hangs");
	CHECK(f.err == -EBADF, "%s", strerror(-f.err));
	uf_memory_destroy(f.m);
	CHECK(uf_source_drop(p, hang) == 0);
	test_settle(p);
	test_end(p);
}

// --- the source goes when the memory is gone

static void source_gone(void)
{
	const uint64_t length = (8 << 20) + 77; // the last block is copied by way of the staging area
	struct uf_failure why;
	for (int round = 0; round < test_rounds(TEST_TSAN ? 60 : 300); round++) {
		uint8_t *copy = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(copy != MAP_FAILED);
		memset(copy, 7, length);
		struct uf_memory_options o = {.nbytes = length, .source = UF_SOURCE_MEMORY, .address = copy};
		o.block = round % 2 ? BLOCK : 2 << 20;
		struct uf_memory *m;
		test_memory_source(pager, &o, &m);
		CHECK(uf_memory_prefetch(m, 0, UINT32_MAX, false, &why) == 0);
		uint64_t wanted = (uint64_t)(round % 5);
		while (test_stats(m).blocks_prefetch < wanted)
			sched_yield();
		uf_memory_destroy(m);
		munmap(copy, length);
	}
}

// --- nothing is left

static void rounds(void)
{
	int fds = 0, threads = 0, mappings = 0;
	for (int round = 0; round < 50 + test_rounds(500); round++) {
		if (round == 50) {
			fds = test_fd_count();
			threads = test_thread_count();
			mappings = test_mappings();
		}
		struct uf_memory_options o = {.nbytes = 1 << 20, .budget = round % 2 ? 512 << 10 : 0, .reserved = 4096};
		enum kind kind = (enum kind)(round % SLOW);
		o.source = kind == MEMORY ? UF_SOURCE_MEMORY : kind == WORKER ? UF_SOURCE_WORKER : UF_SOURCE_FILE;
		o.address = test_reference(LENGTH);
		o.fd = kind == DISK ? disk : tmpfs;
		o.source_id = ok;
		struct uf_memory *m;
		test_memory_source(pager, &o, &m);
		CHECK(uf_memory_trace(m, 1000) == 0);
		CHECK(test_touch_right(uf_memory_address(m), (uint64_t)round * 999 % (1 << 20)) == 0);
		struct uf_pager_stats s = test_pager_stats(pager);
		CHECK(s.memories == 1 && s.reserved == 4096 && s.resident >= BLOCK);
		if (round % 3)
			uf_memory_close(m);
		uf_memory_destroy(m);
		s = test_pager_stats(pager);
		CHECK(s.memories == 0 && s.reserved == 0, "%llu", (unsigned long long)s.reserved);
	}
	CHECK(test_fd_count() <= fds + 2, "%d descriptors, %d before", test_fd_count(), fds);
	CHECK(test_threads_left(threads), "%d threads, %d before", test_thread_count(), threads);
	CHECK(test_mappings() <= mappings + 8, "%d mappings, %d before", test_mappings(), mappings);
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
	if (RUN("waiting")) {
		waiting(7);
		waiting(100);
	}
	pager = test_pager(1 << 30);
	ok = test_worker_source(pager, "ok");
	slow = test_worker_source(pager, "slow:3000");
	if (RUN("under_load"))
		under_load();
	if (RUN("during_prefetch"))
		during_prefetch();
	if (RUN("source_gone"))
		source_gone();
	if (RUN("rounds"))
		rounds();
	CHECK(uf_source_drop(pager, ok) == 0 && uf_source_drop(pager, slow) == 0);
	test_settle(pager);
	test_end(pager);
	CHECK(test_threads_left(test_base_threads()));
	if (RUN("during_hanging_prefetch"))
		during_hanging_prefetch();
	return 0;
}
