// SPDX-License-Identifier: Apache-2.0
// Fork at any moment: parent and child read right bytes from every memory, or die of a signal; never zeros, never a hang.
// The budget holds in the child too, and its workers end with it.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "support.h"

// ThreadSanitizer (of gcc 12) does not forget all of the parent's threads in a forked child: a thread started there may get
// the stack, and so the id, of one that it believes to be there still, and the child dies of "dup thread with used id". It
// does so reliably in the parts that start threads in a child a second time, or after a thread of the parent has just
// ended: these run without ThreadSanitizer only.
enum { TSAN_STUMBLES = TEST_TSAN };

// AddressSanitizer's allocator (of gcc 12) has locks that it does not take before a fork, as glibc's malloc does: if another
// thread allocates, frees, begins or ends at that moment, they stay held in the child for ever. What cannot be tested
// without such threads runs without AddressSanitizer only.
enum { ASAN_STUMBLES = TEST_ASAN };

enum { LENGTH = 6 << 20, MEMORIES = 6 };

static struct uf_pager *pager;
static struct uf_memory *memories[MEMORIES];
static const uint64_t block_of[MEMORIES] = {65536, 65536, 4096, 65536, 16384, 262144};
static const uint64_t budget_of[MEMORIES] = {0, 0, 0, 0, 1 << 20, 2 << 20};
static int disk, tmpfs;
static uint32_t ok;
static bool others; // there are memories besides these

static struct uf_memory *create(int kind, uint64_t block, uint64_t budget)
{
	struct uf_memory_options o = {.name = "forked", .nbytes = LENGTH, .block = block, .budget = budget};
	o.source = kind == 0 ? UF_SOURCE_MEMORY : kind == 3 ? UF_SOURCE_WORKER : UF_SOURCE_FILE;
	o.address = test_reference(LENGTH);
	o.fd = kind == 1 ? disk : tmpfs;
	o.source_id = ok;
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	return m;
}

static void begin(uint64_t limit)
{
	pager = test_pager(limit);
	ok = test_worker_source(pager, "ok");
	for (int i = 0; i < MEMORIES; i++)
		memories[i] = create(i % 4, block_of[i], budget_of[i]);
}

static void end(void)
{
	for (int i = 0; i < MEMORIES; i++)
		uf_memory_destroy(memories[i]);
	CHECK(uf_source_drop(pager, ok) == 0);
	test_settle(pager);
	test_end(pager);
	CHECK(test_threads_left(test_base_threads()));
}

static void check_budgets(void)
{
	struct uf_pager_stats s = test_pager_stats(pager);
	CHECK(s.resident <= s.limit, "%llu resident", (unsigned long long)s.resident);
	for (int i = 0; i < MEMORIES; i++) {
		struct uf_stats m = test_stats(memories[i]);
		CHECK(m.errors == 0 && m.poisoned == 0, "%s", m.errlog[0].message);
		if (budget_of[i])
			CHECK(m.resident <= budget_of[i], "%llu", (unsigned long long)m.resident);
	}
}

// The pager's count is the sum of its memories', once it has made the room that it wants.
static bool quiet(void *arg)
{
	(void)arg;
	uint64_t sum = 0;
	for (int i = 0; i < MEMORIES; i++)
		sum += test_stats(memories[i]).resident;
	uint64_t resident = test_pager_stats(pager).resident;
	return (others || sum == resident) && resident <= test_pager_stats(pager).limit;
}

static bool empty(void *arg)
{
	(void)arg;
	for (int i = 0; i < MEMORIES; i++) // background fills may still bring some
		uf_memory_evict(memories[i], 0, LENGTH / block_of[i]);
	return test_pager_stats(pager).resident == 0;
}

