// SPDX-License-Identifier: Apache-2.0
// Worker processes: sources that load, fail, hang and die, workers that are killed, and what the program sees of it.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

#include "support.h"

enum { BLOCK = 65536, LENGTH = 8 << 20, BLOCKS = LENGTH / BLOCK };

static char self[4096];

// --- workers of this test, besides those of harness.c

// Takes requests, answers reads rightly; what it does otherwise, its mode says.
static void serve(const char *mode, unsigned number)
{
	struct uf_ring_client *client;
	struct uf_request r;
	int bell = 5;
	if (!strcmp(mode, "--picky") && number == 1)
		_exit(9); // only worker 0 comes up
	if (!strcmp(mode, "--unheard"))
		bell = open("/dev/null", O_WRONLY | O_CLOEXEC);
	CHECK(uf_client_attach(3, 4, bell, number, &client) == 0);
	bool holes = !strcmp(mode, "--holes");
	for (int reads = 0;;) {
		uf_client_take(client, &r);
		if (r.kind == UF_REQUEST_STOP)
			_exit(0);
		if (r.kind == UF_REQUEST_DROP)
			continue;
		if (!strcmp(mode, "--mute"))
			poll(NULL, 0, 3600000); // takes it and never answers
		if (r.kind == UF_REQUEST_LOAD) {
			memcpy(r.buffer, "loaded", 6);
			uf_client_done(client, &r, 6);
			uint64_t one = 1;
			if (!strcmp(mode, "--unheard"))
				CHECK(write(5, &one, 8) == 8); // this one is heard
			continue;
		}
		bool bad = false; // each seventh block cannot be read, alone or in a run
		for (uint64_t k = r.offset; holes && k < r.offset + r.length; k += BLOCK)
			bad |= k / BLOCK % 7 == 0;
		if (bad) {
			uf_client_fail(client, &r, "the test source says no", 0);
			continue;
		}
		test_fill(r.buffer, r.offset, r.length);
		if (!strcmp(mode, "--picky"))
			usleep(50000);
		uf_client_done(client, &r, 0);
		if (!strcmp(mode, "--unheard") && !reads++)
			kill(getpid(), SIGKILL); // between the answer and the bell
	}
}

static struct uf_pager *pager_with(const char *mode, uint64_t deadline_ns, unsigned attempts)
{
	static const char *argv[3];
	argv[0] = self;
	argv[1] = mode;
	struct uf_pager_options o = test_options(1 << 30);
	if (mode)
		o.worker_argv = argv;
	if (deadline_ns)
		o.deadline_ns = deadline_ns;
	if (attempts)
		o.attempts = attempts;
	struct uf_pager *p;
	CHECK(uf_pager_create(&o, &p) == 0);
	return p;
}

static struct uf_memory *memory(struct uf_pager *p, uint32_t source, uint64_t budget, bool readahead)
{
	struct uf_memory_options o = {
		.name = "grid",
		.nbytes = LENGTH,
		.block = BLOCK,
		.source = UF_SOURCE_WORKER,
		.source_id = source,
		.budget = budget,
		.no_readahead = !readahead,
	};
	struct uf_memory *m;
	test_memory_source(p, &o, &m);
	return m;
}

static int load(struct uf_pager *p, uint32_t id, uint64_t timeout_ns, bool *failed, struct uf_failure *why)
{
	void *reply = NULL;
	size_t len = 0;
	int err = uf_source_load(p, id, timeout_ns, &reply, &len, failed, why);
	if (!err)
		CHECK(len == 6 && !memcmp(reply, "loaded", len), "a reply of %zu bytes, failed %d: %.40s", len, *failed, (char *)reply);
	free(reply);
	return err;
}

// --- loading

