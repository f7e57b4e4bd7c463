// SPDX-License-Identifier: Apache-2.0
// The fault loop: drain the messages, look at the block's state, resolve.
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

enum { MESSAGES = 64 };

static void pending_add(struct uf_memory *m, uint64_t block)
{
	struct uf_pager *p = m->pager;
	for (unsigned i = 0; i < p->pending_count; i++) {
		unsigned at = (p->pending_head + i) % UF_PENDING;
		if (p->pending[at].memory == m->id && p->pending[at].block == block)
			return;
	}
	if (p->pending_count == UF_PENDING) {
		// More threads wait than we can note: let this one ask again.
		pthread_mutex_unlock(&p->lock);
		uf_wake(m, block, 1);
		pthread_mutex_lock(&p->lock);
		return;
	}
	atomic_store_explicit(&p->attention, true, memory_order_relaxed);
	unsigned at = (p->pending_head + p->pending_count++) % UF_PENDING;
	p->pending[at].memory = m->id;
	p->pending[at].block = block;
}

// What became of blocks whose inline load did not succeed: they go to somebody who may wait for the source. The first
// block stays LOADING under a job, or is noted as pending; the others are given up. Lock held; returns how many blocks the
// caller must wake, after the first `*skip`.
static uint64_t hand_over(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, uint64_t t_ns, bool keep_run,
			  uint64_t *skip)
{
	*skip = 0;
	if (keep_run && uf_job_post(m, first, count, kind, t_ns, NULL))
		return 0;
	if (kind == UF_TRACE_DEMAND && uf_job_post(m, first, 1, kind, t_ns, NULL)) {
		uf_unclaim(m, first + 1, count - 1);
		return count;
	}
	uf_unclaim(m, first, count);
	if (kind != UF_TRACE_DEMAND)
		return count;
	pending_add(m, first); // uf_pending_retry wakes or serves it; woken now it would come back at once
	*skip = 1;
	return count - 1;
}

// Serves an absent block. Fault thread, without lock; the caller holds a reference.
void uf_demand(struct uf_memory *m, uint64_t block, uint64_t t_ns, struct uf_staging *st)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	if (UF_STATE(uf_word(m, block)) != UF_ABSENT || atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		pthread_mutex_unlock(&p->lock);
		return;
	}
	struct uf_op *op = uf_op_begin(p, m, UF_LOADING);
	if (!op || (m->kind == UF_SOURCE_WORKER && !uf_job_available(p, false))) {
		if (op)
			uf_op_end(op);
		pending_add(m, block);
		pthread_mutex_unlock(&p->lock);
		return;
	}
	m->stats.faults++;
	uint64_t run = uf_readahead_plan(m, block);
	op->part[0].first = block;
	op->part[0].count = run; // before the claim: fork's child handler looks at all of it
	uint64_t n = uf_claim(m, block, run, false), wake = 0, skip = 0;
	op->part[0].count = n;
	if (m->kind == UF_SOURCE_WORKER) {
		if (n)
			wake = hand_over(m, block, n, UF_TRACE_DEMAND, t_ns, true, &skip);
	} else if (n) {
		uf_reserve(m, block, n, UF_TRACE_DEMAND);
		pthread_mutex_unlock(&p->lock);
		struct uf_failure why;
		int err = uf_load_inline(m, block, n, UF_TRACE_DEMAND, st, op, t_ns, false, &why);
		if (!err)
			return;
		bool native = m->kind == UF_SOURCE_FILE;
		if (!native && err != -ECANCELED && !atomic_load_explicit(&m->closed, memory_order_acquire)) {
			// Nothing to wait for: the kernel refused (out of memory).
			uf_poison(m, block, 1, -err, why.message);
			pthread_mutex_lock(&p->lock);
			uf_unclaim(m, block + 1, n - 1);
			wake = n;
		} else {
			pthread_mutex_lock(&p->lock);
		}
		uf_unreserve(m, block, n, UF_TRACE_DEMAND);
		if (native && !atomic_load_explicit(&m->closed, memory_order_relaxed))
			wake = hand_over(m, block, n, UF_TRACE_DEMAND, t_ns, err == -EAGAIN, &skip);
	}
	uf_op_end(op);
	pthread_mutex_unlock(&p->lock);
	if (wake)
		uf_wake(m, block + skip, wake); // the caller holds a reference
}

// Is this page really there? A missing fault on a resident block is usually a duplicate, but after a foreign
// MADV_DONTNEED it is real, and waking alone would loop for ever (engine-notes §6).
static bool page_present(struct uf_pager *p, const void *address)
{
	uint64_t entry = 0;
	int fd = p->pagemap_fd;
	off_t at = (off_t)((uintptr_t)address / p->page * sizeof(entry));
	if (fd < 0 || pread(fd, &entry, sizeof(entry), at) != (ssize_t)sizeof(entry))
		return false; // reading the block again is always right
	return entry >> 63 || (entry >> 62 & 1); // present, or swapped out
}

