// SPDX-License-Identifier: Apache-2.0
// Dirty blocks: out of memory into a slot, and back from it.
//
// Nobody waits for the store. An eviction takes a dirty run's pages away by UFFDIO_MOVE into a slot of the stash (some 20 us,
// no I/O) and the blocks are WRITING; a fault meanwhile is served from the slot. MOVE comes first, for it refuses pages
// that are pinned: a device writes there behind any protection. Where there is no MOVE, or it refuses the mapping (locked
// memory), the run is write-protected, copied and dropped, which cannot see pins (engine-notes §3).
//
// EBUSY has two reasons: a pin, or pages that a fork shares. An I/O thread makes such pages the process's own again
// (MADV_POPULATE_WRITE), and the next eviction finds them so. Pages that foreign code dropped come back the same way,
// through a fault of that thread. The engine never touches the program's pages by itself: a close in between would kill it.
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

// --- the stash

int uf_stash_register(struct uf_pager *p)
{
	p->stash_uffd = -1;
	if (!uf_host_probe()->move || p->options.no_move)
		return 0;
	int err = uf_uffd_open(p->options.user_mode_only, 0, &p->stash_uffd);
	if (err)
		return err;
	// For write protection only, which is never set: with MISSING a read of an empty page would wait for us.
	struct uffdio_register r = {{(uintptr_t)p->stash, (size_t)UF_SLOTS * UF_EXTENT}, UFFDIO_REGISTER_MODE_WP, 0};
	if (ioctl(p->stash_uffd, UFFDIO_REGISTER, &r)) {
		err = -errno;
		close(p->stash_uffd);
		p->stash_uffd = -1;
	}
	return err;
}

int uf_stash_init(struct uf_pager *p)
{
	if (p->stash)
		return 0;
	size_t len = (size_t)UF_SLOTS * UF_EXTENT;
	char *area = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		return -errno;
	madvise(area, len, MADV_NOHUGEPAGE); // a huge page in the way would make MOVE split it
	madvise(area, len, MADV_DONTDUMP);
	munlock(area, len); // after mlockall(MCL_FUTURE): MOVE asks both sides to be locked or unlocked alike
	madvise(area, len, MADV_DONTNEED);
	p->stash = area;
	int err = uf_stash_register(p);
	if (err) {
		munmap(area, len);
		p->stash = NULL;
	}
	return err;
}

void uf_stash_deinit(struct uf_pager *p)
{
	if (p->stash_uffd >= 0)
		close(p->stash_uffd);
	p->stash_uffd = -1;
	if (p->stash)
		munmap(p->stash, (size_t)UF_SLOTS * UF_EXTENT);
	p->stash = NULL;
}

char *uf_slot_bytes(const struct uf_pager *p, const struct uf_slot *s)
{
	return p->stash + (size_t)(s - p->slots) * UF_EXTENT;
}

// --- taking and giving back

void uf_dirty_set(struct uf_memory *m, uint64_t block)
{
	if (uf_is_dirty(m, block))
		return;
	atomic_fetch_or_explicit(&m->dirty[block / 64], 1ULL << block % 64, memory_order_relaxed);
	m->stats.dirty += uf_block_size(m);
}

void uf_dirty_clear(struct uf_memory *m, uint64_t block)
{
	if (!uf_is_dirty(m, block))
		return;
	atomic_fetch_and_explicit(&m->dirty[block / 64], ~(1ULL << block % 64), memory_order_relaxed);
	m->stats.dirty -= uf_block_size(m);
}

// A quarter of a budget may be in slots, and always one run: more would only be memory in another place. And no memory has all
// slots, or all of its budget's share: a store that hangs must not stop the others.
static bool may_take(const struct uf_memory *m, uint64_t bytes, bool staged)
{
	const struct uf_pager *p = m->pager;
	unsigned mine = 0, sent = 0, left = UF_SLOTS - p->slots_used;
	uint64_t own = 0;
	for (unsigned i = 0; i < UF_SLOTS && p->slots_used; i++) {
		const struct uf_slot *s = &p->slots[i];
		if (s->state != UF_SLOT_FREE) {
			sent += s->staged;
			mine += !s->staged && s->memory == m;
			own += !s->staged && s->memory == m ? s->count << m->shift : 0;
		}
	}
	if (!left || (staged ? sent >= UF_SLOTS / 4 : mine >= UF_SLOTS / 2) || (left <= UF_SLOTS_SPARE && (staged ? sent : mine)))
		return false;
	uint64_t most = uf_min(uf_pool_effective_limit(p, m->pool), p->limit) / 4;
	return staged || !mine || (own + bytes <= most && m->pool->leaving + bytes <= 2 * most);
}

