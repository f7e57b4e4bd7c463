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
//
// With `write` it arrives writable and dirty, which saves the second trap. A DIRTY block of which foreign code dropped pages is
// served like an absent one: what the store has comes to where pages are missing.
bool uf_demand(struct uf_memory *m, uint64_t block, bool write, uint64_t t_ns, struct uf_staging *st)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	// Before the look at the state: making room drops the lock.
	bool room = uf_room_now(m, uf_block_size(m), true);
	enum uf_state s = UF_STATE(uf_word(m, block));
	bool refill = s == UF_DIRTY && write && m->refilling == UF_NIL;
	if (s == UF_DIRTY && write && !refill) { // one at a time
		pending_add(m, block);
		pthread_mutex_unlock(&p->lock);
		return true;
	}
	if ((s != UF_ABSENT && !refill) || atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		pthread_mutex_unlock(&p->lock);
		return false;
	}
	int kind = uf_kind_at(m, block);
	struct uf_op *op = room || refill ? uf_op_begin(p, m, UF_LOADING) : NULL; // a refill is counted already
	if (!op || (kind == UF_SOURCE_WORKER && !uf_job_available(p, false))) {
		if (op)
			uf_op_end(op);
		pending_add(m, block);
		pthread_mutex_unlock(&p->lock);
		return true;
	}
	m->stats.faults++;
	uf_replay_demanded(m, block);
	uint64_t run = refill ? 1 : uf_readahead_plan(m, block), n, wake = 0, skip = 0;
	// What surrounds it does not come in place of blocks that were read ahead, while what is dirty is on its way out.
	if (run > 1 && m->pool->leaving && !uf_fits(m, run << m->shift))
		run = 1;
	op->part[0].first = block;
	op->part[0].count = run; // before the claim: fork's child handler looks at all of it
	if (refill) {
		n = 1;
		uf_dequeue(m, block);
		uf_unroom(m, uf_block_size(m));
		m->refilling = block;
		uf_word_store(m, block, UF_LOADING);
	} else {
		n = uf_claim(m, block, run, false);
		if (n && write && m->store)
			uf_dirty_set(m, block);
	}
	if (n)
		uf_seen(m, block, write && m->store);
	op->part[0].count = n;
	if (kind == UF_SOURCE_WORKER) {
		if (n)
			wake = hand_over(m, block, n, UF_TRACE_DEMAND, t_ns, true, &skip);
	} else if (n) {
		uf_reserve(m, block, n, UF_TRACE_DEMAND);
		pthread_mutex_unlock(&p->lock);
		struct uf_failure why;
		int err = uf_load_inline(m, block, n, UF_TRACE_DEMAND, st, op, t_ns, m->delivery == UF_DELIVERY_DIRECT, &why);
		if (!err)
			return true;
		bool native = uf_is_file_kind(kind);
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
	return true;
}

static bool pagemap_entry(struct uf_pager *p, const void *address, uint64_t *entry)
{
	off_t at = (off_t)((uintptr_t)address / p->page * sizeof(*entry));
	return p->pagemap_fd >= 0 && pread(p->pagemap_fd, entry, sizeof(*entry), at) == (ssize_t)sizeof(*entry);
}

// Is this page really there? A missing fault on a resident block is usually a duplicate, but after a foreign
// MADV_DONTNEED it is real, and waking alone would loop for ever (engine-notes §6).
bool uf_page_present(struct uf_pager *p, const void *address)
{
	uint64_t entry;
	if (!pagemap_entry(p, address, &entry))
		return false; // reading the block again is always right
	return entry >> 63 || (entry >> 62 & 1); // present, or swapped out
}

// Does this page still trap writes? Of the threads that write to a block at once the first has it made writable, and the
// messages of the others come after that. Bit 57 is there since 5.14, which the feature of 5.18 stands for.
static bool page_protected(struct uf_pager *p, const void *address)
{
	uint64_t entry;
	return !(uf_host_probe()->features & UFFD_FEATURE_EXACT_ADDRESS) || !pagemap_entry(p, address, &entry) || entry >> 57 & 1;
}

// Somebody writes to read-only memory. It is mapped writable so that extents can be moved in; here the access gets what
// PROT_READ would have given it.
static void refuse_write(struct uf_memory *m, char *page_address)
{
	struct uf_pager *p = m->pager;
	uf_log("%s: a write to this read-only memory at byte %llu. It raises SIGSEGV, as for a read-only mapping.",
	       m->name, (unsigned long long)(page_address - m->base));
	pthread_mutex_lock(&p->lock);
	// Closing maps PROT_NONE after it has said so under the lock: this must not open it again.
	if (!atomic_load_explicit(&m->closed, memory_order_relaxed) && mprotect(page_address, p->page, PROT_READ))
		mprotect(m->base, m->length, PROT_READ); // no mapping left to split it
	pthread_mutex_unlock(&p->lock);
	uf_range_wake(m->uffd, page_address, p->page);
}