static void loads(void)
{
	struct uf_pager *p = pager_with(NULL, 0, 0);
	struct uf_failure why;
	bool failed = false;
	uint32_t id;
	void *reply;
	size_t len;

	CHECK(uf_source_add(p, "bad", 3, &id) == 0);
	CHECK(uf_source_load(p, id, 20000000000u, &reply, &len, &failed, &why) == 0);
	CHECK(failed && len == 13 && !memcmp(reply, "no such thing", 13) && !strcmp(why.message, "cannot load"), "%s", why.message);
	free(reply);
	CHECK(uf_source_drop(p, id) == 0);

	test_log_begin();
	CHECK(uf_source_add(p, "silent", 6, &id) == 0);
	int err = load(p, id, 20000000000u, &failed, &why);
	free(test_log_end());
	CHECK(err == -ECHILD && why.err == err && strstr(why.message, "exit status 3"), "%d %s", err, why.message);
	CHECK(uf_source_drop(p, id) == 0);
	CHECK(uf_source_drop(p, id) == -EINVAL && uf_source_drop(p, 5000) == -EINVAL);
	CHECK(uf_source_configure(p, id, true, 1) == -EINVAL);
	CHECK(load(p, id, 1000000000, &failed, &why) == -EINVAL);

	id = test_worker_source(p, "ok"); // a worker comes up again
	CHECK(uf_source_configure(p, id, true, 1 << 20) == 0);
	CHECK(uf_pager_shutdown(p) == -EBUSY, "a source lives");
	struct uf_memory *m = memory(p, id, 0, true);
	CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
	CHECK(uf_pager_shutdown(p) == -EBUSY);
	uf_memory_destroy(m);
	CHECK(uf_pager_shutdown(p) == -EBUSY);
	CHECK(uf_source_drop(p, id) == 0);
	CHECK(uf_pager_shutdown(p) == 0 && uf_pager_shutdown(p) == 0);
	test_settle(p);
	test_end(p);
}

static void load_thread(struct test_crowd *c, int number)
{
	struct uf_failure why;
	bool failed = false;
	uint32_t id;
	CHECK(uf_source_add(c->arg, "ok", 2, &id) == 0);
	int err = load(c->arg, id, 60000000000u, &failed, &why);
	CHECK(err == 0 && !failed, "thread %d: %s", number, why.message);
	CHECK(uf_source_drop(c->arg, id) == 0);
}

// More loads at once than there are jobs, and faults among them.
static void crowded_loads(void)
{
	struct uf_pager *p = pager_with(NULL, 0, 0);
	uint32_t id = test_worker_source(p, "ok");
	struct uf_memory *m = memory(p, id, 1 << 20, false);
	static struct test_crowd c;
	for (int round = 0; round < 10; round++) {
		test_crowd_start(&c, 100, load_thread, p);
		uint64_t wrong = test_differs(uf_memory_address(m), 0, LENGTH);
		CHECK(wrong == UINT64_MAX);
		test_crowd_join(&c, "loads");
	}
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
}

static void refused(void)
{
	struct uf_failure why;
	bool failed;
	uint32_t id;
	struct uf_pager_options o = test_options(1 << 30);
	struct uf_pager *p;
	o.workers = 0;
	CHECK(uf_pager_create(&o, &p) == 0);
	CHECK(uf_source_add(p, "ok", 2, &id) == -EINVAL);
	test_settle(p);
	test_end(p);

	// It starts and ends at once.
	p = pager_with("--broken-worker", 0, 0);
	test_log_begin();
	CHECK(uf_source_add(p, "ok", 2, &id) == 0);
	int err = load(p, id, 60000000000u, &failed, &why);
	char *log = test_log_end();
	CHECK(err == -ECHILD && strstr(why.message, "exit status 7"), "%d %s", err, why.message);
	CHECK(strstr(log, "does not start"), "%s", log);
	free(log);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);

	// It runs and takes nothing; it takes the request and says nothing.
	p = pager_with("--deaf", 0, 0);
	CHECK(uf_source_add(p, "ok", 2, &id) == 0);
	err = load(p, id, 50000000, &failed, &why);
	CHECK(err == -ETIMEDOUT && why.message[0], "%d %s", err, why.message);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
	p = pager_with("--mute", 0, 0);
	CHECK(uf_source_add(p, "ok", 2, &id) == 0);
	err = load(p, id, 300000000, &failed, &why);
	CHECK(err == -ETIMEDOUT && why.message[0], "%d %s", err, why.message);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
}

