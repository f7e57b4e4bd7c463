// SPDX-License-Identifier: Apache-2.0
// What the engine's tests share: a failing check says where and ends the program; a worker is this program again.
#ifndef UF_TEST_HARNESS_H
#define UF_TEST_HARNESS_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "uf.h"

#define CHECK(condition, ...)                                                              \
	do {                                                                               \
		if (!(condition)) {                                                        \
			fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
			fprintf(stderr, " " __VA_ARGS__);                                  \
			fputc('\n', stderr);                                               \
			_exit(1);                                                          \
		}                                                                          \
	} while (0)

// Byte `at` of the test sources: no two blocks are alike, no byte is zero.
static inline uint8_t test_byte(uint64_t at)
{
	uint64_t x = (at >> 3) * 0x9e3779b97f4a7c15ULL;
	return (uint8_t)((x >> 56 ^ at * 31) % 255 + 1);
}

// Call first. In a worker process it serves until told to stop and does not return.
void test_start(int argc, char **argv);
// Skips (exit 77) where this user may not open a userfaultfd.
void test_needs_userfaultfd(void);
struct uf_pager_options test_options(uint64_t limit);
struct uf_pager *test_pager(uint64_t limit);
void test_fill(void *buffer, uint64_t offset, uint64_t length);
// First wrong offset of [offset, offset + length) at `at`, or UINT64_MAX.
uint64_t test_wrong(const volatile uint8_t *at, uint64_t offset, uint64_t length);
// Runs in a forked child; returns its wait status.
int test_in_child(void (*run)(void *), void *arg);
// Ends every thread and worker of the pager and checks that nothing is left of them.
void test_end(struct uf_pager *p);
int test_fd_count(void);
int test_thread_count(void);
// What workers do: a blob "MODE" loads to this mode. See harness.c.
uint32_t test_worker_source(struct uf_pager *p, const char *mode);
void test_memory_source(struct uf_pager *p, const struct uf_memory_options *o, struct uf_memory **ret);
uint64_t test_random(uint64_t *state);
// Until `done` says so, for 20 s at most.
bool test_wait(bool (*done)(void *), void *arg);

#endif
