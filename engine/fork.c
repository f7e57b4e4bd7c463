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
	for (struct uf_pager *p = uf_pagers; p; p = p->next)
		pthread_mutex_lock(&p->lock); // held for bookkeeping only: nobody waits for a source inside it
}

static void parent(void)
{
	for (struct uf_pager *p = uf_pagers; p; p = p->next)
		pthread_mutex_unlock(&p->lock);
	pthread_mutex_unlock(&uf_registry_lock);
}

// Blocks whose owner was a thread of the parent: their pages may be half there.
static void orphaned(struct uf_memory *m, uint64_t first, uint64_t count)
{
	for (uint64_t b = first; b < first + count && b < m->nblocks; b++) {
		enum uf_state s = UF_STATE(uf_word(m, b));
		if (s != UF_LOADING && s != UF_EVICTING)
			continue;
		madvise(uf_block_address(m, b), uf_block_size(m), MADV_DONTNEED);
		uf_word_store(m, b, UF_ABSENT);
	}
}

static void cover(struct uf_memory *m)
{
	if (mmap(m->base, m->length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		_exit(127); // zeros would follow
}

// Serves the memory in the child. 0 or a negative errno.
static int adopt(struct uf_memory *m)
{
	int err = uf_uffd_open(m->pager->options.user_mode_only, uf_host_probe()->features & UFFD_FEATURE_THREAD_ID, &m->uffd);
	if (err)
		return err;
	// Protection bits are gone in the child. Arming them again costs as much as the fork; read-only pages need no bits.
	if (m->wp && mprotect(m->base, m->length, PROT_READ))
		return -errno;
	m->wp = m->extents = false;
	struct uffdio_register r = {
		.range = {(uintptr_t)m->base, m->length},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	if (ioctl(m->uffd, UFFDIO_REGISTER, &r))
		return -errno;
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
	pthread_mutex_init(&p->lock, NULL);
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
	p->pending_count = 0;

	for (unsigned i = 0; i < UF_OPS; i++) {
		struct uf_op *op = &p->ops[i];
		for (unsigned k = 0; op->used && k < op->n; k++)
			orphaned(op->part[k].memory, op->part[k].first, op->part[k].count);
		op->used = false;
	}
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		if (j->state != UF_JOB_FREE && j->memory)
			orphaned(j->memory, j->first, j->count);
		*j = (struct uf_job){.state = UF_JOB_FREE};
	}
	p->jobs_used = p->jobs_ahead = 0;
	recount(p);

	int err = 0;
	bool files = false, sources = false;
	if (p->memories_open) {
		err = uf_pager_open_fds(p);
		if (!err)
			err = uf_staging_init(&p->fault_staging);
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
				files |= m->kind == UF_SOURCE_FILE;
		}
	}
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
	pthread_mutex_init(&uf_registry_lock, NULL);
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
