// SPDX-License-Identifier: Apache-2.0
// Slots to the store: by an I/O thread (files, scratch) or by a worker; and flush, which waits for it.
//
// One write-back per block at a time: a block whose older version is still on its way (REINSTALLED, RESTORED) is not taken
// again before that has ended, or the older version could arrive last.
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

static const uint64_t pause_ns = 1000000000; // evictions of dirty blocks after a write-back that failed

static bool closed(const struct uf_memory *m)
{
	return atomic_load_explicit(&m->closed, memory_order_relaxed);
}

static bool to_worker(const struct uf_slot *s)
{
	return s->memory->kind == UF_SOURCE_WORKER && (s->memory->store == UF_STORE_SOURCE || s->staged);
}

// A try failed. Lock held, may drop it.
static void failed_once(struct uf_slot *s, int err, const char *message)
{
	struct uf_memory *m = s->memory;
	struct uf_pager *p = m->pager;
	if (closed(m)) {
		uf_slot_done(s, -ECANCELED, "the memory was closed");
		return;
	}
	snprintf(s->message, sizeof(s->message), "%s", message);
	// A full disk does not get empty while we wait, and the caller of flush wants to know.
	if (++s->tries < p->options.attempts && err != -ENOSPC && err != -EDQUOT && err != -EFBIG && err != -EROFS) {
		m->stats.retries++;
		s->state = UF_SLOT_DELAYED;
		s->due_ns = uf_now_ns() + (p->options.backoff_ns << (s->tries - 1));
		uf_super_kick(p);
		return;
	}
	m->stats.write_errors++;
	uf_record_error(m, s->first, s->count, s->tries, -err, s->message, false);
	m->stats.errlog[(m->errlog_next - 1) % UF_ERRORS_KEPT].write = true;
	m->write_not_before_ns = uf_now_ns() + pause_ns;
	if (!m->complained) {
		m->complained = true;
		uf_log("%s: %llu block%s from block %llu on cannot be written to %s: %s. Nothing is lost: what is dirty stays in memory, "
		       "beyond the budget if need be, and is written again later. This is said once until a write succeeds.",
		       m->name, (unsigned long long)s->count, s->count == 1 ? "" : "s", (unsigned long long)s->first,
		       m->store == UF_STORE_SOURCE || s->staged ? "the source" : "scratch", s->message);
	}
	uf_slot_done(s, err, s->message);
}

// --- files and scratch

