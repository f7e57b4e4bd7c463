// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <unistd.h>

// A worker of the tests. Its sources' blobs are "MODE" or "MODE:NUMBER": "ok"; "fail:N" fails reads of block offsets that
// are multiples of N * 64 KiB; "flaky:N" fails every N-th read; "slow:N" takes N microseconds; "die:N" ends the process at
// every N-th read, "hang" never answers; "bad" does not load; "silent" ends the process when loaded.
struct source {
	char mode[64];
	unsigned long number;
	uint32_t generation;
};

#ifdef __SANITIZE_ADDRESS__
// A thread that starts holds a lock of AddressSanitizer's for a moment, which a child forked just then inherits locked (LLVM 17 and
// GCC 14 take it before they fork): it hangs when it starts a thread. So here a thread has begun before pthread_create returns.
struct beginning {
	void *(*run)(void *);
	void *arg;
	atomic_bool begun;
};

static void *begin(void *arg)
{
	struct beginning *b = arg;
	void *(*run)(void *) = b->run;
	void *given = b->arg;
	atomic_store(&b->begun, true);
	return run(given);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *arg)
{
	int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
	struct beginning b = {run, arg, false};
	int err = create(thread, attributes, begin, &b);
	while (!err && !atomic_load(&b.begun))
		sched_yield();
	return err;
}
#endif

static struct uf_ring_client *client;
static struct source sources[64];
static pthread_mutex_t sources_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_ulong reads;

static struct source get_source(const struct uf_request *r)
{
	pthread_mutex_lock(&sources_lock);
	struct source *s = &sources[r->source_id % 64];
	if (s->generation != r->generation) {
		char blob[64] = "";
		uf_client_blob(client, r->source_id, blob, sizeof(blob) - 1);
		char *colon = strchr(blob, ':');
		s->number = colon ? strtoul(colon + 1, NULL, 10) : 0;
		if (colon)
			*colon = 0;
		snprintf(s->mode, sizeof(s->mode), "%s", blob);
		s->generation = r->generation;
	}
	struct source copy = *s;
	pthread_mutex_unlock(&sources_lock);
	return copy;
}

static void *worker_thread(void *arg)
{
	for (;;) {
		struct uf_request r;
		uf_client_take(client, &r);
		if (r.kind == UF_REQUEST_STOP)
			_exit(0);
		if (r.kind == UF_REQUEST_DROP)
			continue;
		struct source s = get_source(&r);
		unsigned long n = atomic_fetch_add(&reads, 1) + 1;
		if (r.kind == UF_REQUEST_LOAD) {
			if (!strcmp(s.mode, "silent"))
				_exit(3);
			int len = snprintf(r.buffer, r.capacity, "%s", strcmp(s.mode, "bad") ? "loaded" : "no such thing");
			if (!strcmp(s.mode, "bad"))
				uf_client_fail(client, &r, "cannot load", (uint64_t)len);
			else
				uf_client_done(client, &r, (uint64_t)len);
			continue;
		}
		if (!strcmp(s.mode, "hang"))
			poll(NULL, 0, 3600000);
		if (!strcmp(s.mode, "die") && n % s.number == 0)
			kill(getpid(), SIGKILL);
		if (!strcmp(s.mode, "slow"))
			usleep((useconds_t)s.number);
		if ((!strcmp(s.mode, "fail") && r.offset / 65536 % s.number == 0) || (!strcmp(s.mode, "flaky") && n % s.number == 0)) {
			uf_client_fail(client, &r, "the test source says no", 0);
			continue;
		}
		test_fill(r.buffer, r.offset, r.length);
		uf_client_done(client, &r, 0);
	}
	return arg;
}

void test_start(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	if (argc == 3 && !strcmp(argv[1], "--broken-worker"))
		_exit(7);
	if (argc == 3 && !strcmp(argv[1], "--worker")) {
		CHECK(uf_client_attach(3, 4, 5, (unsigned)atoi(argv[2]), &client) == 0);
		for (int i = 0; i < 3; i++) {
			pthread_t t;
			CHECK(pthread_create(&t, NULL, worker_thread, NULL) == 0);
		}
		worker_thread(NULL);
	}
	signal(SIGPIPE, SIG_IGN);
}

