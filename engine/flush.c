// SPDX-License-Identifier: Apache-2.0
// What a user asks of writable memory: flush, and eviction of dirty blocks.
//
// A staged flush (UF_STORE_STAGED) goes through scratch: all that changed is spilled first, then sent to the source in order,
// then the source commits. Only then is it forgotten; if the worker is lost on the way, its uncommitted writes are gone
// with it, and all is sent again.
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

#define SENT (1u << 31) // in `spilled`: see scratch.c

static bool closed(const struct uf_memory *m)
{
	return atomic_load_explicit(&m->closed, memory_order_relaxed);
}

static uint64_t next_spilled(const struct uf_memory *m, uint64_t at)
{
	while (at < m->nblocks && !atomic_load_explicit(&m->spilled[at], memory_order_relaxed))
		at++;
	return at;
}

// Sends spilled blocks to the source, unit by unit. Lock held, drops it.
static int send(struct uf_memory *m, struct uf_staging *st, struct uf_flush *f)
{
	struct uf_pager *p = m->pager;
	uint64_t unit = 1ULL << (m->unit_shift - m->shift);
	for (uint64_t at = 0; (at = next_spilled(m, at)) < m->nblocks && !closed(m) && !f->n;) {
		uint64_t end = uf_min((at / unit + 1) * unit, m->nblocks), n = 0;
		// A block that is on its way to scratch is changing there: its turn comes after that.
		while (at + n < end && uf_kind_at(m, at + n) == UF_SOURCE_SCRATCH && !uf_in_slot(m, at + n))
			n++;
		struct uf_slot *s = n ? uf_slot_take(m, at, n, true) : NULL;
		if (!s) {
			uf_wait_changed(p, 5);
			continue;
		}
		for (uint64_t b = at; b < at + n; b++)
			atomic_fetch_or_explicit(&m->spilled[b], SENT, memory_order_relaxed);
		m->scratch_readers++;
		pthread_mutex_unlock(&p->lock);
		int err = uf_scratch_read(m, at, n, uf_slot_bytes(p, s), st->packed, false);
		pthread_mutex_lock(&p->lock);
		if (!--m->scratch_readers)
			pthread_cond_broadcast(&p->io_work); // write-backs that waited
		if (closed(m) || err) {
			if (err)
				uf_flush_failed(f, at, err, "its scratch file cannot be read");
			uf_slot_free(s);
			break;
		}
		f->pending++;
		s->flush = f;
		uf_slot_queue(s);
		at += n;
	}
	while (f->pending)
		uf_wait_changed(p, 1000);
	return closed(m) ? -EBADF : f->n ? -EIO : 0;
}

static void forget_sent(struct uf_memory *m, bool stored)
{
	for (uint64_t b = 0; (b = next_spilled(m, b)) < m->nblocks; b++) {
		if (!(atomic_load_explicit(&m->spilled[b], memory_order_relaxed) & SENT))
			continue; // written again since
		// Somebody reads it from scratch just now, or writes a new version there: it goes with the next flush.
		enum uf_state s = UF_STATE(uf_word(m, b));
		if (stored && (s == UF_ABSENT || s == UF_CLEAN || s == UF_DIRTY) && !uf_in_slot(m, b))
			uf_scratch_drop(m, b);
		else
			atomic_fetch_and_explicit(&m->spilled[b], ~SENT, memory_order_relaxed);
	}
}

static int commit(struct uf_memory *m, struct uf_flush *f, uint64_t failures_before)
{
	struct uf_pager *p = m->pager;
	struct uf_staging st = {0};
	struct uf_failure why = {0};
	int err = uf_staging_init(&st);
	if (err)
		return err;
	pthread_mutex_lock(&p->lock);
	unsigned target = p->sources[m->source_id].target;
	// Once more than a source is tried: at first there may be no worker at all.
	for (unsigned tries = 0; tries <= p->options.attempts; tries++) {
		if (next_spilled(m, 0) == m->nblocks)
			break; // nothing changed: no commit
		if (m->scratch_failures != failures_before) {
			// A failed write may have spoilt an older version that this flush was to send.
			uf_flush_failed(f, UINT64_MAX, err = -EIO, "a block could not be written to its scratch file");
			break;
		}
		uint64_t started = p->workers[target].started_ns;
		f->n = 0;
		err = send(m, &st, f);
		if (!err && m->scratch_failures != failures_before) // meanwhile: send may have found nothing where there was a version
			uf_flush_failed(f, UINT64_MAX, err = -EIO, "a block could not be written to its scratch file");
		if (!err) {
			pthread_mutex_unlock(&p->lock);
			why.message[0] = 0;
			err = uf_source_flush(p, m->source_id, &why);
			pthread_mutex_lock(&p->lock);
			// Another worker than the one that has our writes would commit nothing.
			if (!err && started != p->workers[target].started_ns) {
				err = -ECHILD;
				snprintf(why.message, sizeof(why.message), "the worker was lost before it had committed");
			}
			if (err)
				uf_flush_failed(f, UINT64_MAX, err, why.message);
		}
		forget_sent(m, !err);
		if (closed(m))
			err = -EBADF;
		if (err != -ECHILD && !(err && started != p->workers[target].started_ns))
			break;
	}
	pthread_mutex_unlock(&p->lock);
	uf_staging_deinit(&st);
	return err;
}

