// SPDX-License-Identifier: Apache-2.0
// Devices that write to blocks which are evicted and flushed meanwhile: behind any protection, to the pages that they got hold
// of. With UFFDIO_MOVE the engine sees that pages are pinned; without it such memory has to be pinned by its user, too.
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/syscall.h>

#include "writing.h"

enum { BLOCK = 65536, BLOCKS = 4 };

static int device; // a file of known bytes, opened with O_DIRECT
static uint8_t *bytes;

static void evictor(struct test_crowd *c, int number)
{
	struct uf_failure why;
	uint32_t n;
	while (!atomic_load(&c->stop)) {
		if (number)
			uf_memory_evict(c->arg, 0, BLOCKS);
		else
			uf_memory_flush(c->arg, 0, BLOCKS, &why, 1, &n);
	}
}

// False: its file system has no O_DIRECT, and the kernel copies.
static bool open_device(void)
{
	char path[] = "/var/tmp/uf-test-XXXXXX", plain[] = "/var/tmp/uf-test-XXXXXX";
	bool direct = (device = mkostemp(path, O_DIRECT)) >= 0;
	if (!direct)
		device = mkostemp(plain, 0);
	CHECK(device >= 0, "%s", strerror(errno));
	unlink(direct ? path : plain);
	CHECK(posix_memalign((void **)&bytes, 4096, 2 * BLOCK) == 0);
	test_fill(bytes, 12345, 2 * BLOCK);
	CHECK(pwrite(device, bytes, 2 * BLOCK, 0) == 2 * BLOCK, "%s", strerror(errno));
	return direct;
}

static struct array begin(bool no_move, int *store)
{
	struct uf_pager_options po = test_options(1 << 30);
	po.no_move = no_move;
	struct uf_pager *p;
	CHECK(uf_pager_create(&po, &p) == 0);
	*store = memfd_create("file", MFD_CLOEXEC);
	CHECK(*store >= 0 && pwrite(*store, test_reference(BLOCKS * BLOCK), BLOCKS * BLOCK, 0) == BLOCKS * BLOCK);
	struct uf_memory_options o = {.nbytes = BLOCKS * BLOCK, .block = BLOCK, .source = UF_SOURCE_FILE, .fd = *store,
				      .store = UF_STORE_SOURCE};
	struct array a = array_of(p, o, test_reference(BLOCKS * BLOCK));
	struct uf_failure why;
	CHECK(!no_move || uf_memory_pin(a.m, 0, BLOCKS, &why) == 0, "%s", why.message);
	return a;
}

static void end(struct array *a, bool no_move, int store)
{
	array_right(a, "written by a device");
	flush_well(a, "written by a device");
	file_right(a, store, "written by a device");
	CHECK(!no_move || uf_memory_unpin(a->m, 0, BLOCKS) == 0);
	evict_all(a, "written by a device");
	array_right(a, "from the store");
	file_right(a, store, "in the end");
	array_end(a);
	close(store);
	pager_end(a->pager);
}

static void direct_reads(bool no_move)
{
	int store;
	struct array a = begin(no_move, &store);
	static struct test_crowd c;
	test_crowd_start(&c, 2, evictor, a.m);
	for (int i = 0; i < test_rounds(200); i++) {
		uint64_t at = (uint64_t)(i % 3) * BLOCK + (uint64_t)(i % 5) * 4096, n = BLOCK;
		memset(a.at + at, 0, n);
		memset(a.want + at, 0, n);
		ssize_t got = pread(device, a.at + at, n, 4096);
		CHECK(got == (ssize_t)n, "read %d: %zd, %s", i, got, strerror(errno));
		memcpy(a.want + at, bytes + 4096, n);
		for (uint64_t k = 0; k < n; k++)
			CHECK(a.at[at + k] == bytes[4096 + k], "read %d: byte %llu is lost", i, (unsigned long long)k);
	}
	test_crowd_stop(&c, "flush and evict");
	end(&a, no_move, store);
}

// --- io_uring, by its system calls: nothing but a ring of one entry

struct ring {
	int fd;
	struct io_uring_params params;
	char *sq, *cq;
	struct io_uring_sqe *sqes;
};

static void *ring_map(const struct ring *r, size_t length, uint64_t offset)
{
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, (off_t)offset);
	CHECK(at != MAP_FAILED);
	return at;
}

