// SPDX-License-Identifier: Apache-2.0
// What the tests of writable memory share: an array, and beside it what it should hold.
#ifndef UF_TEST_WRITING_H
#define UF_TEST_WRITING_H

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "internal.h"
#include "support.h"

struct array {
	struct uf_pager *pager;
	struct uf_memory *m;
	uint8_t *at, *want; // the array; what it should hold
	uint64_t length, block, blocks;
};

static inline struct array array_of(struct uf_pager *p, struct uf_memory_options o, const void *before)
{
	struct array a = {.pager = p, .length = o.nbytes, .block = o.block ? o.block : 65536};
	a.blocks = (a.length + a.block - 1) / a.block;
	test_memory_source(p, &o, &a.m);
	a.at = uf_memory_address(a.m);
	a.want = calloc(1, a.length);
	CHECK(a.want);
	if (before)
		memcpy(a.want, before, a.length);
	return a;
}

static inline void array_end(struct array *a)
{
	uf_memory_destroy(a->m);
	free(a->want);
}

static inline void pager_end(struct uf_pager *p)
{
	test_settle(p);
	test_end(p);
}

struct coming {
	const struct array *a;
	uint64_t block;
	enum uf_state state;
};

static inline bool has_come(void *arg)
{
	struct coming *c = arg;
	return test_state(c->a->m, c->block) == c->state;
}

// A thread that was woken by UFFDIO_COPY itself is awake before its block's new state is stored.
static inline void comes_to(const struct array *a, uint64_t block, enum uf_state state)
{
	struct coming c = {a, block, state};
	CHECK(test_wait(has_come, &c), "block %llu is in state %d, not %d", (unsigned long long)block, test_state(a->m, block), state);
}

// Bytes that compress (kind 0), that do not (1), or zeros (2).
static inline void array_write(struct array *a, uint64_t offset, uint64_t length, int kind, uint64_t seed)
{
	uint64_t r = seed * 0x9e3779b97f4a7c15u + 1;
	for (uint64_t i = 0; i < length; i++) {
		uint8_t b = kind == 0 ? (uint8_t)(seed + i / 300 + 1) : kind == 1 ? (uint8_t)test_random(&r) : 0;
		a->at[offset + i] = a->want[offset + i] = b;
	}
}

static inline void array_right(const struct array *a, const char *when)
{
	for (uint64_t b = 0; b < a->blocks; b++) {
		uint64_t at = b * a->block, n = uf_min(a->block, a->length - at);
		for (uint64_t i = memcmp(a->at + at, a->want + at, n) ? 0 : n; i < n; i++)
			CHECK(a->at[at + i] == a->want[at + i], "%s: byte %llu (block %llu, state %d) is %d, not %d", when,
			      (unsigned long long)(at + i), (unsigned long long)b, test_state(a->m, b), a->at[at + i], a->want[at + i]);
	}
}

static inline void file_right(const struct array *a, int fd, const char *when)
{
	uint8_t *there = malloc(a->length);
	CHECK(there && pread(fd, there, a->length, 0) == (ssize_t)a->length, "%s", when);
	for (uint64_t i = memcmp(there, a->want, a->length) ? 0 : a->length; i < a->length; i++)
		CHECK(there[i] == a->want[i], "%s: byte %llu of the file is %d, not %d", when, (unsigned long long)i, there[i], a->want[i]);
	free(there);
}

static inline void flush_well(const struct array *a, const char *when)
{
	struct uf_failure why = {0};
	uint32_t n;
	int err = uf_memory_flush(a->m, 0, a->blocks, &why, 1, &n);
	CHECK(err == 0 && n == 0, "%s: flush: %d, %u blocks, %s", when, err, n, why.message);
}

static inline void evict_all(const struct array *a, const char *when)
{
	uf_memory_evict(a->m, 0, a->blocks);
	for (uint64_t b = 0; b < a->blocks; b++)
		CHECK(test_state(a->m, b) == UF_ABSENT, "%s: block %llu is in state %d", when, (unsigned long long)b, test_state(a->m, b));
}

#endif