// A write to a protected block, mostly the first one to a clean block. CLEAN -> DIRTY at once would let an evictor protect and
// copy it before our unprotect comes, and writers after: their bytes would be lost (engine-notes §2). For the same reason
// nobody lifts protection from a block that he does not own.
bool uf_upgrade(struct uf_memory *m, uint64_t block)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	uint32_t w = uf_word(m, block);
	enum uf_state was = UF_STATE(w);
	bool in_slot = was == UF_RESTORED || was == UF_REINSTALLED, fresh = was == UF_CLEAN || was == UF_RESTORED;
	if ((!in_slot && !fresh && was != UF_DIRTY) || atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		pthread_mutex_unlock(&p->lock);
		return false;
	}
	struct uf_slot *s = in_slot ? &p->slots[w >> UF_SLOT_SHIFT] : NULL;
	if (s)
		s->restoring++;
	if (fresh) {
		uf_dirty_set(m, block);
		m->stats.upgrades++;
		uf_trace(m, block, 1, UF_TRACE_DIRTY, UF_NIL, 0);
	}
	uf_seen(m, block, true);
	uf_word_store(m, block, (w & ~15u) | UF_UPGRADING);
	pthread_mutex_unlock(&p->lock);

	uf_unprotect(m, block, 1); // wakes, too

	pthread_mutex_lock(&p->lock);
	bool dropped = uf_word(m, block) & UF_WORD_DROPPED;
	if (!atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		uf_seen_done(m, block, 1);
		uf_word_store(m, block, (w & ~15u) | (s ? UF_REINSTALLED : UF_DIRTY));
	}
	if (s)
		uf_slot_release(s); // its blocks are what the slot takes them for again
	pthread_mutex_unlock(&p->lock);
	if (dropped || m->delivery == UF_DELIVERY_DIRECT)
		uf_wake(m, block, 1);
	return true;
}

// A missing page of a resident block, whose word the caller saw. True: other code dropped it.
static bool dropped_page(struct uf_memory *m, uint64_t block, uint32_t seen, char *page_address)
{
	// An eviction stores EVICTING before it drops pages: if the word is as it was, it was none.
	if (uf_page_present(m->pager, page_address) || uf_word(m, block) != seen)
		return false;
	if (!atomic_exchange_explicit(&m->told_of_drops, true, memory_order_relaxed))
		uf_log("%s: other code dropped pages of block %llu (madvise or the like). They are read again; this is said once.", m->name,
		       (unsigned long long)block);
	return true;
}

// Its owner wakes the block afterwards, if it knows that somebody was dropped. False: look at the state again.
static bool leave_to_owner(struct uf_memory *m, uint64_t block, uint64_t t_ns, struct uf_staging *st)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	struct uf_job *held = NULL;
	enum uf_state s = UF_STATE(uf_word(m, block));
	bool owned = s == UF_LOADING || s == UF_UPGRADING;
	if (owned) {
		m->stats.duplicates++;
		uf_seen(m, block, false); // its write comes as a fault of its own
		// A read may be queued far behind, or held.
		if (s == UF_LOADING)
			held = uf_job_demand(m, block, t_ns);
		// Relaxed: under the lock, as its reader (uf_loaded).
		atomic_fetch_or_explicit(&m->state[block], UF_WORD_DROPPED, memory_order_relaxed);
		if (s == UF_LOADING)
			uf_readahead_follow(m, block);
	}
	pthread_mutex_unlock(&p->lock);
	if (held)
		uf_job_read(held, UF_RING_SLOT(p->ring, uf_job_index(p, held)), st);
	return owned;
}

static void duplicate(struct uf_memory *m)
{
	pthread_mutex_lock(&m->pager->lock);
	m->stats.duplicates++;
	pthread_mutex_unlock(&m->pager->lock);
}

// One look at the block's state. True: the fault is dealt with, or somebody else's; the thread is woken if it must be.
// `wp`: it trapped on write protection; `write`: it is a write.
bool uf_fault_step(struct uf_memory *m, uint64_t block, char *page_address, bool wp, bool write, uint64_t t_ns,
		   struct uf_staging *st)
{
	struct uf_pager *p = m->pager;
	uint32_t w = uf_word(m, block);
	switch (UF_STATE(w)) {
	case UF_ABSENT:
		return uf_demand(m, block, write, t_ns, st);
	case UF_LOADING:
	case UF_UPGRADING:
		return leave_to_owner(m, block, t_ns, st);
	case UF_EVICTING:
		return true; // its owner wakes the block, always
	case UF_CLEAN:
		if (wp && m->store)
			return uf_upgrade(m, block);
		duplicate(m);
		if (wp) {
			refuse_write(m, page_address);
			return true;
		}
		if (dropped_page(m, block, w, page_address) && uf_evict_blocks(m, block, 1, true))
			return true; // evicting wakes, and the thread finds it absent
		break;
	case UF_WRITING:
		return uf_restore(m, block, write || wp);
	case UF_RESTORED:
		if (wp)
			return uf_upgrade(m, block);
		if (dropped_page(m, block, w, page_address))
			return uf_restore(m, block, write);
		break;
	case UF_REINSTALLED:
	case UF_DIRTY:
		if (wp && page_protected(p, page_address))
			return uf_upgrade(m, block);
		if (!wp && dropped_page(m, block, w, page_address))
			return UF_STATE(w) == UF_REINSTALLED ? uf_restore(m, block, true) : uf_demand(m, block, true, t_ns, st);
		break;
	case UF_POISONED: {
		// Foreign code dropped the marker.
		struct uffdio_poison z = {{(uintptr_t)page_address, p->page}, UFFDIO_POISON_MODE_DONTWAKE, 0};
		if (uf_host_probe()->poison)
			ioctl(m->uffd, UFFDIO_POISON, &z);
		else
			mprotect(page_address, p->page, PROT_NONE);
		break;
	}
	}
	// A duplicate: the page is there.
	if (m->delivery == UF_DELIVERY_THREAD)
		uf_range_wake(m->uffd, page_address, p->page);
	return true;
}

