// SPDX-License-Identifier: Apache-2.0
// Explicit prefetch. With `wait` the calling thread does the work of native sources itself and keeps the jobs of the
// others going, so that it costs no hand-over and a failure has somebody to go to.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

static bool closed(struct uf_memory *m)
{
	return atomic_load_explicit(&m->closed, memory_order_relaxed);
}

// One pass over the range: loads what is absent, run by run. Lock held; drops it while it works.
static int pass(struct uf_memory *m, uint64_t first, uint64_t end, bool single, struct uf_staging *st,
		struct uf_ticket *ticket, bool *busy)
{
	struct uf_pager *p = m->pager;
	uint64_t per = UF_EXTENT >> m->shift;
	for (uint64_t at = first; at < end && !closed(m) && !ticket->failure.err && !ticket->split;) {
		enum uf_state s = UF_STATE(uf_word(m, at));
		if (s == UF_WRITING) { // on its way out: back with it
			pthread_mutex_unlock(&p->lock);
			uf_restore(m, at, false);
			pthread_mutex_lock(&p->lock);
			continue;
		}
		if (s != UF_ABSENT && s != UF_POISONED) {
			*busy |= s == UF_LOADING || s == UF_EVICTING;
			at++;
			continue;
		}
		uint64_t run = single ? 1 : uf_min(end - at, per - at % per);
		// What is being written makes room. In a small budget there may never be enough for a whole run.
		if (!uf_room_now(m, run << m->shift, true) && (run == 1 || !uf_room_now(m, (run = 1) << m->shift, true))) {
			uf_wait_changed(p, 20);
			continue;
		}
		if (closed(m) || UF_STATE(uf_word(m, at)) != s)
			continue; // the lock was dropped
		bool async = uf_kind_at(m, at) == UF_SOURCE_WORKER;
		if (async && !uf_job_available(p, true)) {
			uf_wait_changed(p, 100);
			continue;
		}
		struct uf_op *op = uf_op_begin(p, m, UF_LOADING);
		if (!op) {
			uf_wait_changed(p, 1);
			continue;
		}
		op->part[0].first = at;
		op->part[0].count = run;
		uint64_t n = uf_claim(m, at, run, true);
		op->part[0].count = n;
		for (uint64_t b = at; b < at + n && !uf_host_probe()->poison; b++)
			if (uf_word(m, b) & UF_WORD_MARKED) // see uf_poison
				mprotect(uf_block_address(m, b), uf_block_size(m), PROT_READ | (m->wp ? PROT_WRITE : 0));
		if (n && async) {
			if (!uf_job_post(m, at, n, UF_TRACE_PREFETCH, 0, ticket))
				uf_unclaim(m, at, n); // cannot be: looked above, under the same lock
		} else if (n) {
			uf_seen_coming(m, at, n, false);
			uf_reserve(m, at, n, UF_TRACE_PREFETCH);
			pthread_mutex_unlock(&p->lock);
			struct uf_failure why = {0};
			int err = uf_load_inline(m, at, n, UF_TRACE_PREFETCH, st, op, 0, true, &why);
			if (!err) {
				pthread_mutex_lock(&p->lock);
				at += n;
				continue;
			}
			if (err != -ECANCELED && n == 1 && !closed(m)) {
				why.err = err;
				pthread_mutex_lock(&p->lock);
				uf_record_error(m, at, 1, 1, -err, why.message, false);
				pthread_mutex_unlock(&p->lock);
			}
			pthread_mutex_lock(&p->lock);
			uf_unreserve(m, at, n, UF_TRACE_PREFETCH);
			if (!closed(m)) {
				uf_unclaim(m, at, n);
				if (n == 1)
					ticket->failure = why;
				else
					ticket->split = true;
				pthread_mutex_unlock(&p->lock);
				uf_wake(m, at, n); // somebody may have been dropped
				pthread_mutex_lock(&p->lock);
			}
		}
		uf_op_end(op);
		at += n ? n : 1;
	}
	while (ticket->pending)
		uf_wait_changed(p, 1000);
	return closed(m) ? -EBADF : ticket->failure.err;
}

int uf_memory_prefetch(struct uf_memory *m, uint64_t first, uint64_t count, bool wait, struct uf_failure *why)
{
	struct uf_pager *p = m->pager;
	*why = (struct uf_failure){.block = first};
	if (first >= m->nblocks)
		return 0;
	uint64_t end = first + uf_min(count, m->nblocks - first);

	pthread_mutex_lock(&p->lock);
	if (closed(m)) {
		pthread_mutex_unlock(&p->lock);
		return -EBADF;
	}
	if (!wait) {
		uf_background_add(m, (struct uf_background){first, end - first, 1, UF_NIL, UF_TRACE_PREFETCH, false});
		uf_fault_thread_kick(p);
		pthread_mutex_unlock(&p->lock);
		return 0;
	}
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
	pthread_mutex_unlock(&p->lock);

	struct uf_staging st = {0};
	int err = 0;
	if (m->kind != UF_SOURCE_WORKER || m->store)
		err = uf_staging_init(&st);
	if (err) {
		why->err = err;
		snprintf(why->message, sizeof(why->message), "no memory to read into: %s", strerrordesc_np(-err));
	}
	pthread_mutex_lock(&p->lock);
	while (p->fillers >= UF_FILLERS && !closed(m))
		uf_wait_changed(p, 100);
	p->fillers++;
	pthread_mutex_unlock(&p->lock);
	bool single = false;
	while (!err) {
		struct uf_ticket ticket = {0};
		bool busy = false;
		if (m->kind == UF_SOURCE_WORKER) {
			// A held read of ours would never end by itself. It needs a staging area only for speed.
			struct uf_staging none = {0};
			uf_job_release_held(p, m, &none);
		}
		pthread_mutex_lock(&p->lock);
		err = pass(m, first, end, single, &st, &ticket, &busy);
		if (ticket.failure.err)
			*why = ticket.failure;
		if (!err && busy && !ticket.split)
			uf_wait_changed(p, 2); // others load some of it: inline loads do not signal, so look again soon
		pthread_mutex_unlock(&p->lock);
		if (!err && !busy && !ticket.split)
			break;
		single = ticket.split;
	}
	uf_staging_deinit(&st);
	pthread_mutex_lock(&p->lock);
	p->fillers--;
	pthread_cond_broadcast(&p->changed);
	pthread_mutex_unlock(&p->lock);
	uf_memory_put(m);
	return err;
}
