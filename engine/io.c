// SPDX-License-Identifier: Apache-2.0
// The I/O threads: what may wait for a disk. Reads first, somebody may wait for them; then write-backs.
#include "internal.h"

void *uf_io_thread(void *arg)
{
	struct uf_pager *p = arg;
	uf_thread_name("uf-io");
	struct uf_staging st = {0};
	bool staged = !uf_staging_init(&st);
	pthread_mutex_lock(&p->lock);
	while (!p->stop_io) {
		struct uf_job *best = NULL;
		for (unsigned i = 0; i < UF_JOBS; i++) {
			struct uf_job *j = &p->jobs[i];
			if (j->state == UF_JOB_IO &&
			    (!best || j->demanded > best->demanded || (j->demanded == best->demanded && j->seq < best->seq)))
				best = j;
		}
		// But one thread writes in any case: else a program that reads more than we can never flushes.
		bool writes = !best || !best->demanded || (p->io_started > 1 && !p->writing);
		struct uf_slot *slot = writes ? uf_write_next(p) : NULL;
		if (slot) {
			p->writing++;
			pthread_mutex_unlock(&p->lock);
			uf_write_native(slot, &st);
			pthread_mutex_lock(&p->lock);
			p->writing--;
			continue;
		}
		if (!best) {
			// One at a time, and not by the last thread: the page that it needs may have to be read here.
			if (p->repairs_count && !p->repairing && p->io_started > 1)
				uf_repair_one(p);
			else
				pthread_cond_wait(&p->io_work, &p->lock);
			continue;
		}
		struct uf_memory *m = best->memory;
		best->state = UF_JOB_RUNNING;
		uint64_t first = best->first, count = best->count, fault_ns = best->fault_ns;
		uint8_t kind = best->demanded ? UF_TRACE_DEMAND : best->kind;
		if (staged)
			uf_reserve(m, first, count, kind);
		pthread_mutex_unlock(&p->lock);

		struct uf_failure why = {.err = -ENOMEM, .message = "no memory for a staging area"};
		int err = staged ? uf_load_inline(m, first, count, kind, &st, NULL, fault_ns, true, &why) : -ENOMEM;
		if (err) {
			pthread_mutex_lock(&p->lock);
			if (staged)
				uf_unreserve(m, first, count, kind);
			pthread_mutex_unlock(&p->lock);
			uf_job_failed(best, err, why.message);
			pthread_mutex_lock(&p->lock);
		} else {
			pthread_mutex_lock(&p->lock);
			uf_job_free(best);
		}
	}
	pthread_mutex_unlock(&p->lock);
	uf_staging_deinit(&st);
	return NULL;
}