struct try {
	struct uf_pager *p;
	uint32_t id;
	struct uf_failure why;
};

static bool loads_now(void *arg)
{
	struct try *t = arg;
	bool failed = false;
	return load(t->p, t->id, 20000000000u, &failed, &t->why) == 0 && !failed;
}

// The program is not there, then it is (a file system that was not mounted, a full process table): no pager is lost to it.
static void repaired(void)
{
	char path[64];
	snprintf(path, sizeof(path), "/var/tmp/uf-worker-%d", (int)getpid());
	unlink(path);
	const char *argv[] = {path, "--worker", NULL};
	struct uf_pager_options o = test_options(1 << 30);
	o.worker_argv = argv;
	struct try t;
	CHECK(uf_pager_create(&o, &t.p) == 0);
	test_log_begin();
	int err = uf_source_add(t.p, "ok", 2, &t.id);
	bool before = loads_now(&t);
	int linked = symlink(self, path);
	bool after = test_wait(loads_now, &t);
	free(test_log_end());
	unlink(path);
	CHECK(!err && !linked && !before);
	CHECK(after, "the worker program is there again, and still: %s", t.why.message);
	CHECK(uf_source_drop(t.p, t.id) == 0);
	test_end(t.p);
}

// --- failing reads

static void fails(void)
{
	struct uf_pager *p = pager_with("--holes", 0, 0);
	uint32_t id = test_worker_source(p, "x");
	struct uf_memory *m = memory(p, id, 0, false);
	const uint8_t *at = uf_memory_address(m);
	struct uf_failure why;

	int err = uf_memory_prefetch(m, 14, 1, true, &why);
	CHECK(err == -EIO && why.err == -EIO && why.block == 14 && strstr(why.message, "says no"), "%d %s", err, why.message);
	CHECK(test_state(m, 14) == UF_ABSENT, "a failed prefetch poisons nothing");
	struct uf_stats s = test_stats(m);
	CHECK(s.errors == 1 && s.poisoned == 0 && s.retries == 2 && s.nerrors == 1 && !s.errlog[0].poisoned);
	// A run with a bad block in it: it is asked again block by block, and the bad one is told.
	err = uf_memory_prefetch(m, 1, 12, true, &why);
	CHECK(err == -EIO && why.block == 7, "%d, block %llu", err, (unsigned long long)why.block);
	CHECK(test_state(m, 7) == UF_ABSENT && test_stats(m).poisoned == 0);

	test_log_begin();
	int sig = test_touch_right(at, 21 * BLOCK + 5000);
	char *log = test_log_end();
	CHECK(sig == test_poison_signal(), "signal %d", sig);
	CHECK(strstr(log, "grid") && strstr(log, "block 21 ") && strstr(log, "the test source says no") && strstr(log, "3 attempts") &&
		      strstr(log, "1376256") && strstr(log, "poisoned"),
	      "%s", log);
	free(log);
	CHECK(test_state(m, 21) == UF_POISONED);
	s = test_stats(m);
	struct uf_error_record *e = &s.errlog[s.nerrors - 1];
	CHECK(s.poisoned == 1 && e->block == 21 && e->offset == 21 * BLOCK && e->length == BLOCK && e->poisoned &&
	      e->attempts == 3 && e->err == EIO && e->time_ns && strstr(e->message, "says no"));
	// Any page of it, and system calls too; its neighbours are well.
	for (unsigned off = 0; off < BLOCK; off += 4096)
		CHECK(test_touch_right(at, 21 * BLOCK + off) == test_poison_signal());
	int fds[2];
	CHECK(pipe(fds) == 0);
	CHECK(write(fds[1], at + 21 * BLOCK, 100) == -1 && errno == EFAULT, "%d", errno);
	CHECK(write(fds[1], at + 20 * BLOCK, 100) == 100);
	close(fds[0]);
	close(fds[1]);
	CHECK(test_differs(at + 22 * BLOCK, 22 * BLOCK, BLOCK) == UINT64_MAX);

	// Prefetch asks a poisoned block again. It fails again: the block is as bad as before, and says so.
	err = uf_memory_prefetch(m, 21, 1, true, &why);
	CHECK(err == -EIO);
	test_log_begin();
	sig = test_touch_right(at, 21 * BLOCK);
	free(test_log_end());
	CHECK(sig == test_poison_signal());
	CHECK(test_state(m, 21) == UF_POISONED, "the access dies, but the block's state is %d", test_state(m, 21));
	CHECK(test_stats(m).poisoned == 1);

	// With readahead runs fail as a whole; still each good block is right and each bad one dies.
	uf_memory_destroy(m);
	m = memory(p, id, 0, true);
	at = uf_memory_address(m);
	test_log_begin();
	for (unsigned b = 0; b < BLOCKS; b++) {
		sig = test_touch_right(at, b * BLOCK + 17);
		if (sig != (b % 7 ? 0 : test_poison_signal()))
			break;
		if (b == BLOCKS - 1)
			sig = -1;
	}
	log = test_log_end();
	CHECK(sig == -1, "signal %d", sig);
	CHECK(test_count(log, "poisoned") == (BLOCKS + 6) / 7, "%s", log);
	free(log);
	CHECK(test_stats(m).poisoned == (BLOCKS + 6) / 7);
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
}