void test_needs_userfaultfd(void)
{
	const struct uf_host *h = uf_host_probe();
	if (!h->open_via) {
		printf("no userfaultfd here: %s\n", strerror(h->open_errno));
		exit(77);
	}
}

static char self[4096];
static const char *const worker_argv[] = {self, "--worker", NULL};

struct uf_pager_options test_options(uint64_t limit)
{
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	CHECK(n > 0);
	return (struct uf_pager_options){
		.limit = limit,
		.workers = 2,
		.worker_argv = worker_argv,
		.linger_ns = 60000000000u,
		.deadline_ns = 30000000000u,
		.attempts = 3,
		.backoff_ns = 1000000,
	};
}

struct uf_pager *test_pager(uint64_t limit)
{
	struct uf_pager_options o = test_options(limit);
	struct uf_pager *p;
	CHECK(uf_pager_create(&o, &p) == 0);
	return p;
}

void test_fill(void *buffer, uint64_t offset, uint64_t length)
{
	uint8_t *b = buffer;
	for (uint64_t i = 0; i < length; i++)
		b[i] = test_byte(offset + i);
}

uint64_t test_wrong(const volatile uint8_t *at, uint64_t offset, uint64_t length)
{
	for (uint64_t i = 0; i < length; i++)
		if (at[i] != test_byte(offset + i))
			return offset + i;
	return UINT64_MAX;
}

int test_in_child(void (*run)(void *), void *arg)
{
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		alarm(60);
		run(arg);
		_exit(0);
	}
	int status;
	CHECK(waitpid(pid, &status, 0) == pid);
	return status;
}

static int entries(const char *directory)
{
	DIR *d = opendir(directory);
	CHECK(d);
	int n = 0;
	while (readdir(d))
		n++;
	closedir(d);
	return n - 2;
}

int test_fd_count(void)
{
	return entries("/proc/self/fd") - 1;
}

int test_thread_count(void)
{
	return entries("/proc/self/task");
}

static bool nothing_resident(void *arg)
{
	struct uf_pager_stats s;
	uf_pager_stats(arg, &s);
	return s.resident == 0;
}

void test_end(struct uf_pager *p)
{
	struct uf_pager_stats s;
	// A reader is awake before the last block that it read is accounted for.
	CHECK(test_wait(nothing_resident, p), "bytes counted as resident");
	uf_pager_stats(p, &s);
	CHECK(s.memories == 0, "%llu memories open", (unsigned long long)s.memories);
	CHECK(s.reserved == 0);
	CHECK(uf_pager_destroy(p) == 0);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "a child is left");
}

uint32_t test_worker_source(struct uf_pager *p, const char *mode)
{
	uint32_t id;
	void *reply;
	size_t len;
	bool failed;
	struct uf_failure why;
	CHECK(uf_source_add(p, mode, strlen(mode), &id) == 0);
	int err = uf_source_load(p, id, 20000000000u, &reply, &len, &failed, &why);
	CHECK(err == 0, "%d %s", err, why.message);
	CHECK(!failed && len == 6 && !memcmp(reply, "loaded", 6));
	free(reply);
	CHECK(uf_source_configure(p, id, false, 0) == 0);
	return id;
}

void test_memory_source(struct uf_pager *p, const struct uf_memory_options *o, struct uf_memory **ret)
{
	struct uf_memory_options c = *o;
	if (!c.name)
		c.name = "test";
	if (!c.block)
		c.block = 65536;
	int err = uf_memory_create(p, &c, ret);
	CHECK(err == 0, "%s", strerror(-err));
}

uint64_t test_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

bool test_wait(bool (*done)(void *), void *arg)
{
	for (int i = 0; i < 20000; i++) {
		if (done(arg))
			return true;
		poll(NULL, 0, 1);
	}
	return false;
}