// `failures_before`: of scratch, when the flush began.
static int make_durable(struct uf_memory *m, struct uf_flush *f, uint64_t failures_before)
{
	struct uf_pager *p = m->pager;
	struct uf_failure why = {0};
	if (m->store == UF_STORE_STAGED)
		return commit(m, f, failures_before);
	if (m->store != UF_STORE_SOURCE)
		return 0;
	int err = 0;
	if (m->kind == UF_SOURCE_FILE) {
		err = uf_sync(m, &why);
	} else if (m->kind == UF_SOURCE_WORKER) {
		for (unsigned tries = 0; tries < p->options.attempts; tries++) {
			err = uf_source_flush(p, m->source_id, &why);
			if (err != -ECHILD) // a killed worker is replaced, and lost nothing that it had acknowledged
				break;
		}
	}
	if (err) {
		pthread_mutex_lock(&p->lock);
		m->stats.write_errors++;
		uf_flush_failed(f, UINT64_MAX, err, why.message); // no single block's
		pthread_mutex_unlock(&p->lock);
	}
	return err;
}

static int hold(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	while (m->flushing && !closed(m))
		uf_wait_changed(p, 1000);
	int err = closed(m) ? -EBADF : 0;
	if (!err) {
		m->flushing = true;
		p->holders++; // the pager keeps running, whoever closes the memory meanwhile
		atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
	}
	pthread_mutex_unlock(&p->lock);
	return err;
}

static void let_go(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	pthread_mutex_lock(&p->lock);
	m->flushing = m->flush_waits = false;
	uf_pager_release_holder(p);
	pthread_cond_broadcast(&p->changed);
	pthread_mutex_unlock(&p->lock);
	uf_memory_put(m);
}

int uf_memory_flush(struct uf_memory *m, uint64_t first, uint64_t count, struct uf_failure *failures, uint32_t most,
		    uint32_t *n)
{
	struct uf_flush f = {.failures = failures, .most = most};
	*n = 0;
	if (!m->store || first >= m->nblocks)
		return 0;
	if (m->forked)
		return -EPERM;
	int err = hold(m);
	if (err)
		return err;
	// Relaxed in effect: a failure that is counted meanwhile is this flush's, or fails it needlessly.
	pthread_mutex_lock(&m->pager->lock);
	uint64_t failures_before = m->scratch_failures;
	pthread_mutex_unlock(&m->pager->lock);
	if (m->unsynced)
		err = uf_resync(m, &f);
	if (!err)
		uf_flush_blocks(m, first, uf_min(count, m->nblocks - first), &f);
	if (!err && !f.n)
		err = make_durable(m, &f, failures_before);
	if (closed(m))
		err = -EBADF;
	let_go(m);
	*n = f.n;
	return err == -EBADF ? err : f.n ? -EIO : err;
}

bool uf_memory_forked(const struct uf_memory *m)
{
	return m->forked;
}

bool uf_write_back(struct uf_memory *m, uint64_t first, uint64_t count)
{
	struct uf_flush f = {0};
	if (m->store && !hold(m)) {
		uf_flush_blocks(m, first, count, &f);
		let_go(m);
	}
	return !f.n;
}

uint64_t uf_memory_evict(struct uf_memory *m, uint64_t first, uint64_t count)
{
	if (first >= m->nblocks)
		return 0;
	count = uf_min(count, m->nblocks - first);
	uf_write_back(m, first, count);
	return uf_evict_blocks(m, first, count, false);
}