static void flaky(void)
{
	struct uf_pager *p = pager_with(NULL, 0, 0);
	uint32_t id = test_worker_source(p, "flaky:3");
	struct uf_memory *m = memory(p, id, 1 << 20, false);
	for (int round = 0; round < 2; round++)
		CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
	struct uf_stats s = test_stats(m);
	CHECK(s.retries >= BLOCKS / 4 && s.errors == 0 && s.poisoned == 0, "%llu retries, %llu errors", (unsigned long long)s.retries,
	      (unsigned long long)s.errors);
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
}

// A source that recovers: prefetch heals what was poisoned. From a worker, and from a file that grows again.
static void heals(void)
{
	struct uf_pager *p = pager_with(NULL, 0, 1);
	uint32_t id = test_worker_source(p, "flaky:2");
	struct uf_memory *m = memory(p, id, 0, false);
	const uint8_t *at = uf_memory_address(m);
	struct uf_failure why;
	unsigned bad = 0;
	test_log_begin();
	while (bad < BLOCKS && test_touch_right(at, bad * BLOCK) != test_poison_signal())
		bad++;
	int tries = 0;
	while (tries < 100 && uf_memory_prefetch(m, bad, 1, true, &why))
		tries++;
	free(test_log_end());
	CHECK(bad < BLOCKS && tries < 100, "%s", why.message);
	CHECK(test_differs(at + bad * BLOCK, bad * BLOCK, BLOCK) == UINT64_MAX && test_state(m, bad) == UF_CLEAN);
	CHECK(test_stats(m).poisoned == 0);
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, id) == 0);

	int fd = test_file(LENGTH, false);
	CHECK(ftruncate(fd, LENGTH / 2 + 10) == 0);
	struct uf_memory_options o = {.name = "cut", .nbytes = LENGTH, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = fd};
	test_memory_source(p, &o, &m);
	at = uf_memory_address(m);
	test_log_begin();
	int first = test_touch_right(at, LENGTH / 2 - 1), second = test_touch_right(at, LENGTH / 2);
	int err = uf_memory_prefetch(m, BLOCKS / 2, BLOCKS / 2, true, &why);
	char *log = test_log_end();
	CHECK(first == 0 && second == test_poison_signal(), "%d %d", first, second);
	CHECK(strstr(log, "cut: block 64 ") && strstr(log, "the file ends"), "%s", log);
	free(log);
	CHECK(err == -ENODATA && strstr(why.message, "the file ends"), "%d %s", err, why.message);
	CHECK(pwrite(fd, test_reference(LENGTH) + LENGTH / 2, LENGTH / 2, LENGTH / 2) == LENGTH / 2);
	CHECK(uf_memory_prefetch(m, 0, BLOCKS, true, &why) == 0, "%s", why.message);
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX && test_stats(m).poisoned == 0);
	uf_memory_destroy(m);
	close(fd);
	test_settle(p);
	test_end(p);
}