static void fault_on_clean(struct uf_memory *m, uint64_t block, char *page_address, bool wp)
{
	struct uf_pager *p = m->pager;
	if (wp) {
		// Somebody writes to read-only memory. It is mapped writable so that extents can be moved in; here the access
		// gets what PROT_READ would have given it.
		uf_log("%s: a write to this read-only memory at byte %llu. It raises SIGSEGV, as for a read-only mapping.",
		       m->name, (unsigned long long)(page_address - m->base));
		pthread_mutex_lock(&p->lock);
		// Closing maps PROT_NONE after it has said so under the lock: this must not open it again.
		if (!atomic_load_explicit(&m->closed, memory_order_relaxed) && mprotect(page_address, p->page, PROT_READ))
			mprotect(m->base, m->length, PROT_READ); // no mapping left to split it
		pthread_mutex_unlock(&p->lock);
		uf_range_wake(m->uffd, page_address, p->page);
		return;
	}
	if (page_present(p, page_address)) {
		uf_range_wake(m->uffd, page_address, p->page);
		return;
	}
	if (!uf_evict_blocks(m, block, 1))
		uf_wake(m, block, 1);
	else if (!atomic_exchange_explicit(&m->told_of_drops, true, memory_order_relaxed))
		uf_log("%s: other code dropped pages of block %llu (madvise or the like). They are read again; this is said once.", m->name,
		       (unsigned long long)block);
}

static void handle_fault(struct uf_memory *m, const struct uffd_msg *msg, uint64_t t_ns)
{
	struct uf_pager *p = m->pager;
	uintptr_t address = msg->arg.pagefault.address & ~(uintptr_t)(p->page - 1);
	uint64_t offset = address - (uintptr_t)m->base;
	if (address < (uintptr_t)m->base || offset >= m->length)
		return; // not a message of ours; nothing registered can send it
	uint64_t block = offset >> m->shift;
	bool wp = msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP;
	uint32_t w = uf_word(m, block);
	switch (UF_STATE(w)) {
	case UF_ABSENT:
		uf_demand(m, block, t_ns, &p->fault_staging);
		break;
	case UF_LOADING: {
		// Owned: whoever loads it wakes the block afterwards. But its read may be queued far behind, or held.
		pthread_mutex_lock(&p->lock);
		m->stats.duplicates++;
		struct uf_job *held = NULL;
		bool loading = UF_STATE(uf_word(m, block)) == UF_LOADING;
		if (loading) {
			held = uf_job_demand(m, block, t_ns);
			// Relaxed: under the lock, as its reader (uf_loaded).
			atomic_fetch_or_explicit(&m->state[block], UF_WORD_DROPPED, memory_order_relaxed);
			uf_readahead_follow(m, block);
		}
		pthread_mutex_unlock(&p->lock);
		if (!loading)
			uf_wake(m, block, 1);
		if (held)
			uf_job_read(held, UF_RING_SLOT(p->ring, uf_job_index(p, held)), &p->fault_staging);
		break;
	}
	case UF_EVICTING:
	case UF_UPGRADING:
		break; // owned: its owner wakes the block
	case UF_CLEAN:
		pthread_mutex_lock(&p->lock);
		m->stats.duplicates++;
		pthread_mutex_unlock(&p->lock);
		fault_on_clean(m, block, (char *)address, wp);
		break;
	case UF_POISONED: {
		// Foreign code dropped the marker.
		struct uffdio_poison z = {{address, p->page}, UFFDIO_POISON_MODE_DONTWAKE, 0};
		if (uf_host_probe()->poison)
			ioctl(m->uffd, UFFDIO_POISON, &z);
		else
			mprotect((void *)address, p->page, PROT_NONE);
		uf_range_wake(m->uffd, (void *)address, p->page);
		break;
	}
	case UF_DIRTY:
	case UF_WRITING:
	case UF_REINSTALLED:
		uf_range_wake(m->uffd, (void *)address, p->page); // no memory is writable yet
		break;
	}
}

// Reads and serves the messages that are there now. Fault thread, without lock; the caller holds a reference.
void uf_fault_drain(struct uf_pager *p, struct uf_memory *m)
{
	(void)p;
	for (;;) {
		struct uffd_msg msgs[MESSAGES];
		ssize_t n = read(m->uffd, msgs, sizeof(msgs));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return;
		uint64_t t_ns = uf_now_ns();
		size_t count = (size_t)n / sizeof(msgs[0]);
		for (size_t i = 0; i < count; i++)
			if (msgs[i].event == UFFD_EVENT_PAGEFAULT)
				handle_fault(m, &msgs[i], t_ns);
		if (count < MESSAGES)
			return; // a second read just to see EAGAIN can wait for epoll
	}
}