// Looks at every byte of every memory; `depth` times as a child's child.
static void child_checks(void *arg)
{
	int depth = *(int *)arg - 1;
	for (int i = 0; i < MEMORIES; i++) {
		int k = (i + depth) % MEMORIES;
		uint64_t wrong = test_differs(uf_memory_address(memories[k]), 0, LENGTH);
		CHECK(wrong == UINT64_MAX, "memory %d: byte %llu is wrong in the child", k, (unsigned long long)wrong);
	}
	CHECK(test_wait(quiet, NULL));
	check_budgets();
	// What threads of the parent had reserved for reads under way is not counted here.
	if (!others)
		CHECK(test_wait(empty, NULL), "%llu bytes stay counted", (unsigned long long)test_pager_stats(pager).resident);
	if (depth > 0) {
		int status = test_in_child(child_checks, &depth);
		CHECK(status == 0, "the child's child: status %#x", status);
		CHECK(test_differs(uf_memory_address(memories[0]), 0, LENGTH) == UINT64_MAX, "after its child");
	}
}

static void reader(struct test_crowd *c, int number)
{
	uint64_t r = 88172645463325252u + (uint64_t)number * 7919;
	while (!atomic_load(&c->stop)) {
		int i = (int)(test_random(&r) % MEMORIES);
		uint64_t k = test_random(&r) % (LENGTH - 100);
		CHECK(test_differs((char *)uf_memory_address(memories[i]) + k, k, 100) == UINT64_MAX, "memory %d, byte %llu", i,
		      (unsigned long long)k);
		atomic_fetch_add(&c->work, 1);
	}
}

// Besides: prefetch, eviction, memories that come and go.
static void busybody(struct test_crowd *c, int number)
{
	uint64_t r = 99 + (uint64_t)number;
	struct uf_failure why;
	while (!atomic_load(&c->stop)) {
		int i = (int)(test_random(&r) % MEMORIES);
		uint64_t first = test_random(&r) % (LENGTH / block_of[i]);
		switch (test_random(&r) % (ASAN_STUMBLES ? 3 : 4)) {
		case 0:
			CHECK(uf_memory_prefetch(memories[i], first, 40, true, &why) == 0, "%s", why.message);
			break;
		case 1:
			CHECK(uf_memory_prefetch(memories[i], first, 40, false, &why) == 0);
			break;
		case 2:
			uf_memory_evict(memories[i], first, 100);
			break;
		default: {
			struct uf_memory *m = create((int)(test_random(&r) % 4), 65536, test_random(&r) % 2 << 20);
			uf_memory_prefetch(m, 0, 1000, false, &why);
			CHECK(test_touch_right(uf_memory_address(m), test_random(&r) % LENGTH) == 0);
			uf_memory_destroy(m);
		}
		}
		atomic_fetch_add(&c->work, 1);
	}
}

static void while_faulting(int rounds, bool busy)
{
	static struct test_crowd c, d;
	begin(10 << 20);
	others = busy;
	test_crowd_start(&c, 4, reader, NULL);
	if (busy)
		test_crowd_start(&d, 1, busybody, NULL);
	for (int i = 0; i < rounds; i++) {
		test_crowd_work(&c, 20, "the parent's readers");
		int depth = i % 5 ? 1 : 2;
		int status = test_in_child(child_checks, &depth);
		CHECK(status == 0, "round %d: status %#x", i, status);
	}
	test_crowd_stop(&c, "the parent's readers");
	if (busy)
		test_crowd_stop(&d, "the parent's busybody");
	others = false;
	for (int i = 0; i < MEMORIES; i++)
		CHECK(test_differs(uf_memory_address(memories[i]), 0, LENGTH) == UINT64_MAX);
	CHECK(test_wait(quiet, NULL));
	check_budgets();
	end();
}

static void nothing(void *arg)
{
	(void)arg;
}

