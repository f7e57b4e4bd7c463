// SPDX-License-Identifier: Apache-2.0
// Fork of writable memory: the child sees what the parent had written, wherever it was at that moment; both write on, and
// neither sees the other's. What is written back is the parent's alone.
#include <poll.h>

#include "writing.h"

enum { BLOCK = 65536, LENGTH = 4 << 20, BLOCKS = LENGTH / BLOCK };

static atomic_bool slow;

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
	while (atomic_load(&slow))
		usleep(1000);
	return pwrite64(fd, bytes, n, at);
}

static void child_writes(void *arg)
{
	struct array *a = arg;
	atomic_store(&slow, false);
	array_right(a, "in the child");
	CHECK(uf_memory_forked(a->m));
	struct uf_failure why;
	uint32_t n;
	CHECK(uf_memory_flush(a->m, 0, a->blocks, &why, 1, &n) == -EPERM);
	for (uint64_t b = 0; b < a->blocks; b++)
		array_write(a, b * a->block + 100, 2000, (int)(b % 3), b + (uint64_t)getpid());
	array_right(a, "the child's own");
	uf_memory_evict(a->m, 0, a->blocks);
	array_right(a, "the child's own, evicted");
	for (uint64_t b = 0; b < a->blocks; b += 3)
		array_write(a, b * a->block, 5000, 1, b + (uint64_t)getpid());
	uf_memory_evict(a->m, 0, a->blocks);
	array_right(a, "the child's own, evicted twice");
}

// The parent's flush, which waited for a slot when the child was made, keeps nothing from leaving memory in the child.
static void child_keeps_its_budget(void *arg)
{
	struct array *a = arg;
	for (uint64_t b = 0; b < a->blocks; b++)
		array_write(a, b * a->block, 2000, 1, b + 7);
	struct uf_stats s = test_stats(a->m);
	CHECK(s.resident <= s.budget, "%llu bytes are resident", (unsigned long long)s.resident);
	array_right(a, "the child's, within its budget");
}

static void fork_once(struct array *a, const char *when)
{
	int status = test_in_child(child_writes, a);
	CHECK(status == 0, "%s: status %#x", when, status);
	array_right(a, when);
	CHECK(!uf_memory_forked(a->m));
}

static void flush_thread(struct test_crowd *c, int number)
{
	struct uf_failure why;
	uint32_t n;
	CHECK(number || uf_memory_flush(c->arg, 0, UINT64_MAX, &why, 1, &n) == 0, "%s", why.message);
	if (number)
		uf_memory_evict(c->arg, 0, BLOCKS / 2);
}

static bool some_leave(void *arg)
{
	struct uf_memory *m = arg;
	for (uint64_t b = 0; b < m->nblocks; b++)
		if (test_state(m, b) == UF_WRITING || test_state(m, b) == UF_RESTORED)
			return true;
	return false;
}