bool uf_in_slot(const struct uf_memory *m, uint64_t block)
{
	const struct uf_pager *p = m->pager;
	for (unsigned i = 0; i < UF_SLOTS && p->slots_used; i++) {
		const struct uf_slot *s = &p->slots[i];
		if (s->state != UF_SLOT_FREE && s->memory == m && !s->staged && !s->settled && block - s->first < s->count)
			return true;
	}
	return false;
}

struct uf_slot *uf_slot_take(struct uf_memory *m, uint64_t first, uint64_t count, bool staged)
{
	struct uf_pager *p = m->pager;
	if (!may_take(m, count << m->shift, staged))
		return NULL;
	for (unsigned i = 0; i < UF_SLOTS; i++) {
		struct uf_slot *s = &p->slots[i];
		if (s->state != UF_SLOT_FREE)
			continue;
		atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
		s->state = UF_SLOT_FILLING;
		s->memory = m;
		s->first = first;
		s->count = count;
		s->staged = staged;
		s->resident = s->settled = false;
		s->restoring = s->tries = 0;
		s->result = 0;
		s->flush = NULL;
		s->message[0] = 0;
		p->slots_used++;
		return s;
	}
	return NULL;
}

void uf_slot_unhold(struct uf_slot *s)
{
	if (!s->resident)
		return;
	uint64_t bytes = s->count << s->memory->shift;
	s->memory->pool->leaving -= bytes;
	s->memory->pager->leaving -= bytes;
	s->resident = false;
}

// From now on the slot holds its bytes, which count as resident until they are written. Lock held.
void uf_slot_hold(struct uf_slot *s)
{
	if (s->staged || s->resident)
		return;
	uint64_t bytes = s->count << s->memory->shift;
	s->memory->pool->leaving += bytes;
	s->memory->pager->leaving += bytes;
	s->resident = true;
}

void uf_slot_free(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	struct uf_pager *p = m->pager;
	uf_slot_unhold(s);
	s->settled = true; // a forked child must not take zeros out of it
	s->state = UF_SLOT_ENDING;
	pthread_mutex_unlock(&p->lock);
	madvise(uf_slot_bytes(p, s), s->count << m->shift, MADV_DONTNEED); // MOVE fills empty pages only
	pthread_mutex_lock(&p->lock);
	s->state = UF_SLOT_FREE;
	s->memory = NULL;
	p->slots_used--;
	uf_job_freed(p); // faults, flushes and queued evictions may have waited for it
	uf_memory_put_locked(m);
}

// --- pages into a slot

static int move(int uffd, char *dst, char *src, size_t len, size_t *done)
{
	unsigned stalls = 0;
	*done = 0;
	while (*done < len) {
		struct uffdio_move v = {
			.dst = (uintptr_t)dst + *done,
			.src = (uintptr_t)src + *done,
			.len = len - *done,
			.mode = UFFDIO_MOVE_MODE_DONTWAKE,
		};
		if (!ioctl(uffd, UFFDIO_MOVE, &v)) {
			*done = len;
		} else if (v.move > 0) { // partial: the next call tells why
			*done += (size_t)v.move;
			stalls = 0;
		} else if (errno != EAGAIN || ++stalls > 1000) {
			return -errno;
		} else {
			sched_yield();
		}
	}
	return 0;
}

// By /proc/self/mem. A missing page makes that fail at once, where memcpy would wait for a fault that we serve ourselves; and
// a close meanwhile does no harm.
static int copy_from_program(const struct uf_pager *p, char *dst, const char *src, size_t len)
{
	for (size_t done = 0; done < len;) {
		ssize_t n = pread(p->mem_fd, dst + done, len - done, (off_t)((uintptr_t)src + done));
		if (n <= 0)
			return n < 0 && errno == EBADF ? -EBADF : -ENOENT;
		done += (size_t)n;
	}
	return 0;
}