static bool ring_open(struct ring *r)
{
	*r = (struct ring){0};
	r->fd = (int)syscall(SYS_io_uring_setup, 4, &r->params);
	if (r->fd < 0)
		return false;
	r->sq = ring_map(r, r->params.sq_off.array + r->params.sq_entries * sizeof(uint32_t), IORING_OFF_SQ_RING);
	r->cq = ring_map(r, r->params.cq_off.cqes + r->params.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	r->sqes = ring_map(r, r->params.sq_entries * sizeof(*r->sqes), IORING_OFF_SQES);
	return true;
}

static void ring_close(struct ring *r)
{
	munmap(r->sq, r->params.sq_off.array + r->params.sq_entries * sizeof(uint32_t));
	munmap(r->cq, r->params.cq_off.cqes + r->params.cq_entries * sizeof(struct io_uring_cqe));
	munmap(r->sqes, r->params.sq_entries * sizeof(*r->sqes));
	close(r->fd);
}

static int read_fixed(struct ring *r, void *to, uint32_t n, uint64_t offset)
{
	_Atomic uint32_t *tail = (void *)(r->sq + r->params.sq_off.tail), *head = (void *)(r->cq + r->params.cq_off.head);
	uint32_t mask = *(uint32_t *)(r->sq + r->params.sq_off.ring_mask), at = *tail & mask;
	r->sqes[at] = (struct io_uring_sqe){.opcode = IORING_OP_READ_FIXED, .fd = device, .off = offset, .addr = (uintptr_t)to, .len = n};
	((uint32_t *)(r->sq + r->params.sq_off.array))[at] = at;
	atomic_fetch_add(tail, 1);
	while (syscall(SYS_io_uring_enter, r->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
		CHECK(errno == EINTR, "%s", strerror(errno));
	struct io_uring_cqe *cqes = (void *)(r->cq + r->params.cq_off.cqes);
	uint32_t seen = atomic_load(head) & *(uint32_t *)(r->cq + r->params.cq_off.ring_mask);
	int result = cqes[seen].res;
	atomic_fetch_add(head, 1);
	return result;
}

// The buffer is registered once, and its pages stay the ones that the kernel knows: evicting them would cut it off.
static void fixed_buffers(bool no_move)
{
	struct ring r;
	if (!ring_open(&r)) {
		printf("  no io_uring here: %s\n", strerror(errno));
		return;
	}
	int store;
	struct array a = begin(no_move, &store);
	struct iovec buffer = {a.at, 2 * BLOCK};
	static struct test_crowd c;
	test_crowd_start(&c, 2, evictor, a.m);
	CHECK(syscall(SYS_io_uring_register, r.fd, IORING_REGISTER_BUFFERS, &buffer, 1) == 0, "%s", strerror(errno));
	for (int i = 0; i < test_rounds(200); i++) {
		uint64_t at = (uint64_t)(i % 7) * 4096, from = (uint64_t)(i % 3) * 4096;
		uint32_t n = BLOCK;
		int got = read_fixed(&r, a.at + at, n, from);
		CHECK(got == (int)n, "read %d: %d", i, got);
		memcpy(a.want + at, bytes + from, n);
		for (uint64_t k = 0; k < 2 * BLOCK; k++)
			CHECK(a.at[k] == a.want[k], "read %d: byte %llu is lost", i, (unsigned long long)k);
		poll(NULL, 0, i % 4 == 0);
	}
	CHECK(syscall(SYS_io_uring_register, r.fd, IORING_UNREGISTER_BUFFERS, NULL, 0) == 0);
	test_crowd_stop(&c, "flush and evict");
	ring_close(&r); // pages are let go some time after that
	poll(NULL, 0, 50);
	end(&a, no_move, store);
}

int main(void)
{
	test_reference(8 << 20);
	test_guard();
	bool direct = open_device();
	if (!direct)
		printf("  no O_DIRECT in /var/tmp: io_uring alone\n");
	for (int no_move = 0; no_move < 2; no_move++) {
		if (!no_move && !uf_host_probe()->move)
			continue; // such memory has to be pinned: as the other round does
		if (direct)
			direct_reads(no_move);
		fixed_buffers(no_move);
	}
	free(bytes);
	close(device);
	CHECK(test_threads_left(test_base_threads()));
	return 0;
}
