// SPDX-License-Identifier: Apache-2.0
// Reads that go on outside the fault thread: in worker processes (through the ring) or in I/O threads. A job owns its
// LOADING blocks from post to end; job i uses ring entry i and slot i.
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

bool uf_job_available(const struct uf_pager *p, bool ahead)
{
	return p->jobs_used < UF_JOBS && (!ahead || p->jobs_ahead < UF_JOBS_AHEAD);
}

void uf_job_dispatch(struct uf_pager *p, struct uf_job *j)
{
	struct uf_memory *m = j->memory;
	j->posted_ns = uf_now_ns();
	j->late = false;
	j->state = UF_JOB_RING;
	if (!m) {
		uf_ring_post(p, j, j->asked, 0, 0);
	} else if (j->slot) {
		uint64_t n = uf_run_bytes(m, j->first, j->count);
		// A copy: ours stays right whatever a worker does to its own.
		memcpy(UF_RING_SLOT(p->ring, uf_job_index(p, j)), uf_slot_bytes(p, j->slot), n);
		uf_ring_post(p, j, UF_REQUEST_WRITE, j->first << m->shift, n);
	} else if (uf_kind_at(m, j->first) == UF_SOURCE_WORKER) {
		uf_ring_post(p, j, UF_REQUEST_READ, j->first << m->shift, uf_run_bytes(m, j->first, j->count));
	} else {
		j->state = UF_JOB_IO;
		pthread_cond_signal(&p->io_work);
	}
}

static struct uf_job *post(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, uint64_t fault_ns,
			   struct uf_ticket *ticket, struct uf_slot *slot)
{
	struct uf_pager *p = m->pager;
	bool ahead = kind != UF_TRACE_DEMAND;
	if (!uf_job_available(p, ahead))
		return NULL;
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		if (j->state != UF_JOB_FREE)
			continue;
		atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
		*j = (struct uf_job){
			.memory = m,
			.source = m->source_id,
			.first = first,
			.count = count,
			.kind = kind,
			.demanded = !ahead,
			.asked_for = first,
			.seq = ++p->job_seq,
			.fault_ns = fault_ns,
			.ticket = ticket,
			.slot = slot,
		};
		if (ticket)
			ticket->pending++;
		p->jobs_used++;
		p->jobs_ahead += ahead;
		p->write_jobs += slot != NULL;
		uf_job_dispatch(p, j);
		return j;
	}
	return NULL;
}

struct uf_job *uf_job_post(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, uint64_t fault_ns,
			   struct uf_ticket *ticket)
{
	return post(m, first, count, kind, fault_ns, ticket, NULL);
}

bool uf_job_post_write(struct uf_slot *s)
{
	return post(s->memory, s->first, s->count, UF_TRACE_WRITE, 0, NULL, s) != NULL;
}

void uf_job_free(struct uf_job *j)
{
	struct uf_memory *m = j->memory;
	struct uf_pager *p = m->pager;
	if (j->ticket)
		j->ticket->pending--;
	p->jobs_used--;
	p->jobs_ahead -= j->kind != UF_TRACE_DEMAND;
	p->write_jobs -= j->slot != NULL;
	j->slot = NULL;
	j->state = UF_JOB_FREE;
	j->memory = NULL;
	uf_job_freed(p);
	uf_memory_put_locked(m);
}

bool uf_is_fault_thread(const struct uf_pager *p)
{
	return p->phase != UF_IDLE && pthread_equal(pthread_self(), p->fault_thread);
}

// A fault or a background fill of any memory may have waited for it.
void uf_job_freed(struct uf_pager *p)
{
	uf_rescan(p);
	pthread_cond_broadcast(&p->changed);
	if (!uf_is_fault_thread(p))
		uf_fault_thread_kick(p);
}

