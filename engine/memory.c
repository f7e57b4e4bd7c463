// SPDX-License-Identifier: Apache-2.0
// Memories: creation, close, and what their users ask of them.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum { TMPFS_MAGIC_NUMBER = 0x01021994, RAMFS_MAGIC_NUMBER = 0x858458f6 };

bool uf_is_paged(const void *address, size_t len)
{
	uintptr_t a = (uintptr_t)address;
	bool found = false;
	pthread_mutex_lock(&uf_registry_lock);
	for (struct uf_pager *p = uf_pagers; p && !found; p = p->next) {
		pthread_mutex_lock(&p->lock);
		for (uint32_t i = 0; i < p->memories_capacity && !found; i++) {
			struct uf_memory *m = p->memories[i];
			found = m && a < (uintptr_t)m->base + m->length && a + len > (uintptr_t)m->base;
		}
		pthread_mutex_unlock(&p->lock);
	}
	pthread_mutex_unlock(&uf_registry_lock);
	return found;
}

static int add_to_table(struct uf_pager *p, struct uf_memory *m)
{
	uint32_t id = 0;
	while (id < p->memories_capacity && p->memories[id])
		id++;
	if (id == p->memories_capacity) {
		uint32_t capacity = id ? id * 2 : 16;
		struct uf_memory **table = realloc(p->memories, capacity * sizeof(*table));
		if (!table)
			return -ENOMEM;
		memset(table + id, 0, (capacity - id) * sizeof(*table));
		p->memories = table;
		p->memories_capacity = capacity;
	}
	m->id = id;
	p->memories[id] = m;
	return 0;
}