// --- workers that die

static void reader(struct test_crowd *c, int number)
{
	const uint8_t *at = uf_memory_address(c->arg);
	uint64_t r = 88172645463325252u + (uint64_t)number * 77;
	while (!atomic_load(&c->stop)) {
		uint64_t k = test_random(&r) % (LENGTH - 64);
		CHECK(test_differs(at + k, k, 64) == UINT64_MAX, "thread %d: byte %llu", number, (unsigned long long)k);
		atomic_fetch_add(&c->work, 1);
	}
}

struct losses {
	struct uf_pager *p;
	uint64_t lost, reissued;
};

static bool enough_losses(void *arg)
{
	struct losses *l = arg;
	struct uf_pager_stats s = test_pager_stats(l->p);
	return s.workers_lost >= l->lost && s.requests_reissued >= l->reissued;
}

static void die(void)
{
	struct uf_pager *p = pager_with(NULL, 0, 0);
	uint32_t id = test_worker_source(p, "die:150");
	struct uf_memory *m = memory(p, id, 1 << 20, false);
	static struct test_crowd c;
	struct losses enough = {p, 6, 6};
	test_log_begin();
	test_crowd_start(&c, 3, reader, m);
	bool got = test_wait(enough_losses, &enough);
	atomic_store(&c.stop, true);
	bool ended = test_wait(enough_losses, &enough);
	char *log = test_log_end();
	test_crowd_join(&c, "readers of dying workers");
	CHECK(got && ended, "%llu workers lost, %llu requests issued again", (unsigned long long)test_pager_stats(p).workers_lost,
	      (unsigned long long)test_pager_stats(p).requests_reissued);
	CHECK(strstr(log, "was killed by signal 9"), "%s", log);
	free(log);
	struct uf_stats s = test_stats(m);
	CHECK(s.errors == 0 && s.poisoned == 0, "%s", s.errlog[0].message);
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
}

static bool worker_to_kill(void *arg)
{
	pid_t pids[16];
	int n = test_children(pids, 16);
	for (int i = 0; i < n; i++) {
		if (test_threads_of(pids[i]) >= 4) { // it has attached and serves
			kill(pids[i], SIGKILL);
			*(pid_t *)arg = pids[i];
			return true;
		}
	}
	return false;
}

static bool gone(void *arg)
{
	return test_threads_of(*(pid_t *)arg) == 0;
}

static void killed(void)
{
	struct uf_pager *p = pager_with(NULL, 0, 0);
	uint32_t id = test_worker_source(p, "slow:300");
	struct uf_memory *m = memory(p, id, 1 << 20, true);
	static struct test_crowd c;
	int kills = 0;
	bool ok = true;
	test_log_begin();
	test_crowd_start(&c, 3, reader, m);
	for (pid_t pid; kills < 12 && ok; kills++)
		ok = test_wait(worker_to_kill, &pid) && test_wait(gone, &pid);
	free(test_log_end());
	CHECK(ok, "after %d kills", kills);
	test_crowd_work(&c, 100, "after the last kill");
	test_crowd_stop(&c, "readers of killed workers");
	struct uf_stats s = test_stats(m);
	CHECK(s.errors == 0 && s.poisoned == 0, "%s", s.errlog[0].message);
	CHECK(test_pager_stats(p).workers_lost >= 10);
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
}

