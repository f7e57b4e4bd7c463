// SPDX-License-Identifier: Apache-2.0
// More of what the engine's tests share: signals caught, the log caught, processes and mappings counted, many threads.
#ifndef UF_TEST_SUPPORT_H
#define UF_TEST_SUPPORT_H

#include "harness.h"

#ifdef __SANITIZE_THREAD__
enum { TEST_TSAN = 1 };
#else
enum { TEST_TSAN = 0 };
#endif
#ifdef __SANITIZE_ADDRESS__
enum { TEST_ASAN = 1 };
#else
enum { TEST_ASAN = 0 };
#endif

// What is left when all threads have ended: ThreadSanitizer has one of its own from the first on.
static inline int test_base_threads(void)
{
	return 1 + TEST_TSAN;
}

// Waits until only so many threads are left: the kernel lists one that was joined for a moment longer.
bool test_threads_left(int count);

// What touching a poisoned block raises: SIGBUS, or SIGSEGV before Linux 6.6.
int test_poison_signal(void);

// `rounds` of them, half with a sanitizer, a quarter where everything is slow: UF_TEST_SLOW is set under emulation.
int test_rounds(int rounds);

enum { TEST_CROWD = 128 };

// In main: an argument names the only part to run. Tells afterwards what ran.
#define RUN(name) (test_part(only, name))
bool test_part(const char *only, const char *name);

// `length` bytes of the test pattern, made once; longer than what was asked for before is an error.
const uint8_t *test_reference(uint64_t length);
// Byte by byte the slow way only where a quick comparison says that something is wrong.
uint64_t test_differs(const void *at, uint64_t offset, uint64_t length);

// From now on test_touch and its like answer with the signal (SIGSEGV, SIGBUS) that the access raised, 0 if none.
void test_guard(void);
int test_touch(const volatile uint8_t *at, uint8_t *ret);
int test_poke(volatile uint8_t *at);
// Touches and compares; wrong bytes end the test. The signal, or 0.
int test_touch_right(const uint8_t *base, uint64_t at);

// Processes whose parent is this one; how many threads one has (0: it is gone or a zombie).
int test_children(pid_t *ret, int max);
int test_threads_of(pid_t pid);
int test_mappings(void);
// A file of this length with the pattern, unlinked. `disk`: on a file system of the disk, not tmpfs.
int test_file(uint64_t length, bool disk);

// Until test_log_end, what is written to stderr is kept. No CHECK in between: its text would be kept too.
void test_log_begin(void);
char *test_log_end(void); // malloc
int test_count(const char *text, const char *what);

// Threads that run until test_stop; each gets its number.
struct test_crowd {
	pthread_t thread[TEST_CROWD];
	int n;
	atomic_bool stop;
	atomic_int ended;
	atomic_ulong work; // counted by the threads as they like
	void *arg;
	void (*run)(struct test_crowd *, int number);
};
void test_crowd_start(struct test_crowd *c, int n, void (*run)(struct test_crowd *, int number), void *arg);
// Waits (20 s at most) until all have ended by themselves.
void test_crowd_join(struct test_crowd *c, const char *what);
void test_crowd_stop(struct test_crowd *c, const char *what);
// Until the counter `work` has grown by n.
void test_crowd_work(struct test_crowd *c, unsigned long n, const char *what);

// Until nothing is counted as resident: what was in flight for closed memories is counted until it ends.
void test_settle(struct uf_pager *p);
enum uf_state test_state(struct uf_memory *m, uint64_t block);
struct uf_pager_stats test_pager_stats(struct uf_pager *p);
struct uf_stats test_stats(struct uf_memory *m);

#endif
