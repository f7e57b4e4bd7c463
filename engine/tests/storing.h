// SPDX-License-Identifier: Apache-2.0
// A worker of the tests that stores what it is given, in a file of the program's. Blobs are "store PATH" or "staged PATH": the
// latter keeps what is written to itself until it is flushed. "store" also ends its process now and then, in a write. And
// "ok" and "die:N" are as in harness.c.
#ifndef UF_TEST_STORING_H
#define UF_TEST_STORING_H

#include <fcntl.h>

#include "harness.h"

enum { STORING_PAGE = 4096, STORING_PAGES = 4096, STORING_SOURCES = 64, STORING_THREADS = 4, STORING_DIES = 97 };

static struct storing {
	uint32_t generation;
	bool staged;
	int fd; // -1: the test pattern
	unsigned long dies;
	unsigned char *page[STORING_PAGES]; // written, and not flushed
} storing[STORING_SOURCES];

static struct uf_ring_client *storing_client;
static pthread_mutex_t storing_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_ulong storing_reads, storing_writes;

// Lock held.
static inline struct storing *storing_source(const struct uf_request *r)
{
	struct storing *s = &storing[r->source_id % STORING_SOURCES];
	if (s->generation == r->generation)
		return s;
	if (s->generation && s->fd >= 0)
		close(s->fd);
	for (int i = 0; i < STORING_PAGES; i++)
		free(s->page[i]);
	char blob[128] = "";
	uf_client_blob(storing_client, r->source_id, blob, sizeof(blob) - 1);
	char *path = strchr(blob, ' ');
	*s = (struct storing){.generation = r->generation, .staged = !strncmp(blob, "staged", 6), .fd = -1};
	if (!strncmp(blob, "die:", 4))
		s->dies = strtoul(blob + 4, NULL, 10);
	if (path)
		CHECK((s->fd = open(path + 1, O_RDWR | O_CLOEXEC)) >= 0, "%s", blob);
	return s;
}

static inline bool storing_moves(bool write, int fd, char *buffer, uint64_t length, uint64_t offset)
{
	ssize_t n = write ? pwrite(fd, buffer, length, (off_t)offset) : pread(fd, buffer, length, (off_t)offset);
	return n == (ssize_t)length;
}

static inline bool storing_read(struct storing *s, const struct uf_request *r)
{
	unsigned long n = atomic_fetch_add(&storing_reads, 1) + 1;
	if (s->dies && n % s->dies == 0)
		kill(getpid(), SIGKILL);
	if (s->fd < 0)
		test_fill(r->buffer, r->offset, r->length);
	else if (!storing_moves(false, s->fd, r->buffer, r->length, r->offset))
		return false;
	for (uint64_t k = 0; k < r->length; k += STORING_PAGE) {
		const unsigned char *page = s->page[(r->offset + k) / STORING_PAGE];
		if (page)
			memcpy((char *)r->buffer + k, page, r->length - k < STORING_PAGE ? r->length - k : STORING_PAGE);
	}
	return true;
}

static inline bool storing_write(struct storing *s, const struct uf_request *r)
{
	if (!s->staged) {
		// Half of it, and no more, is the worst that a store may do; the bytes come again.
		if ((atomic_fetch_add(&storing_writes, 1) + 1) % STORING_DIES == 0) {
			storing_moves(true, s->fd, r->buffer, r->length / 2, r->offset);
			kill(getpid(), SIGKILL);
		}
		return storing_moves(true, s->fd, r->buffer, r->length, r->offset);
	}
	for (uint64_t k = 0; k < r->length; k += STORING_PAGE) {
		unsigned char **page = &s->page[(r->offset + k) / STORING_PAGE];
		if (!*page)
			*page = calloc(1, STORING_PAGE);
		if (!*page)
			return false;
		memcpy(*page, (char *)r->buffer + k, r->length - k < STORING_PAGE ? r->length - k : STORING_PAGE);
	}
	return true;
}

static inline bool storing_flush(struct storing *s)
{
	for (int i = 0; i < STORING_PAGES; i++) {
		if (s->page[i] && !storing_moves(true, s->fd, (char *)s->page[i], STORING_PAGE, (uint64_t)i * STORING_PAGE))
			return false;
		free(s->page[i]);
		s->page[i] = NULL;
	}
	return true;
}

static void *storing_thread(void *arg)
{
	for (;;) {
		struct uf_request r;
		uf_client_take(storing_client, &r);
		if (r.kind == UF_REQUEST_STOP)
			_exit(0);
		if (r.kind == UF_REQUEST_DROP)
			continue;
		pthread_mutex_lock(&storing_lock);
		struct storing *s = storing_source(&r);
		bool good = r.kind == UF_REQUEST_READ ? storing_read(s, &r) : r.kind == UF_REQUEST_WRITE ? storing_write(s, &r) :
			    r.kind == UF_REQUEST_FLUSH ? storing_flush(s) : true;
		pthread_mutex_unlock(&storing_lock);
		int len = r.kind == UF_REQUEST_LOAD ? snprintf(r.buffer, r.capacity, "loaded") : 0;
		if (good)
			uf_client_done(storing_client, &r, (uint64_t)len);
		else
			uf_client_fail(storing_client, &r, "the store has no such bytes", 0);
	}
	return arg;
}

// Instead of test_start in a worker process: does not return there.
static inline void storing_start(int argc, char **argv)
{
	if (argc != 3 || strcmp(argv[1], "--worker"))
		return;
	CHECK(uf_client_attach(3, 4, 5, (unsigned)atoi(argv[2]), &storing_client) == 0);
	for (int i = 1; i < STORING_THREADS; i++) {
		pthread_t t;
		CHECK(pthread_create(&t, NULL, storing_thread, NULL) == 0);
	}
	storing_thread(NULL);
}

// A source of this process's file, for one memory.
static inline uint32_t storing_add(struct uf_pager *p, bool staged, int fd)
{
	char blob[128];
	snprintf(blob, sizeof(blob), "%s /proc/%d/fd/%d", staged ? "staged" : "store", (int)getpid(), fd);
	return test_worker_source(p, blob);
}

#endif