// Reserves the range, 2 MiB aligned. Writable if that helps (MOVE refuses anything else), read-only otherwise.
static int reserve(struct uf_memory *m, bool writable)
{
	m->reserve_length = m->length + UF_EXTENT;
	int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
	char *r = mmap(NULL, m->reserve_length, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (r == MAP_FAILED)
		return -errno;
	m->base = (char *)(((uintptr_t)r + UF_EXTENT - 1) & ~(uintptr_t)(UF_EXTENT - 1));
	size_t head = (size_t)(m->base - r), tail = UF_EXTENT - head;
	if (head)
		munmap(r, head);
	if (tail)
		munmap(m->base + m->length, tail);
	m->reserve = m->base;
	m->reserve_length = m->length;
	// Before registering: afterwards it could split the mapping, which breaks COPY across the split.
	madvise(m->base, m->length, MADV_DONTDUMP);
	return 0;
}

static int register_range(struct uf_memory *m)
{
	const struct uf_host *host = uf_host_probe();
	uint64_t features = host->features & (m->delivery == UF_DELIVERY_DIRECT ? UFFD_FEATURE_SIGBUS : UFFD_FEATURE_THREAD_ID);
	int err = uf_uffd_open(m->pager->options.user_mode_only, features, &m->uffd);
	if (err)
		return err;
	struct uffdio_register r = {
		.range = {(uintptr_t)m->base, m->length},
		.mode = UFFDIO_REGISTER_MODE_MISSING | (m->wp ? UFFDIO_REGISTER_MODE_WP : 0),
	};
	err = ioctl(m->uffd, UFFDIO_REGISTER, &r) ? -errno : 0;
	// Pages that are there already never fault: mlockall(MCL_FUTURE) populates new mappings with zeros, and a neighbour's
	// huge page may have covered some of them before.
	if (!err) {
		munlock(m->base, m->length); // MADV_DONTNEED refuses locked mappings
		err = madvise(m->base, m->length, MADV_DONTNEED) ? -errno : 0;
	}
	if (err) {
		close(m->uffd);
		m->uffd = -1;
	}
	return err;
}

static int file_setup(struct uf_memory *m, int fd)
{
	m->fd = uf_high_dup(fd);
	if (m->fd < 0)
		return -errno;
	struct statfs fs;
	// preadv2(RWF_NOWAIT) is not known to tmpfs, whose reads never wait anyway.
	m->inline_file = !fstatfs(m->fd, &fs) &&
			 ((unsigned long)fs.f_type == TMPFS_MAGIC_NUMBER || (unsigned long)fs.f_type == RAMFS_MAGIC_NUMBER);
	return 0;
}

static size_t dirty_bytes(const struct uf_memory *m)
{
	return (m->nblocks + 63) / 64 * sizeof(*m->dirty);
}

// The tables of writable memories.
static void free_tables(struct uf_memory *m)
{
	if (m->dirty)
		munmap(m->dirty, dirty_bytes(m));
	if (m->unsynced)
		munmap(m->unsynced, dirty_bytes(m));
	if (m->spilled)
		munmap(m->spilled, m->nblocks * sizeof(*m->spilled));
	uf_scratch_close(m);
	free(m->pins);
}

// Zero pages that nobody touched cost nothing: tables of a 6 TB array are mostly address space.
static void *table(size_t bytes)
{
	void *t = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return t == MAP_FAILED ? NULL : t;
}

static int make_writable(struct uf_memory *m, const struct uf_memory_options *o)
{
	m->store = o->store;
	m->unit_shift = o->write_unit ? (unsigned)__builtin_ctzll(o->write_unit) : m->shift;
	m->dirty = table(dirty_bytes(m));
	m->spilled = table(m->nblocks * sizeof(*m->spilled));
	bool file = o->store == UF_STORE_SOURCE && o->source == UF_SOURCE_FILE;
	m->unsynced = file ? table(dirty_bytes(m)) : NULL;
	m->unsynced_first = UINT64_MAX;
	if (!m->dirty || !m->spilled || (file && !m->unsynced))
		return -ENOMEM;
	if (o->store == UF_STORE_SOURCE)
		return 0;
	// Now, so that a missing folder is an error of this call, and not of an eviction.
	int err = uf_scratch_create(m->pager, &m->scratch[0].fd);
	if (err)
		return err;
	m->scratch_now = 0;
	struct statfs fs;
	m->inline_scratch = !fstatfs(m->scratch[0].fd, &fs) && (unsigned long)fs.f_type == TMPFS_MAGIC_NUMBER;
	return 0;
}

// What is freed when nobody uses the memory any more: not its creator, who called uf_memory_destroy, and no job under way.
// The range goes only now: a late COPY into addresses that a younger memory has taken over would be accepted there.
void uf_memory_free(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	if (m->uffd >= 0)
		close(m->uffd);
	munmap(m->reserve, m->reserve_length);
	if (m->fd >= 0)
		close(m->fd);
	uf_replay_end(m);
	uf_watch_free(m);
	if (m->trace)
		munmap(m->trace, m->trace_capacity * sizeof(*m->trace));
	munmap(m->state, m->nblocks * sizeof(*m->state));
	munmap(m->links, m->nblocks * sizeof(*m->links));
	free_tables(m);
	p->memories[m->id] = NULL;
	free(m);
}

int uf_memory_create(struct uf_pager *p, const struct uf_memory_options *o, struct uf_memory **ret)
{
	const struct uf_host *host = uf_host_probe();
	if (!o->nbytes || !o->block || (o->block & (o->block - 1)) || o->block < p->page || o->block > UF_EXTENT)
		return -EINVAL;
	bool worker = o->source == UF_SOURCE_WORKER;
	if (o->write_unit && ((o->write_unit & (o->write_unit - 1)) || o->write_unit < o->block || o->write_unit > UF_EXTENT))
		return -EINVAL;
	if ((o->store == UF_STORE_SOURCE && !worker && o->source != UF_SOURCE_FILE) || (o->store == UF_STORE_STAGED && !worker))
		return -EINVAL;
	bool direct = o->delivery == UF_DELIVERY_DIRECT;
	if ((o->store && !host->wp) || (direct && !(host->features & UFFD_FEATURE_SIGBUS)))
		return -EOPNOTSUPP;
	unsigned shift = (unsigned)__builtin_ctzll(o->block);
	if (o->nbytes > 1ULL << 46 || (o->nbytes >> shift) >= UINT32_MAX)
		return -EFBIG;
	if (o->source == UF_SOURCE_MEMORY && uf_is_paged(o->address, o->nbytes))
		return -EDEADLK; // COPY would fault inside the engine
	if (!host->open_via)
		return -host->open_errno;

	struct uf_memory *m = calloc(1, sizeof(*m));
	if (!m)
		return -ENOMEM;
	m->pager = p;
	m->nbytes = o->nbytes;
	m->shift = shift;
	m->nblocks = (o->nbytes + o->block - 1) >> shift;
	m->length = m->nblocks << shift;
	m->kind = o->source;
	m->address = o->address;
	m->offset = o->offset;
	m->source_id = o->source_id;
	m->fd = m->uffd = m->scratch_now = -1;
	m->refilling = UF_NIL;
	m->delivery = o->delivery;
	for (unsigned i = 0; i < UF_SCRATCHES; i++)
		m->scratch[i].fd = -1;
	m->advice = o->no_readahead ? UF_RANDOM : UF_NORMAL;
	m->reserved = o->reserved;
	for (unsigned i = 0; i < UF_STREAMS; i++)
		m->held[i] = -1;
	snprintf(m->name, sizeof(m->name), "%s", o->name);
	atomic_init(&m->refs, 1);
	uf_pool_init(&m->own, o->budget);
	m->pool = o->budget ? &m->own : &p->shared;

	int err = -ENOMEM;
	m->state = table(m->nblocks * sizeof(*m->state));
	m->links = table(m->nblocks * sizeof(*m->links));
	if (!m->state || !m->links)
		goto fail_tables;
	if (o->store && (err = make_writable(m, o)))
		goto fail_tables;

	if (o->source == UF_SOURCE_FILE && (err = file_setup(m, o->fd)))
		goto fail_tables;

	// Not for writable memory: between the MOVE of an extent and its protection a write would go unnoticed.
	m->extents = !m->store && host->move && host->wp && host->thp && !p->options.no_extents && !p->options.no_move;
	m->wp = m->extents || m->store;
	err = reserve(m, m->wp);
	if (err == -ENOMEM && m->wp && !m->store) { // strict overcommit charges writable mappings
		m->extents = m->wp = false;
		err = reserve(m, false);
	}
	if (err)
		goto fail_tables;
	err = register_range(m);
	if (err)
		goto fail_map;

	pthread_mutex_lock(&p->lock);
	err = uf_pager_start(p);
	if (!err && (o->source == UF_SOURCE_FILE || m->store))
		err = uf_io_start(p);
	if (!err && m->store)
		err = uf_stash_init(p);
	if (!err && o->source == UF_SOURCE_WORKER && (o->source_id >= UF_RING_SOURCES || !p->sources[o->source_id].used))
		err = -EINVAL;
	if (!err && o->source == UF_SOURCE_WORKER)
		err = uf_ring_create(p); // a forked child has none for sources that it inherited
	if (!err)
		err = add_to_table(p, m);
	if (!err) {
		err = uf_memory_listen(m);
		if (!err && direct)
			err = uf_direct_add(m);
		if (err)
			p->memories[m->id] = NULL;
	}
	if (!err) {
		p->holders++;
		p->memories_open++;
		if (o->source == UF_SOURCE_WORKER)
			p->sources[o->source_id].memories++;
		if (worker && (m->store == UF_STORE_SOURCE || m->store == UF_STORE_STAGED))
			p->sources[o->source_id].exclusive = true;
		m->pool->least = uf_max(m->pool->least, o->block * UF_LEAST_BLOCKS);
		p->least = uf_max(p->least, o->block * UF_LEAST_BLOCKS);
		if (m->pool == &m->own)
			m->own.reserved = m->reserved;
		else
			p->shared.reserved += m->reserved;
		p->reserved += m->reserved;
	} else if (!p->holders) {
		p->idle_since_ns = uf_now_ns(); // what was started for it ends by itself
		uf_super_kick(p);
	}
	pthread_mutex_unlock(&p->lock);
	if (err)
		goto fail_register;
	*ret = m;
	return 0;

fail_register:
	close(m->uffd);
fail_map:
	munmap(m->reserve, m->reserve_length);
fail_tables:
	if (m->fd >= 0)
		close(m->fd);
	if (m->state)
		munmap(m->state, m->nblocks * sizeof(*m->state));
	if (m->links)
		munmap(m->links, m->nblocks * sizeof(*m->links));
	free_tables(m);
	free(m);
	return err;
}

void uf_memory_close(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		pthread_mutex_unlock(&p->lock);
		return;
	}
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed); // a second thread may destroy it meanwhile
	// Release: who finds its COPY refused looks here.
	atomic_store_explicit(&m->closed, true, memory_order_release);
	m->nbackground = 0;
	uf_replay_end(m);
	uf_pool_leave(m);
	uf_job_cancel(m);
	uf_slots_leave(m);
	uf_rescan(p); // faults of other memories may have waited for this room
	uf_fault_thread_kick(p);
	epoll_ctl(p->epfd, EPOLL_CTL_DEL, m->uffd, NULL);
	if (m->pool == &p->shared)
		p->shared.reserved -= m->reserved;
	p->reserved -= m->reserved;
	p->memories_open--;
	if (m->kind == UF_SOURCE_WORKER)
		p->sources[m->source_id].memories--;
	uf_pager_release_holder(p);
	pthread_cond_broadcast(&p->changed);
	pthread_mutex_unlock(&p->lock);

	// In this order (engine-notes §10): closing the descriptor first would hand zeros to those who wait; without the
	// wake-up they would wait for ever. Now they fault again, on PROT_NONE.
	if (mmap(m->base, m->length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
	    MAP_FAILED)
		mprotect(m->base, m->length, PROT_NONE);
	uf_range_wake(m->uffd, m->base, m->length);
	uf_memory_put(m);
}

