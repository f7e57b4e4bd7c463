// SPDX-License-Identifier: Apache-2.0
// Fork. A child must see right bytes or die loudly, never zeros.
//
// A forked child's inherited userfaultfd acts on the parent, and its own ranges are registered nowhere: missing pages
// would read as zeros. So before fork returns in the child, every memory gets a userfaultfd of the child's own, blocks
// that lost their owner are emptied, and a fault thread runs. What cannot be served is covered by PROT_NONE. (Leaving
// the ranges out of the child, MADV_DONTFORK, would let the child's next malloc reuse the hole: silent wrong bytes.)
//
// _Fork() and raw clone run no handlers; docs say so.
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

static void prepare(void)
{
	pthread_mutex_lock(&uf_registry_lock);
	for (struct uf_pager *p = uf_pagers; p; p = p->next) {
		pthread_mutex_lock(&p->lock); // held for bookkeeping only: nobody waits for a source inside it
		p->forking++; // no other begins meanwhile
		while (p->moving) // bytes on their way from a block to a slot are in neither; it takes some 20 us
			uf_wait_changed(p, 1);
		p->forking--;
		uf_scratch_before_fork(p);
	}
}

static void parent(void)
{
	for (struct uf_pager *p = uf_pagers; p; p = p->next) {
		uf_scratch_after_fork(p, false);
		pthread_cond_broadcast(&p->changed); // who waits for `forking`
		pthread_mutex_unlock(&p->lock);
	}
	pthread_mutex_unlock(&uf_registry_lock);
}

// Blocks whose owner was a thread of the parent: their pages may be half there.
static void orphaned(struct uf_memory *m, uint64_t first, uint64_t count, enum uf_state owned)
{
	for (uint64_t b = first; b < first + count && b < m->nblocks; b++) {
		if (UF_STATE(uf_word(m, b)) != owned)
			continue;
		if (atomic_load_explicit(&m->closed, memory_order_relaxed))
			continue; // it has left its pool, and is covered below
		if (owned == UF_LOADING && uf_is_dirty(m, b)) {
			// For a write, or again, after other code had dropped pages. A thread that COPY woke may have written already: what
			// is there stays, and what is missing comes with the next fault.
			atomic_store_explicit(&m->told_of_drops, true, memory_order_relaxed);
			uf_word_store(m, b, UF_DIRTY);
			uf_enqueue_main(m, b);
			continue;
		}
		madvise(uf_block_address(m, b), uf_block_size(m), MADV_DONTNEED);
		uf_word_store(m, b, UF_ABSENT);
	}
}