static bool may_hold(struct uf_job *j)
{
	struct uf_memory *m = j->memory;
	if (!j->hold || j->demanded || j->ticket || m->access_watchers || m->pager->jobs_used > UF_JOBS / 2)
		return false;
	for (unsigned i = 0; i < UF_STREAMS; i++) {
		if (m->held[i] < 0) {
			m->held[i] = (int)uf_job_index(m->pager, j);
			j->state = UF_JOB_HELD;
			return true;
		}
	}
	return false;
}

static void unhold(struct uf_job *j)
{
	for (unsigned i = 0; i < UF_STREAMS; i++)
		if (j->memory->held[i] == (int)uf_job_index(j->memory->pager, j))
			j->memory->held[i] = -1;
	j->state = UF_JOB_RUNNING;
	j->hold = false;
}

void uf_job_read(struct uf_job *j, const void *bytes, struct uf_staging *st)
{
	struct uf_memory *m = j->memory;
	struct uf_pager *p = m->pager;
	uint64_t first = j->first, count = j->count, size = count << m->shift;

	pthread_mutex_lock(&p->lock);
	if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		uf_job_free(j);
		pthread_mutex_unlock(&p->lock);
		return;
	}
	if (may_hold(j)) {
		pthread_mutex_unlock(&p->lock);
		return;
	}
	j->state = UF_JOB_RUNNING;
	uint8_t kind = j->demanded ? UF_TRACE_DEMAND : j->kind;
	uf_seen_coming(m, first, count, j->kind == UF_TRACE_DEMAND);
	uf_reserve(m, first, count, kind);
	pthread_mutex_unlock(&p->lock);

	uint64_t t0 = uf_now_ns();
	bool huge, woken;
	int err = uf_install(m, first, count, bytes, st, &huge, &woken);
	uint64_t t1 = uf_now_ns();
	if (err) {
		char message[64];
		snprintf(message, sizeof(message), "UFFDIO_COPY: %s", strerrordesc_np(-err));
		pthread_mutex_lock(&p->lock);
		uf_unreserve(m, first, count, kind);
		pthread_mutex_unlock(&p->lock);
		uf_job_failed(j, err, message);
		return;
	}

	// Another reference: freeing the job may drop the last one, and the wake-up needs the descriptor.
	pthread_mutex_lock(&p->lock);
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
	if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		uf_unroom(m, size);
	} else {
		woken &= !uf_loaded(m, first, count, huge, kind, j->demanded ? j->asked_for : UF_NIL, j->fault_ns && j->fault_ns < t1 ? t1 - j->fault_ns : 0);
		uf_histogram_add(&m->stats.latency[UF_STAGE_INSTALL], t1 - t0);
		if (j->fault_ns && j->fault_ns < t1)
			uf_histogram_add(&m->stats.latency[UF_STAGE_FAULT], t1 - j->fault_ns);
	}
	uf_job_free(j);
	pthread_mutex_unlock(&p->lock);
	if (!woken || m->delivery == UF_DELIVERY_DIRECT)
		uf_wake(m, first, count);
	uf_memory_put(m);
}