void uf_memory_close_under(struct uf_memory *m, uint64_t buffers)
{
	if (!atomic_load_explicit(&m->closed, memory_order_relaxed)) // first: who waits in a fault dies of the close
		uf_log("%s: closed by force while %llu buffer%s of it %s in use: access there raises SIGSEGV.", m->name,
		       (unsigned long long)buffers, buffers == 1 ? "" : "s", buffers == 1 ? "is" : "are");
	uf_memory_close(m);
}

void uf_memory_destroy(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	uf_memory_close(m);
	pthread_mutex_lock(&p->lock);
	if (m->delivery == UF_DELIVERY_DIRECT)
		uf_direct_remove(m);
	// The source's memory may go when we return: fills that read it end at once, since COPY is refused now.
	while (m->kind == UF_SOURCE_MEMORY && atomic_load_explicit(&m->refs, memory_order_acquire) > 1)
		uf_wait_changed(p, 1);
	m->destroyed = true;
	uf_memory_put_locked(m); // jobs under way may keep it a little longer
	pthread_mutex_unlock(&p->lock);
}

void *uf_memory_address(const struct uf_memory *m)
{
	return m->base;
}

bool uf_memory_uses_extents(const struct uf_memory *m)
{
	return m->extents;
}

void uf_memory_advise(struct uf_memory *m, enum uf_advice advice)
{
	pthread_mutex_lock(&m->pager->lock);
	m->advice = advice;
	if (advice == UF_RANDOM)
		m->nbackground = 0;
	memset(m->streams, 0, sizeof(m->streams));
	pthread_mutex_unlock(&m->pager->lock);
}