static void handle_fault(struct uf_memory *m, const struct uffd_msg *msg, uint64_t t_ns)
{
	struct uf_pager *p = m->pager;
	uintptr_t address = msg->arg.pagefault.address & ~(uintptr_t)(p->page - 1);
	uint64_t offset = address - (uintptr_t)m->base;
	if (address < (uintptr_t)m->base || offset >= m->length)
		return; // not a message of ours; nothing registered can send it
	bool wp = msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP;
	bool write = wp || (m->store && msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE);
	while (!uf_fault_step(m, offset >> m->shift, (char *)address, wp, write, t_ns, &p->fault_staging))
		if (atomic_load_explicit(&m->closed, memory_order_acquire))
			return; // closing wakes everybody
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
		if (UF_STATE(uf_word(m, block)) == UF_DIRTY && m->refilling != UF_NIL) {
			pending_add(m, block); // its turn comes when that one has ended
			uf_memory_put_locked(m);
			continue;
		}
		pthread_mutex_unlock(&p->lock);
		// Its message was consumed: serve it, or let the thread look again.
		if (block < m->nblocks && (UF_STATE(uf_word(m, block)) != UF_ABSENT ||
					   !uf_demand(m, block, false, uf_now_ns(), &p->fault_staging)))
			uf_wake(m, block, 1);
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
	uint64_t run = b->step == 1 && !b->single ? uf_min(b->count, per - first % per) : 1;
	int source = uf_kind_at(m, first);
	bool async = source == UF_SOURCE_WORKER || uf_waits_for_disk(m, first);
	// A file that is not in the page cache becomes a job.
	if ((async || (uf_is_file_kind(source) && !(source == UF_SOURCE_FILE ? m->inline_file : m->inline_scratch))) &&
	    !uf_job_available(p, true))
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
		uf_seen_coming(m, first, n, false);
		uf_reserve(m, first, n, kind);
		pthread_mutex_unlock(&p->lock);
		struct uf_failure why;
		int err = uf_load_inline(m, first, n, kind, &p->fault_staging, op, 0, false, &why);
		pthread_mutex_lock(&p->lock);
		if (!err)
			return true;
		inline_work = true;
		uf_unreserve(m, first, n, kind);
		if (!atomic_load_explicit(&m->closed, memory_order_relaxed)) {
			// Only files, and scratch, have I/O threads that would take it.
			if (!uf_is_file_kind(source) || err != -EAGAIN || !uf_job_post(m, first, n, kind, 0, NULL)) {
				uf_unclaim(m, first, n);
				wake = n;
				if (kind == UF_TRACE_PREFETCH && err != -EAGAIN && n == 1)
					uf_record_error(m, first, 1, 1, -err, why.message, false);
				else if (kind == UF_TRACE_PREFETCH && n > 1)
					uf_background_add(m, (struct uf_background){first, n, 1, UF_NIL, kind, true});
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

// Is there a fill to go on with? What is done goes; a plan follows what the program itself asked for. Lock held.
static bool more_background(struct uf_memory *m)
{
	while (m->nbackground && !m->background[0].count) {
		for (unsigned k = 1; k < m->nbackground; k++)
			m->background[k - 1] = m->background[k];
		m->nbackground--;
	}
	uf_replay_feed(m);
	return m->nbackground;
}

// Does one piece of each memory's background fills. Fault thread, without lock.
bool uf_background_step(struct uf_pager *p)
{
	bool more = false;
	pthread_mutex_lock(&p->lock);
	p->rescan = false;
	for (uint32_t i = 0; i < p->memories_capacity; i++) {
		struct uf_memory *m = p->memories[i] && (p->memories[i]->nbackground || p->memories[i]->replay) ? uf_memory_get(p, i) : NULL;
		if (!m)
			continue;
		// All that goes to jobs at once; inline work piece by piece, so that faults come in between.
		bool worked = false;
		while (!worked && more_background(m)) {
			if (!uf_room_now(m, uf_block_size(m), false))
				break; // what is being written makes room, and calls again
			if (!m->nbackground)
				break; // the lock was dropped
			uint64_t before = m->background[0].count;
			if (!before)
				break;
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