static void touch_one(struct test_crowd *c, int number)
{
	struct uf_memory *m = c->arg;
	int sig = test_touch_right(uf_memory_address(m), (uint64_t)(number + 3) * BLOCK);
	if (sig)
		atomic_fetch_add(&c->work, 1);
}

// A worker dies after it has answered, before it can say so.
static void unheard(void)
{
	struct uf_pager *p = pager_with("--unheard", 0, 0);
	struct uf_failure why;
	bool failed;
	uint32_t id;
	CHECK(uf_source_add(p, "x", 1, &id) == 0 && load(p, id, 20000000000u, &failed, &why) == 0, "%s", why.message);
	struct uf_memory *m = memory(p, id, 0, false);
	static struct test_crowd c;
	test_log_begin();
	test_crowd_start(&c, 1, touch_one, m);
	bool ended = false;
	for (int i = 0; i < 5000 && !ended; i++) {
		ended = atomic_load(&c.ended) == 1;
		poll(NULL, 0, 1);
	}
	free(test_log_end());
	CHECK(ended, "a fault hangs whose answer lies in the ring");
	test_crowd_join(&c, "unheard");
	CHECK(atomic_load(&c.work) == 0);
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, id) == 0);
	test_settle(p);
	test_end(p);
}

// The supervisor waits for events without a limit.
static bool supervisor_idle(void *arg)
{
	(void)arg;
	bool idle = false;
	for (pid_t tid = getpid(); tid < getpid() + 64 && !idle; tid++) {
		char path[64], text[256] = "";
		snprintf(path, sizeof(path), "/proc/self/task/%d/comm", tid);
		FILE *f = fopen(path, "re");
		bool super = f && fgets(text, sizeof(text), f) && !strcmp(text, "uf-super\n");
		if (f)
			fclose(f);
		if (!super)
			continue;
		snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", tid);
		f = fopen(path, "re");
		long nr;
		unsigned long a, b, timeout;
		idle = f && fgets(text, sizeof(text), f) && sscanf(text, "%ld %lx %lx %lx", &nr, &a, &b, &timeout) == 4 &&
		       (int)timeout == -1;
		if (f)
			fclose(f);
	}
	return idle;
}

// A read that never ends: its worker is killed at the deadline, also when the pager had been idle before.
static void hang(void)
{
	struct uf_pager *p = pager_with(NULL, 100000000, 0);
	uint32_t id = test_worker_source(p, "hang"), good = test_worker_source(p, "ok");
	struct uf_memory *m = memory(p, id, 0, false), *other = memory(p, good, 0, true);
	for (int i = 0; i < 3000 && !supervisor_idle(NULL); i++)
		poll(NULL, 0, 1);
	static struct test_crowd c;
	test_log_begin();
	test_crowd_start(&c, 3, touch_one, m);
	bool ended = false;
	for (int i = 0; i < 20000 && !ended; i++) {
		ended = atomic_load(&c.ended) == 3;
		poll(NULL, 0, 1);
	}
	struct uf_failure why;
	int err = ended ? uf_memory_prefetch(m, 0, 1, true, &why) : 0;
	char *log = test_log_end();
	CHECK(ended, "reads hang beyond the deadline");
	test_crowd_join(&c, "hang");
	CHECK(atomic_load(&c.work) == 3, "they end with SIGBUS");
	CHECK(strstr(log, "deadline") && test_count(log, "poisoned") == 3, "%s", log);
	free(log);
	CHECK((err == -ECHILD || err == -ETIMEDOUT) && strstr(why.message, "deadline"), "%d %s", err, why.message);
	CHECK(test_state(m, 0) == UF_ABSENT && test_stats(m).poisoned == 3 && test_stats(m).errors == 4);
	CHECK(test_pager_stats(p).workers_lost >= 5);
	CHECK(test_differs(uf_memory_address(other), 0, LENGTH) == UINT64_MAX, "the other source's reads");
	CHECK(test_stats(other).errors == 0);
	uf_memory_destroy(m);
	uf_memory_destroy(other);
	CHECK(uf_source_drop(p, id) == 0 && uf_source_drop(p, good) == 0);
	test_settle(p);
	test_end(p);
}

