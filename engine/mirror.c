// SPDX-License-Identifier: Apache-2.0
// The calls of mirror.h: they hand the handler thread requests. Their arguments and results may lie in watched memory, so they
// are copied between two requests, never inside one.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "mirror_internal.h"

enum { HUGE = 2 << 20, HEAP = 64 << 20 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // one call at a time; the handler never takes it
struct uf_mirror *uf_mirror_running;

void uf_mirror_lock(void)
{
	pthread_mutex_lock(&lock);
}

void uf_mirror_unlock(void)
{
	pthread_mutex_unlock(&lock);
}

void uf_mirror_lock_forked(void)
{
	pthread_mutex_init(&lock, NULL);
}

int uf_mirror_ask(struct uf_mirror *m)
{
	uint32_t mine = atomic_load_explicit(&m->posted, memory_order_relaxed) + 1;
	m->request.err = 0;
	m->request.nreply = 0;
	atomic_store_explicit(&m->posted, mine, memory_order_release);
	uf_bell_ring(m->bell);
	for (uint32_t now; (now = atomic_load_explicit(&m->finished, memory_order_acquire)) != mine;)
		uf_futex_wait(&m->finished, now, 1000000000u);
	return m->request.err;
}

void uf_mirror_unmap(struct uf_mirror *m)
{
	int fds[] = {m->uffd, m->trash_uffd, m->bell, m->pagemap};
	for (unsigned i = 0; i < 4; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	if (m->trash)
		munmap(m->trash, (UF_MIRROR_TRASH + 1) * m->page);
	munmap(m, sizeof(*m));
}

static void *map(size_t length)
{
	void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static int open_fds(struct uf_mirror *m)
{
	int err = uf_uffd_open(false, UFFD_FEATURE_MOVE | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_REMAP |
						  UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP, &m->uffd);
	if (!err)
		err = uf_uffd_open(false, UFFD_FEATURE_MOVE, &m->trash_uffd);
	if (err)
		return err;
	m->bell = uf_high_fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	m->pagemap = uf_high_fd(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
	if (m->bell < 0 || m->pagemap < 0)
		return -errno;
	m->trash = map((UF_MIRROR_TRASH + 1) * m->page);
	if (!m->trash)
		return -ENOMEM;
	madvise(m->trash, (UF_MIRROR_TRASH + 1) * m->page, MADV_NOHUGEPAGE);
	m->zero = m->trash + UF_MIRROR_TRASH * m->page;
	struct uffdio_register r = {.range = {(uintptr_t)m->trash, UF_MIRROR_TRASH * m->page}, .mode = UFFDIO_REGISTER_MODE_WP};
	return ioctl(m->trash_uffd, UFFDIO_REGISTER, &r) ? -errno : 0;
}

int uf_mirror_available(void)
{
	const struct uf_host *host = uf_host_probe();
	if (!host->open_via && host->open_errno == ENOSYS)
		return -ENOSYS;
	if (!host->open_via || host->open_via == 3)
		return -EPERM;
	return host->move ? 0 : -ENOSYS;
}

// Lock held.
static int start(struct uf_mirror **ret)
{
	if (uf_mirror_running) {
		*ret = uf_mirror_running;
		return 0;
	}
	int err = uf_mirror_available();
	if (err)
		return err;
	uf_mirror_fork_handlers();
	struct uf_mirror *m = map(sizeof(*m));
	if (!m)
		return -ENOMEM;
	m->page = (uint64_t)sysconf(_SC_PAGESIZE);
	m->uffd = m->trash_uffd = m->bell = m->pagemap = -1;
	err = open_fds(m);
	if (!err)
		err = uf_thread_start(&m->thread, uf_mirror_thread, m);
	if (err) {
		uf_mirror_unmap(m);
		return err;
	}
	*ret = uf_mirror_running = m;
	return 0;
}

// Lock held. With nothing left to watch nothing of it stays.
static void stop_if_idle(struct uf_mirror *m)
{
	if (atomic_load_explicit(&m->pages, memory_order_relaxed))
		return;
	m->request.op = UF_MIRROR_STOP;
	uf_mirror_ask(m);
	pthread_join(m->thread, NULL);
	uf_mirror_running = NULL;
	uf_mirror_unmap(m);
}

// Takes the next runs into the request. Returns how many.
static uint32_t load(struct uf_mirror *m, const struct uf_span *runs, size_t n)
{
	uint32_t count = (uint32_t)uf_min(n, UF_MIRROR_SPANS);
	memcpy(m->request.spans, runs, count * sizeof(*runs));
	m->request.n = count;
	m->request.at = 0;
	m->request.address = count ? m->request.spans[0].start : 0;
	return count;
}

struct list {
	struct uf_found *at;
	size_t n, capacity;
	bool failed;
};

static void append(struct list *l, const struct uf_found *f)
{
	if (l->n && l->at[l->n - 1].end == f->start && l->at[l->n - 1].what == f->what) {
		l->at[l->n - 1].end = f->end;
		return;
	}
	if (l->n == l->capacity) {
		size_t capacity = l->capacity ? l->capacity * 2 : 256;
		struct uf_found *at = realloc(l->at, capacity * sizeof(*at));
		if (!at) {
			l->failed = true; // what was taken is lost: told as an error
			return;
		}
		l->at = at;
		l->capacity = capacity;
	}
	l->at[l->n++] = *f;
}

static int take(struct uf_mirror *m, const struct uf_span *runs, size_t n, bool rearm, bool last, bool strict, struct list *found,
		struct list *busy)
{
	m->request.op = UF_MIRROR_TAKE;
	m->request.rearm = rearm;
	m->request.last = last;
	m->request.strict = strict;
	while (n) {
		uint32_t count = load(m, runs, n);
		while (m->request.at < m->request.n) {
			int err = uf_mirror_ask(m);
			for (uint32_t i = 0; i < m->request.nreply; i++) {
				struct uf_found f = m->request.reply[i];
				append(f.what == UF_FOUND_BUSY ? busy : found, &f);
			}
			if (err)
				return err;
		}
		runs += count;
		n -= count;
	}
	return found->failed || busy->failed ? -ENOMEM : 0;
}

// A page that a forked child shares, or shared, is this process's alone afterwards: to pin it for reading copies it if it must,
// and keeps its protection, so that no write goes unnoticed meanwhile (a touch would lift it).
static void make_exclusive(uint64_t address)
{
	char byte;
	struct iovec here = {&byte, 1}, there = {(void *)(uintptr_t)address, 1};
	ssize_t ignored = process_vm_readv(getpid(), &here, 1, &there, 1, 0);
	(void)ignored;
}

// Lock held. Pages that are shared with a child are made exclusive and tried again; what is still refused is pinned.
static int collect(struct uf_mirror *m, const struct uf_span *runs, size_t n, bool rearm, bool strict, struct list *found)
{
	struct list busy = {0};
	int err = take(m, runs, n, rearm, false, strict, found, &busy);
	if (!err && busy.n) {
		struct uf_span *again = malloc(busy.n * sizeof(*again));
		for (size_t i = 0; i < busy.n; i++) {
			uf_cut_huge_page((void *)(uintptr_t)busy.at[i].start, busy.at[i].end - busy.at[i].start);
			if (again)
				again[i] = (struct uf_span){busy.at[i].start, busy.at[i].end};
			for (uint64_t a = busy.at[i].start; a < busy.at[i].end; a += m->page)
				make_exclusive(a);
		}
		err = again ? take(m, again, busy.n, rearm, true, strict, found, &busy) : -ENOMEM;
		free(again);
	}
	free(busy.at);
	return err;
}

static int finish(struct uf_mirror *m, const struct uf_span *runs, size_t n)
{
	while (n) {
		m->request.op = UF_MIRROR_END;
		uint32_t count = load(m, runs, n);
		uf_mirror_ask(m);
		runs += count;
		n -= count;
	}
	stop_if_idle(m);
	return 0;
}

// True where malloc keeps its own data between the program's: the heap of brk, and the heaps of threads, which begin at
// multiples of 64 MiB with {arena, previous, size, size that is writable}.
static bool in_heap(uint64_t start, uint64_t end)
{
	uint64_t top = (uintptr_t)sbrk(0), head[4] = {0};
	if (start < top && top - start < (1ull << 40) && end <= ((top + 4095) & ~4095ull))
		return true;
	uint64_t heap = start & ~(HEAP - 1ull);
	struct iovec here = {head, sizeof(head)}, there = {(void *)(uintptr_t)heap, sizeof(head)};
	if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != sizeof(head))
		return false;
	return head[0] && head[2] && head[2] <= HEAP && !(head[2] & 4095) && head[3] >= head[2] && head[3] <= HEAP &&
	       end <= heap + HEAP;
}

static bool overlaps(uint64_t start, uint64_t end, const void *p, size_t length)
{
	return start < (uintptr_t)p + length && end > (uintptr_t)p;
}

// What the handler itself works with.
static bool is_ours(struct uf_mirror *m, uint64_t start, uint64_t end)
{
	pthread_attr_t attr;
	void *stack = NULL;
	size_t size = 0;
	if (!pthread_getattr_np(m->thread, &attr)) {
		pthread_attr_getstack(&attr, &stack, &size);
		pthread_attr_destroy(&attr);
	}
	return overlaps(start, end, m, sizeof(*m)) || overlaps(start, end, m->trash, UF_MIRROR_TRASH * m->page) ||
	       overlaps(start, end, stack, size) || overlaps(start, end, &uf_mirror_running, sizeof(uf_mirror_running));
}

static int add(struct uf_mirror *m, uint64_t start, uint64_t end)
{
	if (start >= end || (start | end) & (m->page - 1) || is_ours(m, start, end))
		return -EINVAL;
	// The states, then the pages, at the same place within a huge page as the area: so huge pages move whole.
	uint64_t n = (end - start) / m->page, states = (sizeof(struct uf_book) + n + m->page - 1) & ~(m->page - 1);
	size_t length = states + HUGE + (end - start);
	struct uf_book *book = map(length);
	if (!book)
		return -ENOMEM;
	*book = (struct uf_book){length, 1, NULL};
	uint64_t mirror = (uintptr_t)book + states;
	mirror += (start - mirror) & (HUGE - 1);
	uint8_t *state = (uint8_t *)(book + 1);
	memset(state, UF_PAGE_BLIND, n);
	m->request.op = UF_MIRROR_ADD;
	m->request.piece = (struct uf_piece){start, end, mirror, state, book, in_heap(start, end), false};
	// Memory that was not mapped a moment ago may be what we just got.
	int err = overlaps(start, end, book, length) ? -ENOMEM : uf_mirror_ask(m);
	while (err == -EAGAIN) { // the program is about to drop a part of it
		usleep(1000);
		err = uf_mirror_ask(m);
	}
	if (err)
		munmap(book, length);
	return err;
}

int uf_mirror_begin(const struct uf_span *runs, size_t n)
{
	struct uf_mirror *m = NULL;
	struct list found = {0};
	uf_mirror_lock();
	int err = start(&m);
	if (!err) {
		size_t done = 0;
		for (; !err && done < n; done += !err)
			err = add(m, runs[done].start, runs[done].end);
		if (!err)
			err = collect(m, runs, n, true, true, &found);
		if (err)
			finish(m, runs, done);
	}
	uf_mirror_unlock();
	free(found.at);
	return err;
}

int uf_mirror_collect(const struct uf_span *runs, size_t n, bool rearm, struct uf_found **ret, size_t *count)
{
	struct list found = {0};
	uf_mirror_lock();
	struct uf_mirror *m = uf_mirror_running;
	int err = 0;
	if (m)
		err = collect(m, runs, n, rearm, false, &found);
	else
		for (size_t i = 0; i < n; i++)
			append(&found, &(struct uf_found){runs[i].start, runs[i].end, UF_FOUND_BLIND});
	uf_mirror_unlock();
	*ret = found.at;
	*count = found.n;
	return err;
}

int uf_mirror_end(const struct uf_span *runs, size_t n)
{
	uf_mirror_lock();
	if (uf_mirror_running)
		finish(uf_mirror_running, runs, n);
	uf_mirror_unlock();
	return 0;
}

void uf_mirror_stats(struct uf_mirror_stats *ret)
{
	*ret = (struct uf_mirror_stats){0};
	uf_mirror_lock();
	struct uf_mirror *m = uf_mirror_running;
	if (m) {
		m->request.op = UF_MIRROR_LOOK; // a thread goes on before its fault is counted
		uf_mirror_ask(m);
		*ret = (struct uf_mirror_stats){m->reads, m->writes, m->upgrades, m->pages};
	}
	uf_mirror_unlock();
}