static void forks(bool no_move, enum uf_store_kind store, uint64_t budget)
{
	struct uf_pager_options po = test_options(1 << 30);
	po.no_move = no_move;
	struct uf_pager *p;
	CHECK(uf_pager_create(&po, &p) == 0);
	int fd = memfd_create("file", MFD_CLOEXEC);
	CHECK(fd >= 0 && pwrite(fd, test_reference(LENGTH), LENGTH, 0) == LENGTH);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd, .store = store, .budget = budget};
	struct array a = array_of(p, o, test_reference(LENGTH));
	fork_once(&a, "nothing was written yet");
	for (uint64_t b = 0; b < BLOCKS; b += 2)
		array_write(&a, b * BLOCK, 3000, (int)(b / 2 % 3), b);
	fork_once(&a, "dirty");
	uf_memory_evict(a.m, 0, BLOCKS / 2);
	fork_once(&a, "half of it spilled");
	if (budget) {
		pthread_mutex_lock(&p->lock);
		a.m->flush_waits = true;
		pthread_mutex_unlock(&p->lock);
		int waited = test_in_child(child_keeps_its_budget, &a);
		pthread_mutex_lock(&p->lock);
		a.m->flush_waits = false;
		pthread_mutex_unlock(&p->lock);
		CHECK(waited == 0, "status %#x", waited);
	}
	for (uint64_t b = 1; b < BLOCKS; b += 3)
		array_write(&a, b * BLOCK + 4000, 3000, 1, b);
	static struct test_crowd c;
	atomic_store(&slow, true);
	test_crowd_start(&c, 1, flush_thread, a.m);
	bool there = test_wait(some_leave, a.m);
	int status = test_in_child(child_writes, &a); // its bytes are in slots, and nowhere else
	atomic_store(&slow, false);
	test_crowd_join(&c, "flush");
	CHECK(there && status == 0, "status %#x", status);
	array_right(&a, "in flight");
	// More forks than there are scratch files, each with something new spilled between them that stays there.
	for (uint64_t i = 0; i < (uint64_t)test_rounds(24); i++) {
		array_write(&a, i % BLOCKS * BLOCK, 4000, 1, i);
		uf_memory_evict(a.m, i % BLOCKS, 1);
		CHECK(test_state(a.m, i % BLOCKS) == UF_ABSENT, "after %llu forks nothing can leave any more", (unsigned long long)i);
		fork_once(&a, "once more");
	}
	flush_well(&a, "the parent's");
	if (store != UF_STORE_SOURCE)
		memcpy(a.want, test_reference(LENGTH), LENGTH);
	file_right(&a, fd, "the parent's alone");
	array_end(&a);
	close(fd);
	test_settle(p);
	test_end(p);
}

// Parent and child spill the same blocks, by turns. Neither may see the other's, whether or not there was a scratch file with
// something in it when they parted.
static void together(bool spilled_before)
{
	struct uf_pager *p = test_pager(1 << 30);
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_ZERO, .store = UF_STORE_SCRATCH};
	struct array a = array_of(p, o, NULL);
	if (spilled_before) {
		array_write(&a, 0, LENGTH, 1, 1);
		uf_memory_evict(a.m, 0, BLOCKS);
	}
	int to_child[2], to_parent[2];
	char turn = 0;
	CHECK(pipe(to_child) == 0 && pipe(to_parent) == 0);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (!pid)
		alarm(60);
	close(pid ? to_child[0] : to_child[1]); // so that the end of the other side is seen
	close(pid ? to_parent[1] : to_parent[0]);
	for (uint64_t round = 0; round < 3; round++) {
		if (pid || round)
			CHECK(read(pid ? to_parent[0] : to_child[0], &turn, 1) == 1, "the other side died");
		array_right(&a, pid ? "parent" : "child");
		for (uint64_t b = 0; b < BLOCKS; b++)
			array_write(&a, b * BLOCK, BLOCK, (int)((b + round) % 2), b + round * 100 + (pid ? 50 : 0));
		uf_memory_evict(a.m, 0, BLOCKS);
		CHECK(write(pid ? to_child[1] : to_parent[1], &turn, 1) == 1);
	}
	if (!pid) {
		CHECK(read(to_child[0], &turn, 1) == 1);
		array_right(&a, "the child in the end");
		_exit(0);
	}
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0, "%#x", status);
	array_right(&a, "the parent in the end");
	close(to_child[1]);
	close(to_parent[0]);
	array_end(&a);
	test_settle(p);
	test_end(p);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	test_reference(LENGTH);
	const char *only = argc == 2 ? argv[1] : NULL;
	if (RUN("together")) {
		together(true);
		together(false);
	}
	if (RUN("file"))
		forks(false, UF_STORE_SOURCE, 0);
	if (RUN("scratch"))
		forks(false, UF_STORE_SCRATCH, 0);
	if (RUN("scratch_budget"))
		forks(false, UF_STORE_SCRATCH, 1 << 20);
	if (RUN("file_copied"))
		forks(true, UF_STORE_SOURCE, 1 << 20);
	if (RUN("scratch_copied"))
		forks(true, UF_STORE_SCRATCH, 0);
	return 0;
}