static int protect(struct uf_memory *m, char *at, size_t len, bool on)
{
	struct uffdio_writeprotect w = {{(uintptr_t)at, len}, on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
	unsigned stalls = 0;
	while (ioctl(m->uffd, UFFDIO_WRITEPROTECT, &w)) {
		if (errno != EAGAIN || ++stalls > 10000)
			return -errno;
		sched_yield();
	}
	return 0;
}

void uf_unprotect(struct uf_memory *m, uint64_t first, uint64_t count)
{
	protect(m, uf_block_address(m, first), count << m->shift, false);
}

// Takes the run's pages out. 0; -EBUSY: pinned or shared; -ENOENT: foreign code dropped some. On failure all pages are back.
int uf_slot_fill(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	struct uf_pager *p = m->pager;
	char *at = uf_block_address(m, s->first), *bytes = uf_slot_bytes(p, s);
	size_t len = s->count << m->shift, done = 0, back = 0;
	int err = -EINVAL;
	if (p->stash_uffd >= 0) {
		err = move(p->stash_uffd, bytes, at, len, &done);
		if (!err)
			return 0;
		// What went comes back, writable: the blocks are DIRTY again. There is no other place for it.
		bool woken;
		if (done && move(m->uffd, at, bytes, done, &back))
			while (uf_copy_run(m, at + back, bytes + back, done - back, false, &woken) &&
			       !atomic_load_explicit(&m->closed, memory_order_acquire))
				usleep(1000);
		madvise(bytes, len, MADV_DONTNEED);
		if (err != -EINVAL) // EINVAL: this mapping is none that MOVE takes
			return err;
	}
	err = protect(m, at, len, true);
	if (!err)
		err = copy_from_program(p, bytes, at, len);
	if (err) {
		protect(m, at, len, false);
		madvise(bytes, len, MADV_DONTNEED);
		return err;
	}
	struct uf_range run = {s->first, s->count};
	uf_forget_pages(m, &run, 1);
	return 0;
}

int uf_slot_copy(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	return copy_from_program(m->pager, uf_slot_bytes(m->pager, s), uf_block_address(m, s->first), s->count << m->shift);
}

void uf_slot_queue(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	struct uf_pager *p = m->pager;
	uf_slot_hold(s);
	s->seq = ++p->slot_seq;
	s->queued_ns = uf_now_ns();
	s->state = UF_SLOT_QUEUED;
	if (m->kind == UF_SOURCE_WORKER && (m->store == UF_STORE_SOURCE || s->staged))
		uf_writes_post(p);
	else
		pthread_cond_signal(&p->io_work);
}

// --- and back

// Serves a fault on a block whose bytes are in a slot: WRITING, or REINSTALLED and RESTORED of which pages were dropped.
bool uf_restore(struct uf_memory *m, uint64_t block, bool write)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	uint32_t w = uf_word(m, block);
	enum uf_state was = UF_STATE(w);
	if ((was != UF_WRITING && was != UF_REINSTALLED && was != UF_RESTORED) ||
	    atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		pthread_mutex_unlock(&p->lock);
		return false;
	}
	struct uf_op *op = uf_op_begin(p, m, UF_LOADING);
	if (!op) {
		uf_wait_changed(p, 1);
		pthread_mutex_unlock(&p->lock);
		return false;
	}
	struct uf_slot *s = &p->slots[w >> UF_SLOT_SHIFT];
	if (s->state == UF_SLOT_FILLING) { // by a flush (flush_run), which wakes the run afterwards
		uf_op_end(op);
		pthread_mutex_unlock(&p->lock);
		return true;
	}
	op->part[0].first = block;
	op->part[0].count = 1;
	op->restores = true;
	s->restoring++;
	uf_seen(m, block, write);
	if (was == UF_WRITING)
		uf_account(m, uf_block_size(m)); // beside the slot's own, until that is written
	else
		uf_dequeue(m, block);
	bool protect_it = !write && was != UF_REINSTALLED;
	// All comes protected: if it fails half way, nobody has written to what arrived.
	uf_word_store(m, block, (w & UF_SLOT_BITS) | UF_LOADING);
	pthread_mutex_unlock(&p->lock);

	char *bytes = uf_slot_bytes(p, s) + ((block - s->first) << m->shift);
	bool woken;
	int err = uf_copy_run(m, uf_block_address(m, block), bytes, uf_block_size(m), true, &woken);
	if (err && was == UF_WRITING && !atomic_load_explicit(&m->closed, memory_order_acquire)) {
		struct uf_range run = {block, 1};
		uf_forget_pages(m, &run, 1);
	} else if (!err && !protect_it) {
		uf_unprotect(m, block, 1);
	}

	pthread_mutex_lock(&p->lock);
	bool closed = atomic_load_explicit(&m->closed, memory_order_relaxed), dropped = uf_word(m, block) & UF_WORD_DROPPED;
	if (closed) {
		uf_unroom(m, uf_block_size(m)); // it was in no queue: uf_pool_leave did not see it
	} else if (err && was == UF_WRITING) {
		// Whatever went wrong: the bytes are in the slot, and the next fault tries again.
		uf_unroom(m, uf_block_size(m));
		uf_word_store(m, block, (w & (UF_SLOT_BITS | UF_WORD_MAIN)) | UF_WRITING);
	} else {
		// On a failure what was there is there still, and may be newer than the slot's.
		enum uf_state now = err ? was : protect_it ? UF_RESTORED : UF_REINSTALLED;
		uf_enqueue_main(m, block);
		uf_seen_done(m, block, 1);
		uf_word_store(m, block, (w & UF_SLOT_BITS) | UF_WORD_MAIN | now);
		m->stats.reinstalled += was == UF_WRITING;
	}
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed); // for the wake-up
	uf_op_end(op);
	uf_slot_release(s);
	pthread_mutex_unlock(&p->lock);
	if (!closed && (!woken || dropped || m->delivery == UF_DELIVERY_DIRECT))
		uf_wake(m, block, 1);
	uf_memory_put(m);
	return true;
}