static void cover(struct uf_memory *m)
{
	if (mmap(m->base, m->length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		_exit(127); // zeros would follow
}

// A writable memory's blocks in the child. Its changes are private from now on, whatever the parent's were: two processes that
// write back the same blocks would undo each other's work.
static void inherit_blocks(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	m->store = UF_STORE_SCRATCH;
	m->forked = true;
	m->resync = false; // it writes to no file any more
	m->flushing = m->flush_waits = m->scratch_opening = m->complained = false;
	m->refilling = UF_NIL;
	m->scratch_readers = 0;
	m->write_not_before_ns = 0;
	struct uf_queue *queues[] = {&m->pool->probation, &m->pool->main};
	for (unsigned q = 0; q < 2; q++) {
		for (uint64_t ref = queues[q]->head; ref != UF_NIL; ref = p->memories[ref >> 32]->links[(uint32_t)ref].next) {
			if (ref >> 32 != m->id)
				continue;
			uint64_t b = (uint32_t)ref;
			uf_word_store(m, b, (uf_word(m, b) & UF_WORD_MAIN) | UF_DIRTY);
			uf_dirty_set(m, b);
		}
	}
	// What was on its way to the store is in the child's copy of the slot, and nowhere else.
	for (unsigned i = 0; i < UF_SLOTS; i++) {
		struct uf_slot *s = &p->slots[i];
		if (s->state == UF_SLOT_FREE || s->memory != m || s->staged || s->settled)
			continue;
		for (uint64_t b = s->first; b < s->first + s->count; b++) {
			// LOADING: it was coming back. Pages that are there already stay, they may have been written to since.
			enum uf_state now = UF_STATE(uf_word(m, b));
			if ((now != UF_WRITING && now != UF_LOADING) || uf_word(m, b) >> UF_SLOT_SHIFT != i)
				continue;
			bool woken;
			uf_word_store(m, b, UF_LOADING);
			if (uf_copy_run(m, uf_block_address(m, b), uf_slot_bytes(p, s) + ((b - s->first) << m->shift), uf_block_size(m),
					false, &woken))
				_exit(127); // its bytes would be lost, silently
			uf_account(m, uf_block_size(m));
			uf_word_store(m, b, UF_DIRTY);
			uf_enqueue_main(m, b);
			uf_dirty_set(m, b);
			uf_scratch_drop(m, b); // the parent may be just writing over it
		}
	}
}

// Serves the memory in the child. 0 or a negative errno.
static int adopt(struct uf_memory *m)
{
	uint64_t features = m->delivery == UF_DELIVERY_DIRECT ? UFFD_FEATURE_SIGBUS : UFFD_FEATURE_THREAD_ID;
	int err = uf_uffd_open(m->pager->options.user_mode_only, uf_host_probe()->features & features, &m->uffd);
	if (!err && m->delivery == UF_DELIVERY_DIRECT)
		err = uf_direct_init(m->pager);
	if (err)
		return err;
	// Protection bits are gone in the child. Arming them again costs as much as the fork; read-only pages need no bits, and of a
	// writable memory all that is resident is called dirty.
	if (m->wp && !m->store && mprotect(m->base, m->length, PROT_READ))
		return -errno;
	m->wp = m->store;
	m->extents = false;
	struct uffdio_register r = {
		.range = {(uintptr_t)m->base, m->length},
		.mode = UFFDIO_REGISTER_MODE_MISSING | (m->wp ? UFFDIO_REGISTER_MODE_WP : 0),
	};
	if (ioctl(m->uffd, UFFDIO_REGISTER, &r))
		return -errno;
	if (m->store)
		inherit_blocks(m);
	struct uf_queue *queues[] = {&m->pool->probation, &m->pool->main};
	for (unsigned q = 0; q < 2 && m->watchers; q++) // nothing traps on what is there
		for (uint64_t ref = queues[q]->head; ref != UF_NIL; ref = m->pager->memories[ref >> 32]->links[(uint32_t)ref].next)
			if (ref >> 32 == m->id)
				uf_seen_blind(m, (uint32_t)ref);
	return uf_memory_listen(m);
}

// The memory cannot be served here: access raises SIGSEGV from now on.
static void give_up(struct uf_memory *m, int why)
{
	struct uf_pager *p = m->pager;
	cover(m);
	uf_log("%s: this forked process cannot serve it (%s): access there raises SIGSEGV.", m->name, strerrordesc_np(-why));
	atomic_store_explicit(&m->closed, true, memory_order_relaxed);
	uf_pool_leave(m);
	if (m->pool == &p->shared)
		p->shared.reserved -= m->reserved;
	p->reserved -= m->reserved;
	p->memories_open--;
	if (m->kind == UF_SOURCE_WORKER)
		p->sources[m->source_id].memories--;
}

static void recount(struct uf_pager *p)
{
	p->resident = 0;
	for (uint32_t i = 0; i < p->memories_capacity; i++) {
		struct uf_memory *m = p->memories[i];
		if (!m)
			continue;
		m->stats.resident = 0;
		m->own.resident = m->own.probation.bytes + m->own.main.bytes;
		if (m->pool == &m->own) {
			m->stats.resident = m->own.resident;
			p->resident += m->own.resident;
		}
	}
	p->shared.resident = p->shared.probation.bytes + p->shared.main.bytes;
	p->resident += p->shared.resident;
	struct uf_queue *queues[] = {&p->shared.probation, &p->shared.main};
	for (unsigned q = 0; q < 2; q++)
		for (uint64_t ref = queues[q]->head; ref != UF_NIL;) {
			struct uf_memory *m = p->memories[ref >> 32];
			m->stats.resident += uf_block_size(m);
			ref = m->links[(uint32_t)ref].next;
		}
}

static void child_pager(struct uf_pager *p)
{
	// Threads of the parent may have waited on these.
	uf_mutex_init(&p->lock);
	pthread_condattr_t attr;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&p->changed, &attr);
	pthread_cond_init(&p->io_work, &attr);
	pthread_condattr_destroy(&attr);
	p->super_joinable = false;
	p->fillers = 0;
	pthread_mutex_lock(&p->lock);

	// Ring and workers are the parent's.
	uf_ring_destroy(p);
	uf_workers_forget(p);
	uf_pager_close_fds(p);
	p->io_started = 0;
	p->fault_staging = (struct uf_staging){0}; // was not inherited
	memset(p->direct_staging, 0, sizeof(p->direct_staging));
	atomic_store_explicit(&p->direct_used, 0, memory_order_relaxed);
	p->pending_count = p->repairs_count = 0;
	p->moving = p->forking = p->write_jobs = 0;
	p->repairing = false;
	p->writing = 0;
	uf_scratch_after_fork(p, true);
	if (p->stash_uffd >= 0)
		close(p->stash_uffd);
	p->stash_uffd = -1;

	for (unsigned i = 0; i < UF_OPS; i++) {
		struct uf_op *op = &p->ops[i];
		// A block that comes back from its slot is dealt with by inherit_blocks.
		for (unsigned k = 0; op->used && !op->restores && k < op->n; k++)
			orphaned(op->part[k].memory, op->part[k].first, op->part[k].count, op->owned);
		op->used = false;
	}
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		if (j->state != UF_JOB_FREE && j->memory && !j->slot)
			orphaned(j->memory, j->first, j->count, UF_LOADING);
		*j = (struct uf_job){.state = UF_JOB_FREE};
	}
	p->jobs_used = p->jobs_ahead = 0;
	recount(p);
	p->memories_open = 0; // a memory may have been half closed
	for (uint32_t i = 0; i < p->memories_capacity; i++)
		p->memories_open += p->memories[i] && !atomic_load_explicit(&p->memories[i]->closed, memory_order_relaxed);

	int err = 0;
	bool files = false, sources = false;
	if (p->memories_open) {
		err = uf_pager_open_fds(p);
		if (!err)
			err = uf_staging_init(&p->fault_staging);
		if (!err && p->stash)
			err = uf_stash_register(p);
		if (err)
			uf_pager_close_fds(p);
	}
	for (uint32_t i = 0; i < p->memories_capacity; i++) {
		struct uf_memory *m = p->memories[i];
		if (!m)
			continue;
		if (m->uffd >= 0)
			close(m->uffd); // a handle on the parent's; it lives on there
		m->uffd = -1;
		m->nbackground = 0;
		uf_replay_end(m);
		for (unsigned k = 0; k < UF_STREAMS; k++)
			m->held[k] = -1;
		atomic_store_explicit(&m->refs, m->destroyed ? 0 : 1, memory_order_relaxed); // other holders were threads
		if (m->destroyed) {
			uf_memory_free(m);
		} else if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
			cover(m); // the parent's thread may not have come to it
		} else {
			int why = err ? err : adopt(m);
			if (why)
				give_up(m, why);
			else
				files |= m->kind == UF_SOURCE_FILE || m->store;
		}
	}
	for (unsigned i = 0; i < UF_SLOTS; i++) {
		if (p->slots[i].state != UF_SLOT_FREE)
			madvise(uf_slot_bytes(p, &p->slots[i]), UF_EXTENT, MADV_DONTNEED);
		p->slots[i].state = UF_SLOT_FREE;
	}
	p->slots_used = 0;
	if (!p->memories_open)
		uf_stash_deinit(p);
	p->leaving = p->shared.leaving = 0;
	for (uint32_t i = 0; i < p->memories_capacity; i++)
		if (p->memories[i])
			p->memories[i]->own.leaving = 0;
	// Who holds the threads: what is open here. (A thread of the parent may have been about to let go of its hold.)
	p->holders = p->memories_open;
	for (uint32_t i = 0; i < UF_RING_SOURCES; i++) {
		p->holders += p->sources[i].used;
		sources |= p->sources[i].used;
	}

	p->phase = UF_IDLE;
	p->stop_fault = p->stop_super = p->stop_io = false;
	if (p->memories_open) {
		bool fault = false;
		err = sources ? uf_ring_create(p) : 0;
		if (!err) {
			err = uf_thread_start(&p->fault_thread, uf_fault_thread, p);
			fault = !err;
		}
		if (!err && files)
			err = uf_io_start(p);
		if (!err) {
			p->phase = UF_RUNNING; // before its thread looks
			err = uf_thread_start(&p->super_thread, uf_super_thread, p);
			p->super_joinable = !err;
		}
		if (err) {
			p->phase = UF_IDLE;
			for (uint32_t i = 0; i < p->memories_capacity; i++)
				if (p->memories[i] && !atomic_load_explicit(&p->memories[i]->closed, memory_order_relaxed))
					give_up(p->memories[i], err);
			p->holders = 0;
			for (uint32_t i = 0; i < UF_RING_SOURCES; i++)
				p->holders += p->sources[i].used;
			p->stop_fault = p->stop_io = true;
			uf_fault_thread_kick(p);
			pthread_cond_broadcast(&p->io_work);
			pthread_mutex_unlock(&p->lock);
			if (fault)
				pthread_join(p->fault_thread, NULL);
			for (unsigned i = 0; i < p->io_started; i++)
				pthread_join(p->io_threads[i], NULL);
			pthread_mutex_lock(&p->lock);
			p->io_started = 0;
			uf_ring_destroy(p);
			uf_staging_deinit(&p->fault_staging);
			uf_pager_close_fds(p);
		}
	} else if (sources) {
		// Sources without memories: the next uf_memory_create starts what they need.
		p->phase = UF_IDLE;
	}
	pthread_mutex_unlock(&p->lock);
}

static void child(void)
{
	uf_mutex_init(&uf_registry_lock);
	uf_direct_forked();
	for (struct uf_pager *p = uf_pagers; p; p = p->next)
		child_pager(p);
}

static void install(void)
{
	pthread_atfork(prepare, parent, child);
}

void uf_fork_handlers(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, install);
}
