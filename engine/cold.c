// SPDX-License-Identifier: Apache-2.0
// The calls of cold.h, and fork. What the thread does is in cold_serve.c.
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cold_internal.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // one call at a time; threads of faults never take it
static struct uf_cold *all;
// While forked children read what was evicted: the ends of pipes that they hold. No eviction writes to a store meanwhile.
enum { READERS = 64 };
static int child_reads[READERS], nreaders, child_end = -1;

// Lock held. The arguments may lie in memory that was evicted: they are copied before.
static int ask(struct uf_cold *c, enum uf_cold_op op)
{
	uint32_t mine = atomic_load_explicit(&c->posted, memory_order_relaxed) + 1;
	c->op = op;
	c->err = 0;
	c->nreply = 0;
	atomic_store_explicit(&c->posted, mine, memory_order_release);
	uf_bell_ring(c->bell);
	for (uint32_t now; (now = atomic_load_explicit(&c->finished, memory_order_acquire)) != mine;)
		uf_futex_wait(&c->finished, now, 1000000000u);
	return c->err;
}

static void release(struct uf_cold *c)
{
	int fds[] = {c->uffd, c->bell, c->pagemap, c->store};
	for (unsigned i = 0; i < 4; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	if (c->staging)
		munmap(c->staging, UF_COLD_CHUNK * c->page);
	munmap(c, c->length);
}

static void *map(size_t length)
{
	void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static int prepare(struct uf_cold *c, int store)
{
	c->uffd = c->bell = c->pagemap = c->store = -1;
	int err = uf_uffd_open(false, UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC | UFFD_FEATURE_MOVE | UFFD_FEATURE_POISON |
						  UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP,
			       &c->uffd);
	if (err)
		return err;
	c->store = uf_high_dup(store);
	c->bell = uf_high_fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	c->pagemap = uf_high_fd(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
	if (c->store < 0 || c->bell < 0 || c->pagemap < 0)
		return -errno;
	c->staging = map(UF_COLD_CHUNK * c->page);
	if (!c->staging)
		return -ENOMEM;
	madvise(c->staging, UF_COLD_CHUNK * c->page, MADV_NOHUGEPAGE);
	struct uffdio_register area = {.range = {c->start, c->end - c->start},
				       .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_RWP};
	if (ioctl(c->uffd, UFFDIO_REGISTER, &area))
		return -errno;
	err = uf_cold_staging(c, true);
	if (err)
		return err;
	// Whether it can be moved is found out by trying. There is a page already where it would go: it stays where it is.
	*(volatile char *)c->staging = 0;
	struct uffdio_move out = {(uintptr_t)c->staging, c->start, c->page,
				  UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES | UFFDIO_MOVE_MODE_DONTWAKE, 0};
	if (ioctl(c->uffd, UFFDIO_MOVE, &out) && errno == EINVAL)
		return -EINVAL;
	err = uf_cold_staging(c, false);
	if (err)
		return err;
	madvise(c->staging, UF_COLD_CHUNK * c->page, MADV_DONTNEED);
	err = uf_cold_staging(c, true);
	if (err)
		return err;
	return uf_thread_start(&c->thread, uf_cold_thread, c);
}

int uf_cold_create(uint64_t start, uint64_t end, int store, uint64_t offset, struct uf_cold **ret)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	if (start >= end || (start | end) & (page - 1))
		return -EINVAL;
	// What the kernel lacks comes first: no permission helps there.
	const struct uf_host *host = uf_host_probe();
	if (host->open_via && !(host->features & UFFD_FEATURE_RWP_ASYNC))
		return -ENOSYS;
	int err = uf_mirror_available();
	if (err)
		return err;
	uf_cold_fork_handlers();
	size_t length = sizeof(struct uf_cold) + (end - start) / page;
	struct uf_cold *c = map(length);
	if (!c)
		return -ENOMEM;
	c->length = length;
	c->page = page;
	c->start = start;
	c->end = end;
	c->offset = offset;
	pthread_mutex_lock(&lock);
	err = prepare(c, store);
	if (err) {
		release(c);
	} else {
		c->next = all;
		all = c;
		*ret = c;
	}
	pthread_mutex_unlock(&lock);
	return err;
}

int uf_cold_detect(struct uf_cold *c)
{
	pthread_mutex_lock(&lock);
	int err = ask(c, UF_COLD_DETECT);
	pthread_mutex_unlock(&lock);
	return err;
}

// Lock held. Before a store is written to: children may read it.
static void wait_for_child(void)
{
	while (nreaders) {
		struct pollfd f = {child_reads[--nreaders], POLLIN, 0};
		while (poll(&f, 1, -1) < 0 && errno == EINTR)
			;
		close(f.fd);
	}
}

int uf_cold_evict(struct uf_cold *c, const struct uf_span *runs, size_t n, struct uf_span **ret, size_t *count)
{
	struct uf_span *list = NULL;
	size_t have = 0, capacity = 0;
	int err = 0;
	pthread_mutex_lock(&lock);
	wait_for_child();
	for (size_t i = 0; i < n && !err; i++) {
		c->at = runs[i].start;
		c->until = runs[i].end;
		while (c->at < c->until && !err) {
			err = ask(c, UF_COLD_EVICT);
			if (have + c->nreply > capacity) {
				size_t more = (have + c->nreply) * 2;
				struct uf_span *bigger = realloc(list, more * sizeof(*list));
				if (!bigger) {
					err = -ENOMEM;
					break;
				}
				list = bigger;
				capacity = more;
			}
			for (uint32_t k = 0; k < c->nreply; k++) {
				if (have && list[have - 1].end == c->reply[k].start)
					list[have - 1].end = c->reply[k].end;
				else
					list[have++] = c->reply[k];
			}
		}
	}
	if (n)
		ask(c, UF_COLD_EVICTED);
	pthread_mutex_unlock(&lock);
	*ret = list;
	*count = have;
	return err;
}

void uf_cold_stats(struct uf_cold *c, struct uf_cold_stats *ret)
{
	pthread_mutex_lock(&lock);
	ask(c, UF_COLD_LOOK);
	*ret = c->stats;
	pthread_mutex_unlock(&lock);
}

int uf_cold_close(struct uf_cold *c)
{
	pthread_mutex_lock(&lock);
	int err = ask(c, UF_COLD_CLOSE);
	pthread_join(c->thread, NULL);
	struct uf_cold **p = &all;
	while (*p != c)
		p = &(*p)->next;
	*p = c->next;
	release(c);
	if (!all)
		wait_for_child();
	pthread_mutex_unlock(&lock);
	return err;
}

// --- fork: the child reads back what was evicted, before fork returns there

static void before_fork(void)
{
	pthread_mutex_lock(&lock);
	int ends[2];
	if (nreaders == READERS)
		wait_for_child();
	if (!all || pipe2(ends, O_CLOEXEC))
		return;
	child_reads[nreaders++] = uf_high_fd(ends[0]);
	child_end = uf_high_fd(ends[1]);
}

static void in_parent(void)
{
	if (child_end >= 0)
		close(child_end);
	child_end = -1;
	pthread_mutex_unlock(&lock);
}

// Where the parent's page was in the store, and not on its way back, the child's is missing.
static void restore(struct uf_cold *c)
{
	close(c->bell); // the program may have used up all descriptors: makes room for one
	c->bell = -1;
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		_exit(127);
	for (uint64_t a = c->start; a < c->end; a += c->page) {
		uint64_t at = (a - c->start), entry = 0, to = a;
		uint8_t s = c->state[at / c->page];
		for (unsigned i = 0; s == UF_COLD_LEAVING && i < c->nleaving; i++)
			if (a - c->leaving[i].from < c->leaving[i].length)
				to = c->leaving[i].to + (a - c->leaving[i].from);
		if (s != UF_COLD_OUT && s != UF_COLD_LEAVING)
			continue;
		if (pread(pagemap, &entry, sizeof(entry), (off_t)(to / c->page * sizeof(entry))) != sizeof(entry))
			_exit(127);
		if (entry >> 62)
			continue;
		for (uint64_t n = 0; n < c->page;) {
			ssize_t got = pread(c->store, (char *)(uintptr_t)to + n, c->page - n, (off_t)(c->offset + at + n));
			if (got < 0 && errno == EINTR)
				continue;
			if (got <= 0)
				_exit(127); // zeros would follow
			n += (uint64_t)got;
		}
	}
	close(pagemap);
}

static void in_child(void)
{
	pthread_mutex_init(&lock, NULL);
	while (all) {
		struct uf_cold *c = all;
		all = c->next;
		restore(c);
		release(c);
	}
	if (child_end >= 0)
		close(child_end);
	while (nreaders)
		close(child_reads[--nreaders]);
	child_end = -1;
}

static void install(void)
{
	pthread_atfork(before_fork, in_parent, in_child);
}

void uf_cold_fork_handlers(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, install);
}