// The blocks of a failed write-back that are not in memory come back, writable. Lock held; drops it. On return nobody works
// on any of them.
static void reinstall(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	struct uf_pager *p = m->pager;
	for (uint64_t b = s->first; b < s->first + s->count && !atomic_load_explicit(&m->closed, memory_order_relaxed);) {
		if (s->restoring) {
			uf_wait_changed(p, 1);
			b = s->first; // one that failed may be WRITING again
		} else if (UF_STATE(uf_word(m, b)) == UF_WRITING) {
			pthread_mutex_unlock(&p->lock);
			uf_restore(m, b, true);
			pthread_mutex_lock(&p->lock);
			uf_seen_blind(m, b); // nobody has touched it
			if (UF_STATE(uf_word(m, b)) == UF_WRITING)
				uf_wait_changed(p, 10); // out of memory, or of records: it has to go somewhere
		} else {
			b++;
		}
	}
}

static void finish(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	struct uf_pager *p = m->pager;
	bool failed = s->result < 0;
	s->state = UF_SLOT_ENDING; // nobody else finishes it
	if (failed)
		reinstall(s);
	while (s->restoring) // a first write to a RESTORED block, a page that foreign code dropped: short
		uf_wait_changed(p, 1);
	for (uint64_t b = s->first; b < s->first + s->count && !atomic_load_explicit(&m->closed, memory_order_relaxed); b++) {
		uint32_t w = uf_word(m, b), queue = w & UF_WORD_MAIN;
		switch (UF_STATE(w)) {
		case UF_WRITING:
			uf_dirty_clear(m, b);
			uf_word_store(m, b, uf_stamp(m) << UF_STAMP_SHIFT | queue | UF_ABSENT);
			m->stats.evictions++;
			break;
		case UF_RESTORED:
			if (failed) { // its protection stays: the next write lifts it (upgrade in fault.c)
				uf_word_store(m, b, queue | UF_DIRTY);
			} else {
				uf_dirty_clear(m, b);
				uf_word_store(m, b, queue | UF_CLEAN);
			}
			break;
		case UF_REINSTALLED:
			uf_word_store(m, b, queue | UF_DIRTY);
			break;
		default: // cannot be: `restoring` is 0
			break;
		}
	}
	s->settled = true;
	if (!failed && m->unsynced)
		uf_unsynced_add(m, s->first, s->count);
	if (!failed && !atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		uf_trace(m, s->first, s->count, UF_TRACE_WRITE, UF_NIL, 0);
		m->complained = false;
	}
	if (s->resident) // else the close has taken it off
		uf_unroom(m, s->count << m->shift);
	uf_slot_unhold(s);
	if (s->flush) {
		if (failed) {
			for (uint64_t b = s->first; b < s->first + s->count; b++)
				uf_flush_failed(s->flush, b, s->result, s->message);
		}
		s->flush->pending--;
		s->flush = NULL;
	}
	pthread_mutex_unlock(&p->lock);
	// The rule: new state first, then wake the whole run.
	if (!atomic_load_explicit(&m->closed, memory_order_acquire))
		uf_wake(m, s->first, s->count);
	pthread_mutex_lock(&p->lock);
	uf_slot_free(s);
}