// Faults that found no job free. Fault thread, without lock.
void uf_pending_retry(struct uf_pager *p)
{
	pthread_mutex_lock(&p->lock);
	unsigned n = p->pending_count;
	while (n-- && p->pending_count) {
		if (!uf_job_available(p, false)) {
			pthread_mutex_unlock(&p->lock);
			bool freed = uf_job_release_held(p, NULL, &p->fault_staging);
			pthread_mutex_lock(&p->lock);
			if (!freed)
				break;
			continue;
		}
		struct uf_memory *m = uf_memory_get(p, p->pending[p->pending_head].memory);
		uint64_t block = p->pending[p->pending_head].block;
		p->pending_head = (p->pending_head + 1) % UF_PENDING;
		p->pending_count--;
		if (!m)
			continue;
		pthread_mutex_unlock(&p->lock);
		if (block < m->nblocks) {
			if (UF_STATE(uf_word(m, block)) == UF_ABSENT)
				uf_demand(m, block, uf_now_ns(), &p->fault_staging);
			else
				uf_wake(m, block, 1); // its message was consumed: let the thread look again
		}
		uf_memory_put(m);
		pthread_mutex_lock(&p->lock);
	}
	pthread_mutex_unlock(&p->lock);
}

// One piece of a background fill, at most an extent. Lock held, may drop it. True if it worked inline.
static bool background_piece(struct uf_memory *m, struct uf_background *b)
{
	struct uf_pager *p = m->pager;
	while (b->step == 1 && b->count > 1 && UF_STATE(uf_word(m, b->first)) != UF_ABSENT) {
		b->first++;
		b->count--;
	}
	uint64_t per = UF_EXTENT >> m->shift, first = b->first;
	uint64_t run = b->step == 1 ? uf_min(b->count, per - first % per) : 1;
	bool async = m->kind == UF_SOURCE_WORKER ||
		     (m->kind == UF_SOURCE_FILE && atomic_load_explicit(&m->no_nowait, memory_order_relaxed));
	if (async && !uf_job_available(p, true))
		return false;
	struct uf_op *op = uf_op_begin(p, m, UF_LOADING);
	if (!op) {
		uf_rescan(p); // the one that ends kicks
		return false;
	}
	op->part[0].first = first;
	op->part[0].count = run;
	uint64_t n = uf_claim(m, first, run, false);
	op->part[0].count = n;
	// What is there already, or is being loaded, is passed over.
	uint64_t passed = n ? n : 1;
	uint8_t kind = b->kind;
	bool hold = n && b->trigger >= first && b->trigger < first + n;
	b->count -= passed;
	b->first = (uint64_t)((int64_t)first + (b->step == 1 ? (int64_t)passed : b->step));
	bool inline_work = false;
	uint64_t wake = 0;
	if (n && async) {
		struct uf_job *j = uf_job_post(m, first, n, kind, 0, NULL);
		j->hold = hold; // available: looked above
	} else if (n) {
		uf_reserve(m, first, n, kind);
		pthread_mutex_unlock(&p->lock);
		int err = uf_load_inline(m, first, n, kind, &p->fault_staging, op, 0, false, NULL);
		pthread_mutex_lock(&p->lock);
		if (!err)
			return true;
		inline_work = true;
		uf_unreserve(m, first, n, kind);
		if (!atomic_load_explicit(&m->closed, memory_order_relaxed)) {
			// Only files have I/O threads that would take it.
			if (m->kind != UF_SOURCE_FILE || err != -EAGAIN || !uf_job_post(m, first, n, kind, 0, NULL)) {
				uf_unclaim(m, first, n);
				wake = n;
			}
		}
	} else {
		inline_work = true;
	}
	uf_op_end(op);
	if (wake) {
		pthread_mutex_unlock(&p->lock);
		uf_wake(m, first, wake);
		pthread_mutex_lock(&p->lock);
	}
	return inline_work;
}

// Does one piece of each memory's background fills. Fault thread, without lock.
bool uf_background_step(struct uf_pager *p)
{
	bool more = false;
	pthread_mutex_lock(&p->lock);
	p->rescan = false;
	for (uint32_t i = 0; i < p->memories_capacity; i++) {
		struct uf_memory *m = p->memories[i] && p->memories[i]->nbackground ? uf_memory_get(p, i) : NULL;
		if (!m)
			continue;
		while (m->nbackground && !m->background[0].count) {
			for (unsigned k = 1; k < m->nbackground; k++)
				m->background[k - 1] = m->background[k];
			m->nbackground--;
		}
		// All that goes to jobs at once; inline work piece by piece, so that faults come in between.
		bool worked = false;
		while (m->nbackground && m->background[0].count && !worked) {
			uint64_t before = m->background[0].count;
			worked = background_piece(m, &m->background[0]);
			if (!worked && m->nbackground && m->background[0].count == before)
				break; // no job free: a finished one calls again
		}
		more |= worked;
		uf_memory_put_locked(m);
	}
	pthread_mutex_unlock(&p->lock);
	return more;
}
