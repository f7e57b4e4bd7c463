// SPDX-License-Identifier: Apache-2.0
#include "support.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <sys/mman.h>

bool test_part(const char *only, const char *name)
{
	bool runs = !only || !strcmp(only, name);
	if (runs)
		printf("%s\n", name);
	return runs;
}

static uint8_t *reference;
static uint64_t reference_length;

const uint8_t *test_reference(uint64_t length)
{
	if (!reference) {
		reference = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(reference != MAP_FAILED);
		test_fill(reference, 0, length);
		reference_length = length;
	}
	CHECK(length <= reference_length, "the first call asks for the most");
	return reference;
}

uint64_t test_differs(const void *at, uint64_t offset, uint64_t length)
{
	if (!memcmp(at, test_reference(offset + length) + offset, length))
		return UINT64_MAX;
	uint64_t wrong = test_wrong(at, offset, length);
	return wrong == UINT64_MAX ? offset : wrong; // it changed under our eyes: wrong as well
}

// The address to go to is per thread: an access that faults answers in its own thread.
static _Thread_local sigjmp_buf jump;
static _Thread_local volatile sig_atomic_t armed;

static void caught(int sig)
{
	if (!armed) {
		signal(sig, SIG_DFL); // a real crash: the access faults again and the process dies of it
		return;
	}
	armed = 0;
	siglongjmp(jump, sig);
}

void test_guard(void)
{
	struct sigaction a = {.sa_handler = caught};
	sigemptyset(&a.sa_mask);
	CHECK(!sigaction(SIGSEGV, &a, NULL) && !sigaction(SIGBUS, &a, NULL));
}

int test_touch(const volatile uint8_t *at, uint8_t *ret)
{
	int sig = sigsetjmp(jump, 1);
	if (sig)
		return sig;
	armed = 1;
	uint8_t value = *at;
	armed = 0;
	*ret = value;
	return 0;
}

// A wild write; the readers that it races with do not matter, since it must not come through.
__attribute__((no_sanitize("thread"))) int test_poke(volatile uint8_t *at)
{
	int sig = sigsetjmp(jump, 1);
	if (sig)
		return sig;
	armed = 1;
	*at = 0;
	armed = 0;
	return 0;
}

int test_touch_right(const uint8_t *base, uint64_t at)
{
	uint8_t value = 0;
	int sig = test_touch(base + at, &value);
	CHECK(sig || value == test_byte(at), "byte %llu is %d, not %d", (unsigned long long)at, value, test_byte(at));
	return sig;
}

int test_children(pid_t *ret, int max)
{
	int n = 0;
	DIR *d = opendir("/proc");
	CHECK(d);
	for (struct dirent *e; (e = readdir(d));) {
		char path[300], line[256];
		if (e->d_name[0] < '0' || e->d_name[0] > '9')
			continue;
		snprintf(path, sizeof(path), "/proc/%s/status", e->d_name);
		FILE *f = fopen(path, "re");
		int parent = 0;
		while (f && fgets(line, sizeof(line), f))
			sscanf(line, "PPid: %d", &parent);
		if (f)
			fclose(f);
		if (parent == getpid() && n < max)
			ret[n++] = atoi(e->d_name);
	}
	closedir(d);
	return n;
}

int test_threads_of(pid_t pid)
{
	char path[64], line[256];
	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	FILE *f = fopen(path, "re");
	int threads = 0;
	bool zombie = false;
	while (f && fgets(line, sizeof(line), f)) {
		sscanf(line, "Threads: %d", &threads);
		zombie |= !strncmp(line, "State:\tZ", 8) || !strncmp(line, "State:\tX", 8);
	}
	if (f)
		fclose(f);
	return zombie ? 0 : threads;
}

int test_mappings(void)
{
	FILE *f = fopen("/proc/self/maps", "re");
	CHECK(f);
	int n = 0;
	for (int c; (c = fgetc(f)) != EOF;)
		n += c == '\n';
	fclose(f);
	return n;
}

int test_file(uint64_t length, bool disk)
{
	char path[] = "/var/tmp/uf-test-XXXXXX";
	int fd = disk ? mkstemp(path) : memfd_create("test", MFD_CLOEXEC);
	CHECK(fd >= 0);
	if (disk)
		unlink(path);
	CHECK(pwrite(fd, test_reference(length), length, 0) == (ssize_t)length);
	return fd;
}