void uf_job_failed(struct uf_job *j, int err, const char *message)
{
	struct uf_memory *m = j->memory;
	struct uf_pager *p = m->pager;
	uint64_t first = j->first, count = j->count;
	unsigned tries;

	pthread_mutex_lock(&p->lock);
	if (j->slot) {
		uf_write_answered(j, err, message);
		pthread_mutex_unlock(&p->lock);
		return;
	}
	if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		uf_job_free(j);
		pthread_mutex_unlock(&p->lock);
		return;
	}
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
	tries = ++j->tries;
	if (count > 1) {
		// Which block is bad? Give the run up: a fault asks for its block alone, a prefetch block by block. And no
		// readahead for the next faults, or the same run would fail again and again.
		m->quiet_until = m->stats.faults + 16;
		m->stats.retries++;
		if (j->ticket)
			j->ticket->split = true;
		uf_unclaim(m, first, count);
		if (!j->ticket && j->kind == UF_TRACE_PREFETCH) // nobody else asks again
			uf_background_add(m, (struct uf_background){first, count, 1, UF_NIL, UF_TRACE_PREFETCH, true});
		uf_job_free(j);
	} else if (tries < p->options.attempts && err != -ENODATA) {
		m->stats.retries++;
		j->state = UF_JOB_DELAYED;
		j->due_ns = uf_now_ns() + (p->options.backoff_ns << (tries - 1));
		uf_super_kick(p);
		count = 0; // still ours
	} else if (!j->demanded) {
		// Nobody waits in a fault: the block stays absent, and who asked is told.
		uf_record_error(m, first, 1, tries, -err, message, false);
		if (j->ticket && !j->ticket->failure.err) {
			j->ticket->failure.err = err;
			j->ticket->failure.block = first;
			snprintf(j->ticket->failure.message, sizeof(j->ticket->failure.message), "%s", message);
		}
		uf_unclaim(m, first, count);
		uf_job_free(j);
	} else {
		if (j->ticket && !j->ticket->failure.err) {
			j->ticket->failure.err = err;
			j->ticket->failure.block = first;
			snprintf(j->ticket->failure.message, sizeof(j->ticket->failure.message), "%s", message);
		}
		j->state = UF_JOB_RUNNING;
		pthread_mutex_unlock(&p->lock);
		uf_poison(m, first, tries, -err, message);
		pthread_mutex_lock(&p->lock);
		uf_job_free(j);
		count = 0; // uf_poison woke it
	}
	pthread_mutex_unlock(&p->lock);
	if (count)
		uf_wake(m, first, count);
	uf_memory_put(m);
}

struct uf_job *uf_job_demand(struct uf_memory *m, uint64_t block, uint64_t t_ns)
{
	struct uf_pager *p = m->pager;
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		if (j->state == UF_JOB_FREE || j->memory != m || j->slot || block < j->first || block >= j->first + j->count)
			continue;
		j->demanded = true;
		if (!j->fault_ns) {
			j->fault_ns = t_ns;
			j->asked_for = block;
		}
		if (j->state == UF_JOB_RING)
			// Relaxed: a hint to workers that look for work.
			atomic_store_explicit(&p->ring->entry[i].priority, 0, memory_order_relaxed);
		if (j->state != UF_JOB_HELD)
			return NULL;
		unhold(j);
		return j;
	}
	return NULL;
}

// Installs held reads of one memory, or one of any memory when jobs run short. True if there was one.
bool uf_job_release_held(struct uf_pager *p, struct uf_memory *m, struct uf_staging *st)
{
	bool any = false;
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		pthread_mutex_lock(&p->lock);
		bool mine = j->state == UF_JOB_HELD && (!m || j->memory == m);
		if (mine)
			unhold(j);
		pthread_mutex_unlock(&p->lock);
		if (!mine)
			continue;
		any = true;
		uf_job_read(j, UF_RING_SLOT(p->ring, i), st);
		if (!m)
			break;
	}
	return any;
}

// The memory closes: what nobody works on yet is taken back now, the rest is dropped when it ends.
void uf_job_cancel(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		if (j->memory != m)
			continue;
		if (j->ticket) { // a worker may hang with it: who waits need not
			j->ticket->pending--;
			j->ticket = NULL;
		}
		if (j->state == UF_JOB_RING) {
			struct uf_ring_entry *e = &p->ring->entry[i];
			uint64_t word = atomic_load_explicit(&e->word, memory_order_acquire);
			// Acquire-release: pairs with a worker's claim; one of the two wins.
			if (UF_CLAIM_STATE(word) == UF_ENTRY_QUEUED &&
			    atomic_compare_exchange_strong_explicit(
				    &e->word, &word, UF_CLAIM(UF_ENTRY_FREE, 0, UF_CLAIM_GENERATION(word)),
				    memory_order_acq_rel, memory_order_acquire)) {
				struct uf_slot *slot = j->slot;
				uf_job_free(j);
				if (slot)
					uf_slot_done(slot, -ECANCELED, "the memory was closed");
			}
		} else if (j->state == UF_JOB_IO || j->state == UF_JOB_DELAYED || j->state == UF_JOB_HELD) {
			if (j->state == UF_JOB_HELD)
				unhold(j);
			uf_job_free(j);
		}
	}
}