void uf_memory_states(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t *ret)
{
	for (uint64_t i = 0; i < count; i++)
		ret[i] = (uint8_t)UF_STATE(uf_word(m, first + i));
}

void uf_memory_stats(struct uf_memory *m, struct uf_stats *ret)
{
	pthread_mutex_lock(&m->pager->lock);
	*ret = m->stats;
	ret->budget = uf_min(uf_pool_effective_limit(m->pager, m->pool), uf_max(m->pager->limit, m->pager->least));
	unsigned kept = (unsigned)uf_min(m->errlog_next, UF_ERRORS_KEPT);
	for (unsigned i = 0; i < kept; i++) // oldest first
		ret->errlog[i] = m->stats.errlog[(m->errlog_next - kept + i) % UF_ERRORS_KEPT];
	ret->nerrors = kept;
	pthread_mutex_unlock(&m->pager->lock);
}

int uf_memory_trace(struct uf_memory *m, uint32_t capacity)
{
	struct uf_trace_record *fresh = NULL;
	uint32_t n = 0;
	if (capacity) {
		if (capacity > 1u << 30)
			return -EINVAL;
		for (n = 1; n < capacity; n *= 2)
			;
		fresh = mmap(NULL, n * sizeof(*fresh), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (fresh == MAP_FAILED)
			return -errno;
	}
	pthread_mutex_lock(&m->pager->lock);
	struct uf_trace_record *old = m->trace;
	uint32_t old_capacity = m->trace_capacity;
	m->trace = fresh;
	m->trace_capacity = n;
	m->trace_in = m->trace_out = 0;
	pthread_mutex_unlock(&m->pager->lock);
	if (old)
		munmap(old, old_capacity * sizeof(*old));
	return 0;
}

enum { TRACE_PATIENCE = 250 }; // milliseconds

uint32_t uf_memory_trace_read(struct uf_memory *m, struct uf_trace_record *ret, uint32_t max, uint64_t *lost)
{
	uint32_t n = 0;
	*lost = 0;
	pthread_mutex_lock(&m->pager->lock);
	// A thread whose block has just been installed may be here before that block's record: COPY woke it. How long the load took is
	// known only afterwards.
	uint64_t begun = m->installs_begun;
	for (unsigned i = 0; i < TRACE_PATIENCE && m->trace && m->installs_done < begun &&
			     !atomic_load_explicit(&m->closed, memory_order_relaxed); i++)
		uf_wait_changed(m->pager, 1);
	if (m->trace) {
		if (m->trace_in - m->trace_out > m->trace_capacity) {
			*lost = m->trace_in - m->trace_out - m->trace_capacity;
			m->trace_out += *lost;
		}
		for (; n < max && m->trace_out < m->trace_in; n++)
			ret[n] = m->trace[m->trace_out++ & (m->trace_capacity - 1)];
	}
	pthread_mutex_unlock(&m->pager->lock);
	return n;
}