static int log_fd = -1, saved_stderr;

void test_log_begin(void)
{
	saved_stderr = fcntl(2, F_DUPFD_CLOEXEC, 16);
	log_fd = memfd_create("log", MFD_CLOEXEC);
	CHECK(saved_stderr >= 0 && log_fd >= 0 && dup2(log_fd, 2) == 2);
}

char *test_log_end(void)
{
	off_t length = lseek(log_fd, 0, SEEK_END);
	char *text = calloc(1, (size_t)length + 1);
	ssize_t n = text ? pread(log_fd, text, (size_t)length, 0) : -1;
	dup2(saved_stderr, 2);
	close(saved_stderr);
	close(log_fd);
	CHECK(n == length);
	if (strstr(text, "Sanitizer") || strstr(text, "runtime error"))
		fputs(text, stderr); // a report that came meanwhile
	return text;
}

int test_count(const char *text, const char *what)
{
	int n = 0;
	for (const char *at = text; (at = strstr(at, what)); at++)
		n++;
	return n;
}

struct start {
	struct test_crowd *crowd;
	int number;
};

int test_poison_signal(void)
{
	return uf_host_probe()->poison ? SIGBUS : SIGSEGV;
}

int test_rounds(int rounds)
{
	int n = getenv("UF_TEST_SLOW") ? rounds / 4 : TEST_TSAN || TEST_ASAN ? rounds / 2 : rounds;
	return n ? n : 1;
}

static bool so_many_threads(void *arg)
{
	return test_thread_count() == *(int *)arg;
}

bool test_threads_left(int count)
{
	return test_wait(so_many_threads, &count);
}

static void *crowd_thread(void *arg)
{
	struct start s = *(struct start *)arg;
	free(arg);
	s.crowd->run(s.crowd, s.number);
	atomic_fetch_add(&s.crowd->ended, 1);
	return NULL;
}

void test_crowd_start(struct test_crowd *c, int n, void (*run)(struct test_crowd *, int number), void *arg)
{
	CHECK(n <= TEST_CROWD);
	c->n = n;
	c->run = run;
	c->arg = arg;
	atomic_store(&c->stop, false);
	atomic_store(&c->ended, 0);
	atomic_store(&c->work, 0);
	for (int i = 0; i < n; i++) {
		struct start *s = malloc(sizeof(*s));
		CHECK(s);
		*s = (struct start){c, i};
		CHECK(pthread_create(&c->thread[i], NULL, crowd_thread, s) == 0);
	}
}

static bool all_ended(void *arg)
{
	struct test_crowd *c = arg;
	return atomic_load(&c->ended) == c->n;
}

void test_crowd_join(struct test_crowd *c, const char *what)
{
	CHECK(test_wait(all_ended, c), "%s: %d of %d threads hang", what, c->n - atomic_load(&c->ended), c->n);
	for (int i = 0; i < c->n; i++)
		CHECK(pthread_join(c->thread[i], NULL) == 0);
}

void test_crowd_stop(struct test_crowd *c, const char *what)
{
	atomic_store(&c->stop, true);
	test_crowd_join(c, what);
}

struct goal {
	struct test_crowd *crowd;
	unsigned long work;
};

static bool goal_reached(void *arg)
{
	struct goal *g = arg;
	return atomic_load(&g->crowd->work) >= g->work;
}

void test_crowd_work(struct test_crowd *c, unsigned long n, const char *what)
{
	struct goal g = {c, atomic_load(&c->work) + n};
	CHECK(test_wait(goal_reached, &g), "%s: no progress", what);
}

static bool nothing_resident(void *arg)
{
	return test_pager_stats(arg).resident == 0;
}

void test_settle(struct uf_pager *p)
{
	CHECK(test_wait(nothing_resident, p), "%llu bytes stay counted", (unsigned long long)test_pager_stats(p).resident);
}

enum uf_state test_state(struct uf_memory *m, uint64_t block)
{
	uint8_t s;
	uf_memory_states(m, block, 1, &s);
	return (enum uf_state)s;
}

struct uf_pager_stats test_pager_stats(struct uf_pager *p)
{
	struct uf_pager_stats s;
	uf_pager_stats(p, &s);
	return s;
}

struct uf_stats test_stats(struct uf_memory *m)
{
	struct uf_stats s;
	uf_memory_stats(m, &s);
	return s;
}