static void reader_of_all(struct test_crowd *c, int number)
{
	const uint8_t *at = uf_memory_address(c->arg);
	for (uint64_t b = (uint64_t)number; b < 48 && !atomic_load(&c->stop); b += 8) {
		int sig = test_touch_right(at, b * BLOCK + 100);
		if (sig)
			atomic_fetch_add(&c->work, 1);
	}
}

// One of two workers never comes up. The other serves everything.
static void picky(void)
{
	struct uf_pager *p = pager_with("--picky", 0, 0);
	struct uf_failure why;
	bool failed;
	struct try t = {.p = p};
	static struct test_crowd c;
	test_log_begin();
	int err = uf_source_add(p, "x", 1, &t.id); // its load goes to worker 0
	bool loaded = test_wait(loads_now, &t);
	struct uf_memory *m = memory(p, t.id, 0, false);
	test_crowd_start(&c, 8, reader_of_all, m);
	bool ended = false;
	for (int i = 0; i < 20000 && !ended; i++) {
		ended = atomic_load(&c.ended) == 8;
		poll(NULL, 0, 1);
	}
	int again = load(p, t.id, 20000000000u, &failed, &why);
	char *log = test_log_end();
	CHECK(!err && loaded && ended, "%s", t.why.message);
	test_crowd_join(&c, "picky");
	CHECK(strstr(log, "worker 1 does not start"), "%s", log);
	CHECK(atomic_load(&c.work) == 0, "%lu reads died although worker 0 was well\n%s", atomic_load(&c.work), log);
	CHECK(again == 0, "%s", why.message);
	free(log);
	uf_memory_destroy(m);
	CHECK(uf_source_drop(p, t.id) == 0);
	test_settle(p);
	test_end(p);
}

// --- many sources, and their ids

static void ids(void)
{
	struct uf_pager *p = pager_with(NULL, 0, 1);
	static uint32_t id[1100];
	int n = 0, err = 0;
	while (n < 1100 && !(err = uf_source_add(p, "ok", 2, &id[n])))
		n++;
	CHECK(n == 1024 && err == -EMFILE, "%d sources: %s", n, strerror(-err));
	for (int i = 0; i < n; i++)
		CHECK(uf_source_drop(p, id[i]) == 0);

	// Ids are used again; what a worker keeps of an old source must not serve the new one.
	for (int i = 0; i < 150; i++) {
		uint32_t a = test_worker_source(p, "fail:1");
		struct uf_memory *m = memory(p, a, 0, false);
		struct uf_failure why;
		CHECK(uf_memory_prefetch(m, 1, 1, true, &why) == -EIO, "round %d", i);
		uf_memory_destroy(m);
		CHECK(uf_source_drop(p, a) == 0);
		uint32_t b = test_worker_source(p, "ok");
		CHECK(a == b);
		m = memory(p, b, 0, false);
		CHECK(test_touch_right(uf_memory_address(m), 5 * BLOCK) == 0, "round %d", i);
		uf_memory_destroy(m);
		CHECK(uf_source_drop(p, b) == 0);
	}

	// Many at once.
	struct uf_memory *m[100];
	for (int i = 0; i < 100; i++) {
		id[i] = test_worker_source(p, i % 2 ? "fail:1" : "ok");
		m[i] = memory(p, id[i], 0, false);
	}
	uint64_t r = 4711;
	for (int i = 0; i < 1000; i++) {
		uint64_t k = test_random(&r) % 50 * 2;
		CHECK(test_touch_right(uf_memory_address(m[k]), test_random(&r) % LENGTH) == 0);
	}
	for (int i = 0; i < 100; i++) {
		uf_memory_destroy(m[i]);
		CHECK(uf_source_drop(p, id[i]) == 0);
	}
	test_settle(p);
	test_end(p);
}