// Ends everything properly, and nothing is left; then begins anew.
static void child_ends(void *arg)
{
	(void)arg;
	pid_t pids[16];
	CHECK(test_touch_right(uf_memory_address(memories[3]), 77) == 0);
	CHECK(uf_pager_shutdown(pager) == -EBUSY);
	for (int i = 0; i < MEMORIES; i++)
		uf_memory_destroy(memories[i]);
	CHECK(uf_source_drop(pager, ok) == 0);
	CHECK(uf_pager_shutdown(pager) == 0);
	CHECK(test_threads_left(test_base_threads()) && test_children(pids, 16) == 0);
	ok = test_worker_source(pager, "ok");
	for (int i = 0; i < 4; i++) {
		struct uf_memory *m = create(i, 65536, 0);
		CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
		uf_memory_destroy(m);
	}
	CHECK(uf_source_drop(pager, ok) == 0);
	test_settle(pager);
	test_end(pager);
}

// Leaves without a word while its workers run; the program collects what its children leave (a subreaper).
static pid_t *told;

static void child_leaves(void *arg)
{
	(void)arg;
	uf_memory_evict(memories[3], 0, UINT32_MAX);
	CHECK(test_touch_right(uf_memory_address(memories[3]), 4 << 20) == 0);
	CHECK(test_children(told, 16) > 0);
}

static bool orphans_gone(void *arg)
{
	(void)arg;
	for (int i = 0; i < 16; i++) {
		if (told[i] && waitpid(told[i], NULL, WNOHANG) == 0)
			return false;
		told[i] = 0;
	}
	return true;
}

static void closed_in_child(void *arg)
{
	const uint8_t *at = arg;
	CHECK(test_touch_right(at, 0) == SIGSEGV && test_touch_right(at, LENGTH - 1) == SIGSEGV);
	CHECK(test_touch_right(at, LENGTH / 2 + 9) == SIGSEGV);
}

static void closes_in_child(void *arg)
{
	struct uf_memory *m = arg;
	CHECK(test_touch_right(uf_memory_address(m), 5) == 0);
	uf_memory_close(m);
	CHECK(test_touch_right(uf_memory_address(m), 5) == SIGSEGV);
	uf_memory_destroy(m);
}

// No descriptor is left for the child's own userfaultfd.
static void no_descriptors(void *arg)
{
	(void)arg;
	for (int i = 0; i < MEMORIES; i++)
		for (uint64_t k = 0; k < LENGTH; k += 65536)
			CHECK(test_touch_right(uf_memory_address(memories[i]), k) == SIGSEGV, "memory %d, byte %llu", i,
			      (unsigned long long)k);
	alarm(20);
	for (int i = 0; i < MEMORIES; i++)
		uf_memory_destroy(memories[i]);
	CHECK(uf_source_drop(pager, ok) == 0);
	CHECK(uf_pager_shutdown(pager) == 0);
}

static void when_idle(void)
{
	CHECK(test_in_child(nothing, NULL) == 0); // no pager yet
	begin(1 << 30);
	CHECK(test_in_child(nothing, NULL) == 0);
	pid_t pid = fork();
	if (!pid)
		exit(0); // with exit handlers
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0, "%#x", status);
	int depth = 3;
	CHECK(test_in_child(child_checks, &depth) == 0, "nothing was read yet");
	for (int i = 0; i < MEMORIES; i++)
		CHECK(test_differs(uf_memory_address(memories[i]), 0, LENGTH) == UINT64_MAX);
	CHECK(test_in_child(child_checks, &depth) == 0, "all was read");
	if (!TSAN_STUMBLES)
		CHECK(test_in_child(child_ends, NULL) == 0);

	told = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
	CHECK(test_in_child(child_leaves, NULL) == 0 && told[0]);
	CHECK(test_wait(orphans_gone, NULL), "a child's workers live on");
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 0) == 0);

	struct uf_memory *m = create(0, 65536, 0);
	CHECK(test_touch_right(uf_memory_address(m), 0) == 0);
	uf_memory_close(m);
	CHECK(test_in_child(closed_in_child, uf_memory_address(m)) == 0);
	uf_memory_destroy(m);
	m = create(3, 65536, 1 << 20);
	CHECK(test_in_child(closes_in_child, m) == 0);
	CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX, "the child closed its own only");
	uf_memory_destroy(m);

	struct rlimit old, none;
	CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
	none = old;
	none.rlim_cur = 3;
	test_log_begin();
	setrlimit(RLIMIT_NOFILE, &none);
	status = test_in_child(no_descriptors, NULL);
	setrlimit(RLIMIT_NOFILE, &old);
	char *log = test_log_end();
	CHECK(status == 0, "%#x\n%s", status, log);
	CHECK(test_count(log, "SIGSEGV") == MEMORIES, "%s", log);
	free(log);
	end();
}