void uf_slot_release(struct uf_slot *s)
{
	if (!--s->restoring && s->state == UF_SLOT_DONE)
		finish(s);
}

void uf_slot_done(struct uf_slot *s, int err, const char *message)
{
	struct uf_memory *m = s->memory;
	s->result = err;
	if (message != s->message)
		snprintf(s->message, sizeof(s->message), "%s", message);
	s->state = UF_SLOT_DONE;
	if (!err && !s->staged && !atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		m->stats.writebacks += s->count;
		m->stats.bytes_written += uf_run_bytes(m, s->first, s->count);
		uf_histogram_add(&m->stats.latency[UF_STAGE_WRITE], uf_now_ns() - s->queued_ns);
	}
	if (s->staged) { // block states do not know it
		if (s->flush) {
			for (uint64_t b = s->first; err && b < s->first + s->count; b++)
				uf_flush_failed(s->flush, b, err, s->message);
			s->flush->pending--;
			s->flush = NULL;
		}
		uf_slot_free(s);
	} else if (!s->restoring) {
		finish(s);
	}
}

// The memory closes. What nobody works on ends now. Lock held, may drop it.
void uf_slots_leave(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	for (unsigned i = 0; i < UF_SLOTS; i++) {
		struct uf_slot *s = &p->slots[i];
		if (s->state == UF_SLOT_FREE || s->memory != m)
			continue;
		if (s->resident)
			uf_unroom(m, s->count << m->shift);
		uf_slot_unhold(s);
		if (s->flush) {
			s->flush->pending--;
			s->flush = NULL;
		}
	}
	// Then only: this drops the lock, and others find what they hold counted no more.
	for (unsigned i = 0; i < UF_SLOTS; i++) {
		struct uf_slot *s = &p->slots[i];
		if (s->memory == m && (s->state == UF_SLOT_QUEUED || s->state == UF_SLOT_DELAYED))
			uf_slot_done(s, -ECANCELED, "the memory was closed");
	}
}

// --- repairs

void uf_repair_add(struct uf_memory *m, uint64_t block)
{
	struct uf_pager *p = m->pager;
	if (p->repairs_count == UF_REPAIRS)
		return; // it comes again with the next eviction
	unsigned at = (p->repairs_head + p->repairs_count++) % UF_REPAIRS;
	p->repairs[at].memory = m->id;
	p->repairs[at].block = block;
	pthread_cond_signal(&p->io_work);
}

// MADV_POPULATE_WRITE (5.14) writes to the pages without changing them. It fails where the memory is closed.
void uf_make_own(struct uf_memory *m, uint64_t first, uint64_t count)
{
	madvise(uf_block_address(m, first), count << m->shift, MADV_POPULATE_WRITE);
}

void uf_repair_one(struct uf_pager *p)
{
	unsigned at = p->repairs_head;
	p->repairs_head = (p->repairs_head + 1) % UF_REPAIRS;
	p->repairs_count--;
	uint64_t block = p->repairs[at].block;
	struct uf_memory *m = uf_memory_get(p, p->repairs[at].memory);
	if (!m)
		return;
	bool ours = block < m->nblocks && UF_STATE(uf_word(m, block)) == UF_DIRTY;
	p->repairing = true;
	pthread_mutex_unlock(&p->lock);
	if (ours)
		uf_make_own(m, block, 1);
	pthread_mutex_lock(&p->lock);
	p->repairing = false;
	uf_memory_put_locked(m);
}