// --- the end

static int base_threads, base_fds;

static bool idle(void *arg)
{
	pid_t pids[16];
	struct uf_pager_stats s = test_pager_stats(arg);
	return !s.running && s.workers_alive == 0 && test_thread_count() == base_threads && test_fd_count() == base_fds &&
	       test_children(pids, 16) == 0;
}

static void linger(void)
{
	struct uf_pager_options o = test_options(1 << 30);
	struct uf_pager *p;
	o.linger_ns = 30000000;
	base_threads = test_base_threads();
	base_fds = test_fd_count();
	CHECK(uf_pager_create(&o, &p) == 0);
	for (int round = 0; round < 4; round++) {
		uint32_t id = test_worker_source(p, "ok");
		struct uf_memory *m = memory(p, id, 0, true);
		CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
		CHECK(test_pager_stats(p).running && test_thread_count() > base_threads);
		uf_memory_destroy(m);
		CHECK(uf_source_drop(p, id) == 0);
		if (round % 2) // an end that was asked for, beside those by themselves
			CHECK(uf_pager_shutdown(p) == 0);
		CHECK(test_wait(idle, p), "%d threads, %d descriptors", test_thread_count(), test_fd_count());
	}
	// While it ends, the next comes.
	for (int round = 0; round < test_rounds(100); round++) {
		struct uf_memory *m;
		struct uf_memory_options none = {.nbytes = LENGTH, .source = UF_SOURCE_MEMORY, .address = test_reference(LENGTH)};
		test_memory_source(p, &none, &m);
		CHECK(test_touch_right(uf_memory_address(m), 12345) == 0);
		uf_memory_destroy(m);
		if (round % 3 == 0)
			CHECK(uf_pager_shutdown(p) == 0);
		else if (round % 3 == 1)
			poll(NULL, 0, 29 + round % 4); // near the linger time
	}
	test_settle(p);
	test_end(p);
	CHECK(test_threads_left(base_threads) && test_fd_count() == base_fds);
}

int main(int argc, char **argv)
{
	if (argc == 3 && (!strcmp(argv[1], "--mute") || !strcmp(argv[1], "--unheard") || !strcmp(argv[1], "--picky") ||
			  !strcmp(argv[1], "--holes")))
		serve(argv[1], (unsigned)atoi(argv[2]));
	if (argc == 3 && !strcmp(argv[1], "--deaf"))
		poll(NULL, 0, 3600000);
	test_start(argc, argv);
	test_needs_userfaultfd();
	CHECK(readlink("/proc/self/exe", self, sizeof(self) - 1) > 0);
	test_reference(LENGTH);
	test_guard();
	static const struct {
		const char *name;
		void (*run)(void);
	} all[] = {
		{"loads", loads}, {"crowded_loads", crowded_loads}, {"refused", refused}, {"repaired", repaired}, {"fails", fails},
		{"flaky", flaky}, {"heals", heals}, {"die", die}, {"killed", killed}, {"unheard", unheard}, {"hang", hang},
		{"picky", picky}, {"ids", ids}, {"linger", linger},
	};
	for (unsigned i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
		if (argc == 2 && strcmp(argv[1], all[i].name))
			continue;
		struct timespec a, b;
		clock_gettime(CLOCK_MONOTONIC, &a);
		all[i].run();
		clock_gettime(CLOCK_MONOTONIC, &b);
		printf("%s: %.1f s\n", all[i].name, (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) / 1e9);
	}
	return 0;
}