// The parent's memories close while it forks. In the child they are closed, and its counts are right: it can end.
enum { CLOSING = 24 };
static struct uf_memory *closing[CLOSING];

static void closer(struct test_crowd *c, int number)
{
	(void)number;
	for (int i = 0; i < CLOSING; i++) {
		uf_memory_close(closing[i]);
		atomic_fetch_add(&c->work, 1);
	}
}

static void child_of_closing(void *arg)
{
	struct uf_memory *kept = arg;
	CHECK(test_differs(uf_memory_address(kept), 0, LENGTH) == UINT64_MAX);
	for (int i = 0; i < CLOSING; i++) {
		int there = test_touch_right(uf_memory_address(closing[i]), 65536);
		int absent = test_touch_right(uf_memory_address(closing[i]), LENGTH - 5);
		CHECK((there == 0 || there == SIGSEGV) && (absent == 0 || absent == SIGSEGV), "%d %d", there, absent);
		uf_memory_destroy(closing[i]);
	}
	CHECK(test_pager_stats(pager).memories == 1);
	uf_memory_destroy(kept);
	CHECK(uf_source_drop(pager, ok) == 0);
	int err = uf_pager_shutdown(pager);
	CHECK(err == 0, "all is closed: %s", strerror(-err));
}

static void while_closing(void)
{
	static struct test_crowd c;
	pager = test_pager(1 << 30);
	ok = test_worker_source(pager, "ok");
	for (int round = 0; round < test_rounds(40); round++) {
		struct uf_memory *kept = create(round % 4, 65536, 0);
		for (int i = 0; i < CLOSING; i++) {
			closing[i] = create(i % 4, 4096, 0);
			struct uf_failure why;
			if (i % 4 != 3)
				CHECK(uf_memory_prefetch(closing[i], 0, 200, true, &why) == 0);
		}
		test_crowd_start(&c, 1, closer, NULL);
		while (atomic_load(&c.work) < (unsigned long)(round % CLOSING))
			sched_yield();
		int status = test_in_child(child_of_closing, kept);
		CHECK(status == 0, "round %d: %#x", round, status);
		test_crowd_join(&c, "closing");
		for (int i = 0; i < CLOSING; i++)
			uf_memory_destroy(closing[i]);
		uf_memory_destroy(kept);
	}
	CHECK(uf_source_drop(pager, ok) == 0);
	test_settle(pager);
	test_end(pager);
}

// Two threads fork at the same time.
static void forker(struct test_crowd *c, int number)
{
	(void)c;
	for (int i = 0; i < 5; i++) {
		int depth = 1;
		int status = test_in_child(child_checks, &depth);
		CHECK(status == 0, "thread %d: %#x", number, status);
	}
}

static void from_threads(void)
{
	static struct test_crowd c, d;
	begin(10 << 20);
	test_crowd_start(&c, 2, reader, NULL);
	test_crowd_start(&d, 2, forker, NULL);
	test_crowd_join(&d, "forks");
	test_crowd_stop(&c, "readers");
	end();
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
	if (RUN("when_idle"))
		when_idle();
	if (RUN("while_faulting"))
		while_faulting(test_rounds(25), false);
	if (RUN("while_busy"))
		while_faulting(test_rounds(25), true);
	// A thread of the child may get the stack, and so the id, of one that ended in the parent while it forked:
	// ThreadSanitizer, whose list of threads the child inherits, then gives up ("dup thread with used id").
	if (!TSAN_STUMBLES && !ASAN_STUMBLES && RUN("while_closing"))
		while_closing();
	if (!ASAN_STUMBLES && RUN("from_threads"))
		from_threads();
	return 0;
}