static int write_file(struct uf_slot *s, const char *bytes)
{
	struct uf_memory *m = s->memory;
	uint64_t at = m->offset + (s->first << m->shift), n = uf_run_bytes(m, s->first, s->count);
	for (uint64_t done = 0; done < n;) {
		ssize_t r = pwrite(m->fd, bytes + done, n - done, (off_t)(at + done));
		if (r > 0)
			done += (uint64_t)r;
		else if (r == 0)
			return -ENOSPC;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

struct uf_slot *uf_write_next(struct uf_pager *p)
{
	struct uf_slot *best = NULL;
	unsigned active = p->writing + p->repairing;
	for (unsigned i = 0; p->slots_used && i < UF_SLOTS; i++) {
		struct uf_slot *s = &p->slots[i];
		// A staged flush that copies out of scratch owns nothing: until it has, nothing there may change.
		if (s->state == UF_SLOT_QUEUED && !to_worker(s) && !s->memory->scratch_readers && (!best || s->seq < best->seq))
			best = s;
	}
	if (!best || (active && active + 1 >= p->io_started)) // one thread is left for reads
		return NULL;
	best->state = UF_SLOT_ACTIVE;
	return best;
}

void uf_write_native(struct uf_slot *s, struct uf_staging *st)
{
	struct uf_memory *m = s->memory;
	struct uf_pager *p = m->pager;
	const char *bytes = uf_slot_bytes(p, s);
	bool scratch = m->store != UF_STORE_SOURCE;
	int err = -ECANCELED;
	if (!closed(m))
		err = scratch ? uf_scratch_write(s, bytes, st) : write_file(s, bytes);
	pthread_mutex_lock(&p->lock);
	if (err) {
		if (scratch && err != -ECANCELED)
			uf_scratch_failed(s);
		failed_once(s, err, strerrordesc_np(-err));
	} else {
		if (scratch)
			uf_scratch_publish(s);
		uf_slot_done(s, 0, "");
	}
	pthread_mutex_unlock(&p->lock);
}

// --- workers

// Hands queued slots to jobs, oldest first.
void uf_writes_post(struct uf_pager *p)
{
	while (p->slots_used && p->write_jobs < UF_WRITE_JOBS && p->ring) {
		struct uf_slot *best = NULL;
		for (unsigned i = 0; i < UF_SLOTS; i++) {
			struct uf_slot *s = &p->slots[i];
			if (s->state == UF_SLOT_QUEUED && to_worker(s) && (!best || s->seq < best->seq))
				best = s;
		}
		if (!best || !uf_job_post_write(best))
			return;
		best->state = UF_SLOT_ACTIVE;
	}
}

// The job ends here; the slot lives on if it is to be tried again.
void uf_write_answered(struct uf_job *j, int err, const char *message)
{
	struct uf_slot *s = j->slot;
	struct uf_pager *p = j->memory->pager;
	atomic_fetch_add_explicit(&j->memory->refs, 1, memory_order_relaxed);
	struct uf_memory *m = j->memory;
	uf_job_free(j);
	if (err)
		failed_once(s, err, message);
	else
		uf_slot_done(s, 0, "");
	uf_writes_post(p);
	uf_memory_put_locked(m);
}

uint64_t uf_writes_due(struct uf_pager *p, uint64_t now)
{
	uint64_t next = UINT64_MAX;
	for (unsigned i = 0; p->slots_used && i < UF_SLOTS; i++) {
		struct uf_slot *s = &p->slots[i];
		if (s->state != UF_SLOT_DELAYED)
			continue;
		if (s->due_ns > now && !closed(s->memory)) {
			next = uf_min(next, s->due_ns);
			continue;
		}
		s->state = UF_SLOT_QUEUED;
		if (!to_worker(s))
			pthread_cond_signal(&p->io_work);
	}
	uf_writes_post(p);
	return next;
}

// --- flush

void uf_flush_failed(struct uf_flush *f, uint64_t block, int err, const char *message)
{
	if (f->n < f->most) {
		struct uf_failure *why = &f->failures[f->n];
		why->block = block;
		why->err = err;
		snprintf(why->message, sizeof(why->message), "%s", message);
	}
	f->n++;
}

// The next block from `at` on that may be dirty; `end` if there is none.
static uint64_t next_dirty(const struct uf_memory *m, uint64_t at, uint64_t end)
{
	while (at < end) {
		uint64_t bits = atomic_load_explicit(&m->dirty[at / 64], memory_order_relaxed) >> at % 64;
		if (bits)
			return uf_min(at + (uint64_t)__builtin_ctzll(bits), end);
		at = (at / 64 + 1) * 64;
	}
	return end;
}

// Takes a copy of a run of DIRTY blocks to the store; they stay resident, and are clean when it is written. Lock held, drops
// it. Returns how many blocks are dealt with; 0: look again. `*repaired` is the block where pages had to be made our own.
static uint64_t flush_run(struct uf_memory *m, uint64_t first, uint64_t end, struct uf_flush *f, uint64_t *repaired)
{
	struct uf_pager *p = m->pager;
	uint64_t unit = 1ULL << (m->unit_shift - m->shift), count = 0;
	while (p->forking) // it waits for those that have begun
		uf_wait_changed(p, 1);
	end = uf_min(end, (first / unit + 1) * unit);
	// Where a device writes, nothing is moved: a copy of what is there is written, and the blocks stay dirty.
	bool pinned = uf_pinned(m, first);
	while (first + count < end && UF_STATE(uf_word(m, first + count)) == UF_DIRTY && uf_pinned(m, first + count) == pinned)
		count++;
	if (closed(m))
		return 0;
	struct uf_slot *s = count ? uf_slot_take(m, first, count, false) : NULL;
	m->flush_waits = count && !s;
	struct uf_op *op = s ? uf_op_begin(p, m, UF_EVICTING) : NULL;
	if (!op) {
		if (s)
			uf_slot_free(s);
		uf_wait_changed(p, 5);
		return 0;
	}
	op->part[0].first = first;
	op->part[0].count = count;
	for (uint64_t b = first; b < first + count; b++)
		uf_word_store(m, b, (uf_word(m, b) & UF_WORD_MAIN) | UF_EVICTING);
	p->moving++;
	pthread_mutex_unlock(&p->lock);

	bool woken;
	int err = pinned ? -EBUSY : uf_slot_fill(s), lost = 0;
	// At once back: whoever works with them does not notice.
	if (!err && (lost = uf_copy_run(m, uf_block_address(m, first), uf_slot_bytes(p, s), count << m->shift, true, &woken))) {
		struct uf_range run = {first, count}; // all of it or nothing; in the slot it is
		uf_forget_pages(m, &run, 1);
	}

	pthread_mutex_lock(&p->lock);
	bool shut = closed(m), repair = err && !pinned && *repaired != first;
	uint32_t slot = (uint32_t)(s - p->slots) << UF_SLOT_SHIFT;
	// Not to be had exclusively: a device may write there, a fork may share it. Then what is there is written, and the blocks
	// stay dirty.
	uint32_t now = lost ? slot | UF_WRITING : !err ? slot | UF_RESTORED : repair ? UF_DIRTY : slot | UF_REINSTALLED;
	for (uint64_t b = first; b < first + count && !shut; b++) {
		if (lost)
			uf_dequeue(m, b);
		uf_word_store(m, b, (uf_word(m, b) & UF_WORD_MAIN) | now);
	}
	s->settled = repair;
	bool held = !shut && !repair;
	if (held) {
		if (!lost)
			uf_account(m, count << m->shift);
		uf_slot_hold(s);
		s->restoring++; // nobody finishes it before we are through
	}
	uf_op_end(op); // nothing is owned any more; the flush has a reference of its own
	p->moving--;
	pthread_cond_broadcast(&p->changed);
	pthread_mutex_unlock(&p->lock);
	if (!shut)
		uf_wake(m, first, count);
	if (!shut && repair) // not owned: a page that is missing faults like the program's own access
		uf_make_own(m, first, count);
	if (held && err)
		err = uf_slot_copy(s);
	pthread_mutex_lock(&p->lock);
	if (held)
		s->restoring--;
	if (repair || closed(m)) {
		if (repair)
			*repaired = first;
		while (s->restoring) // a first write that met the slot
			uf_wait_changed(p, 1);
		uf_slot_free(s);
		return closed(m) ? count : 0;
	}
	f->pending++;
	s->flush = f;
	if (err)
		uf_slot_done(s, err, "pages of it are missing: other code dropped them");
	else
		uf_slot_queue(s);
	pthread_mutex_unlock(&p->lock);
	uf_wake(m, first, count); // who met the slot while it was filled was left to us
	pthread_mutex_lock(&p->lock);
	return count;
}

void uf_flush_blocks(struct uf_memory *m, uint64_t first, uint64_t count, struct uf_flush *f)
{
	struct uf_pager *p = m->pager;
	uint64_t end = first + count, repaired = UF_NIL;
	pthread_mutex_lock(&p->lock);
	for (uint64_t at = first; (at = next_dirty(m, at, end)) < end && !closed(m);) {
		switch (UF_STATE(uf_word(m, at))) {
		case UF_DIRTY:
			at += flush_run(m, at, end, f, &repaired);
			break;
		case UF_RESTORED:
		case UF_REINSTALLED:
		case UF_WRITING: // an older version is on its way: what was written since must follow it
		case UF_LOADING:
		case UF_UPGRADING:
		case UF_EVICTING:
			uf_wait_changed(p, 5);
			break;
		default: // poisoned, or cleaned by others since
			at++;
			break;
		}
	}
	while (f->pending)
		uf_wait_changed(p, 1000);
	pthread_mutex_unlock(&p->lock);
}