uint64_t uf_jobs_due(struct uf_pager *p, uint64_t now)
{
	uint64_t next = UINT64_MAX;
	for (unsigned i = 0; i < UF_JOBS; i++) {
		struct uf_job *j = &p->jobs[i];
		if (j->state != UF_JOB_DELAYED)
			continue;
		if (j->due_ns <= now)
			uf_job_dispatch(p, j);
		else
			next = uf_min(next, j->due_ns);
	}
	return next;
}

// A LOAD's answer. Lock held: uf_source_load takes RUNNING as "the reply is there".
static void load_answered(struct uf_pager *p, struct uf_job *j, struct uf_ring_entry *e, bool failed)
{
	if (j->abandoned) {
		p->jobs_used--;
		j->state = UF_JOB_FREE;
		uf_job_freed(p);
	} else {
		j->reply_length = uf_min(e->reply_length, UF_SLOT_SIZE); // written by the worker: not trusted
		j->result = failed;
		snprintf(j->message, sizeof(j->message), "%.*s", UF_MESSAGE_MAX - 1, e->message);
		j->state = UF_JOB_RUNNING; // uf_source_load copies the reply and frees it
	}
	pthread_cond_broadcast(&p->changed);
}

// Takes what workers have finished. Fault thread.
void uf_jobs_collect(struct uf_pager *p)
{
	pthread_mutex_lock(&p->lock);
	struct uf_ring *ring = p->ring; // goes only after this thread
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; ring && i < UF_JOBS; i++) {
		struct uf_ring_entry *e = &ring->entry[i];
		// Acquire: pairs with the worker's release after it filled the slot.
		uint64_t word = atomic_load_explicit(&e->word, memory_order_acquire);
		enum uf_entry_state state = UF_CLAIM_STATE(word);
		if (state != UF_ENTRY_DONE && state != UF_ENTRY_FAILED)
			continue;
		struct uf_job *j = &p->jobs[i];
		pthread_mutex_lock(&p->lock);
		bool mine = j->state == UF_JOB_RING;
		struct uf_memory *m = j->memory;
		p->workers[UF_CLAIM_WORKER(word) % UF_MAX_WORKERS].answered = true;
		if (mine) {
			uint64_t now = uf_now_ns(), taken = atomic_load_explicit(&e->taken_ns, memory_order_relaxed);
			if (m && !j->slot && taken >= j->posted_ns && taken <= now) {
				uf_histogram_add(&m->stats.latency[UF_STAGE_QUEUE], taken - j->posted_ns);
				uf_histogram_add(&m->stats.latency[UF_STAGE_SOURCE], now - taken);
			}
			if (m)
				j->state = UF_JOB_RUNNING;
			else
				load_answered(p, j, e, state == UF_ENTRY_FAILED);
		}
		atomic_store_explicit(&e->word, UF_CLAIM(UF_ENTRY_FREE, 0, UF_CLAIM_GENERATION(word)), memory_order_release);
		pthread_mutex_unlock(&p->lock);
		if (!mine || !m)
			continue;
		if (j->slot && state == UF_ENTRY_DONE) {
			pthread_mutex_lock(&p->lock);
			uf_write_answered(j, 0, "");
			pthread_mutex_unlock(&p->lock);
		} else if (state == UF_ENTRY_FAILED) {
			char message[UF_MESSAGE_MAX];
			snprintf(message, sizeof(message), "%.*s", UF_MESSAGE_MAX - 1, e->message);
			uf_job_failed(j, -EIO, message);
		} else {
			// The slot's tail beyond the end of the source may hold an older read.
			uint64_t want = uf_run_bytes(m, j->first, j->count), len = j->count << m->shift;
			if (want < len)
				memset(UF_RING_SLOT(p->ring, i) + want, 0, len - want);
			uf_job_read(j, UF_RING_SLOT(p->ring, i), &p->fault_staging);
		}
	}
}
