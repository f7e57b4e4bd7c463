// SPDX-License-Identifier: Apache-2.0
// The owner's side of the ring, and the sources that workers load. Everything here but uf_source_load is short.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

int uf_ring_create(struct uf_pager *p)
{
	if (p->ring)
		return 0;
	p->ring_fd = uf_high_fd(memfd_create("userfault-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
	p->blob_fd = uf_high_fd(memfd_create("userfault-sources", MFD_CLOEXEC | MFD_ALLOW_SEALING));
	p->blob_end = 0;
	void *map = MAP_FAILED;
	// Sealed: a worker that shrank the file would make the engine die of SIGBUS.
	if (p->ring_fd >= 0 && p->blob_fd >= 0 && !ftruncate(p->ring_fd, UF_RING_SIZE) &&
	    !fcntl(p->ring_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		map = mmap(NULL, UF_RING_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, p->ring_fd, 0);
	if (map == MAP_FAILED) {
		int err = -errno;
		uf_ring_destroy(p);
		return err;
	}
	p->ring = map;
	p->ring->magic = UF_RING_MAGIC;
	p->ring->entries = UF_RING_ENTRIES;
	p->ring->slot_size = UF_SLOT_SIZE;
	p->ring->sources_count = UF_RING_SOURCES;
	p->ring->owner_pid = getpid();
	for (uint32_t id = 0; id < UF_RING_SOURCES; id++)
		if (p->sources[id].used) {
			int err = uf_ring_publish(p, id);
			if (err) {
				uf_ring_destroy(p);
				return err;
			}
		}
	return 0;
}

void uf_ring_destroy(struct uf_pager *p)
{
	if (p->ring)
		munmap(p->ring, UF_RING_SIZE);
	p->ring = NULL;
	if (p->ring_fd >= 0)
		close(p->ring_fd);
	if (p->blob_fd >= 0)
		close(p->blob_fd);
	p->ring_fd = p->blob_fd = -1;
}

// Writes a source's blob where workers find it.
int uf_ring_publish(struct uf_pager *p, uint32_t id)
{
	struct uf_source_entry *s = &p->sources[id];
	struct uf_ring_source *r = &p->ring->sources[id];
	for (size_t done = 0; done < s->length;) {
		ssize_t n = pwrite(p->blob_fd, (char *)s->blob + done, s->length - done, (off_t)(p->blob_end + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -ENOSPC;
		done += (size_t)n;
	}
	r->blob_offset = p->blob_end;
	r->blob_length = s->length;
	p->blob_end += s->length;
	atomic_store_explicit(&r->cache, s->cache, memory_order_relaxed);
	atomic_store_explicit(&r->live, s->generation, memory_order_release); // pairs with the worker's look
	return 0;
}

void uf_ring_post(struct uf_pager *p, struct uf_job *j, enum uf_request_kind kind, uint64_t offset, uint64_t length)
{
	struct uf_ring_entry *e = &p->ring->entry[uf_job_index(p, j)];
	struct uf_source_entry *s = &p->sources[j->source];
	unsigned target = s->affinity || s->exclusive || kind != UF_REQUEST_READ ? s->target : UF_ANY_WORKER;
	if (kind == UF_REQUEST_READ && s->affinity && !s->exclusive && p->workers[s->target].pid && p->workers[s->target].killed_ns)
		target = UF_ANY_WORKER; // it was killed and may take its time to die
	j->target = target;
	e->kind = kind;
	e->source_id = j->source;
	e->offset = offset;
	e->length = length;
	e->target = target;
	e->seq = j->seq;
	e->reply_length = 0;
	e->message[0] = 0;
	atomic_store_explicit(&e->taken_ns, 0, memory_order_relaxed);
	// Somebody waits for a flush, and perhaps for the room that a write-back makes.
	bool urgent = j->demanded || !j->memory || (j->slot && (j->slot->flush || p->pending_count));
	uint32_t priority = urgent ? 0 : j->ticket || j->slot ? 1 : 2;
	atomic_store_explicit(&e->priority, priority, memory_order_relaxed);
	uint32_t generation = UF_CLAIM_GENERATION(atomic_load_explicit(&e->word, memory_order_relaxed)) + 1;
	// Release: pairs with the worker's claim, which must see the fields above.
	atomic_store_explicit(&e->word, UF_CLAIM(UF_ENTRY_QUEUED, 0, generation), memory_order_release);
	p->requests++;
	// Sequentially consistent, as the worker's: either it sees the new number and does not sleep, or we see it sleep.
	atomic_fetch_add(&p->ring->posted, 1);
	if (atomic_load(&p->ring->sleepers))
		// A request for one worker wakes all: the futex does not know which of them it is.
		uf_futex_wake(&p->ring->posted, target == UF_ANY_WORKER ? 1 : INT32_MAX);
	bool kick = p->jobs_used == 1; // the supervisor may sleep without a time-out, and the read has a deadline
	for (unsigned i = 0; i < p->options.workers; i++) {
		if ((target == UF_ANY_WORKER || target == i) && !p->workers[i].wanted) {
			p->workers[i].wanted = true;
			kick = true;
		}
	}
	if (kick)
		uf_super_kick(p);
}

// The worker that a new source goes to: of those that are up, the one with the fewest. Another one is started beside it while
// there are more sources than workers, for those that come later: a start takes longer than most reads. Lock held.
static unsigned choose_target(struct uf_pager *p)
{
	unsigned load[UF_MAX_WORKERS] = {0}, sources = 0, wanted = 0, best = 0;
	bool found = false;
	for (uint32_t id = 0; id < UF_RING_SOURCES; id++) {
		if (p->sources[id].used) {
			load[p->sources[id].target]++;
			sources++;
		}
	}
	for (unsigned i = 0; i < p->options.workers; i++) {
		struct uf_worker *w = &p->workers[i];
		wanted += w->wanted;
		if (w->pid && atomic_load(&p->ring->ready[i]) == (uint32_t)w->pid && (!found || load[i] < load[best])) {
			best = i;
			found = true;
		}
	}
	for (unsigned i = 0; i < p->options.workers && sources >= wanted; i++) {
		if (!p->workers[i].wanted) {
			p->workers[i].wanted = true;
			uf_super_kick(p);
			break;
		}
	}
	return best;
}

int uf_source_add(struct uf_pager *p, const void *blob, size_t len, uint32_t *ret)
{
	if (!p->options.workers)
		return -EINVAL;
	void *copy = malloc(len ? len : 1);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, blob, len);
	pthread_mutex_lock(&p->lock);
	uint32_t id = 0;
	while (id < UF_RING_SOURCES && p->sources[id].used)
		id++;
	int err = id == UF_RING_SOURCES ? -EMFILE : uf_pager_start(p);
	if (!err)
		err = uf_ring_create(p);
	if (!err) {
		unsigned target = choose_target(p);
		struct uf_source_entry *s = &p->sources[id];
		*s = (struct uf_source_entry){.used = true, .blob = copy, .length = len, .generation = ++p->source_generation};
		s->target = target;
		err = uf_ring_publish(p, id);
		if (err) {
			s->used = false;
		} else {
			p->holders++;
			if (!p->workers[s->target].wanted) {
				p->workers[s->target].wanted = true;
				uf_super_kick(p);
			}
			*ret = id;
		}
	}
	if (err && !p->holders) {
		p->idle_since_ns = uf_now_ns();
		uf_super_kick(p);
	}
	pthread_mutex_unlock(&p->lock);
	if (err)
		free(copy);
	return err;
}

int uf_source_configure(struct uf_pager *p, uint32_t id, bool affinity, uint64_t cache)
{
	pthread_mutex_lock(&p->lock);
	bool good = id < UF_RING_SOURCES && p->sources[id].used && p->ring;
	if (good) {
		p->sources[id].affinity = affinity;
		p->sources[id].cache = cache;
		atomic_store_explicit(&p->ring->sources[id].cache, cache, memory_order_relaxed);
	}
	pthread_mutex_unlock(&p->lock);
	return good ? 0 : -EINVAL;
}

int uf_source_drop(struct uf_pager *p, uint32_t id)
{
	pthread_mutex_lock(&p->lock);
	int err = id >= UF_RING_SOURCES || !p->sources[id].used ? -EINVAL : p->sources[id].memories ? -EBUSY : 0;
	if (!err) {
		struct uf_source_entry *s = &p->sources[id];
		free(s->blob);
		if (p->ring) {
			struct uf_ring_source *r = &p->ring->sources[id];
			atomic_store_explicit(&r->live, 0, memory_order_release);
			fallocate(p->blob_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)r->blob_offset,
				  (off_t)r->blob_length);
			atomic_fetch_add(&p->ring->dropped, 1);
			atomic_fetch_add(&p->ring->posted, 1);
			uf_futex_wake(&p->ring->posted, INT32_MAX);
		}
		*s = (struct uf_source_entry){0};
		uf_pager_release_holder(p);
	}
	pthread_mutex_unlock(&p->lock);
	return err;
}

// Has the source's worker do something that is no read or write of a block, and waits for its answer.
static int ask(struct uf_pager *p, uint32_t id, enum uf_request_kind kind, uint64_t timeout_ns, void **reply, size_t *len,
	       bool *failed, struct uf_failure *why)
{
	uint64_t deadline = uf_now_ns() + uf_min(timeout_ns, UF_LONGEST_NS);
	why->err = 0;
	why->message[0] = 0;
	*reply = NULL;
	pthread_mutex_lock(&p->lock);
	struct uf_job *j = NULL;
	int err = id < UF_RING_SOURCES && p->sources[id].used && p->ring ? 0 : -EINVAL;
	while (!err && !j) {
		for (unsigned i = 0; i < UF_JOBS && p->jobs_used < UF_JOBS && !j; i++)
			if (p->jobs[i].state == UF_JOB_FREE)
				j = &p->jobs[i];
		if (!j)
			pthread_cond_wait(&p->changed, &p->lock);
	}
	if (err)
		goto out;
	*j = (struct uf_job){
		.state = UF_JOB_RING,
		.kind = UF_TRACE_DEMAND,
		.source = id,
		.asked = kind,
		.seq = ++p->job_seq,
		.posted_ns = uf_now_ns(),
	};
	p->jobs_used++;
	struct uf_failure *broken = &p->workers[p->sources[id].target].failure;
	broken->err = 0; // what failed before may be mended
	uf_ring_post(p, j, kind, 0, 0);
	while (j->state != UF_JOB_RUNNING) {
		if (broken->err) {
			*why = *broken;
			err = why->err;
		} else if (uf_now_ns() >= deadline) {
			snprintf(why->message, sizeof(why->message), "no worker answered within %.0f s",
				 (double)timeout_ns / 1e9);
			err = why->err = -ETIMEDOUT;
		}
		if (err) {
			// The entry is taken back if nobody has it; else its answer frees the job.
			struct uf_ring_entry *e = &p->ring->entry[uf_job_index(p, j)];
			uint64_t word = atomic_load_explicit(&e->word, memory_order_acquire);
			if (UF_CLAIM_STATE(word) == UF_ENTRY_QUEUED &&
			    atomic_compare_exchange_strong(&e->word, &word,
							   UF_CLAIM(UF_ENTRY_FREE, 0, UF_CLAIM_GENERATION(word)))) {
				j->state = UF_JOB_FREE;
				p->jobs_used--;
				uf_job_freed(p);
			} else {
				j->abandoned = true;
				uf_super_kick(p); // the worker that hangs in it serves others, too
			}
			goto out;
		}
		struct timespec t;
		clock_gettime(CLOCK_MONOTONIC, &t);
		t.tv_sec += 1;
		pthread_cond_timedwait(&p->changed, &p->lock, &t);
	}
	if (j->result < 0) {
		err = why->err = j->result;
		memcpy(why->message, j->message, sizeof(why->message));
	} else {
		*failed = j->result == 1;
		*len = j->reply_length;
		memcpy(why->message, j->message, sizeof(why->message));
		*reply = malloc(j->reply_length ? j->reply_length : 1);
		if (*reply)
			memcpy(*reply, UF_RING_SLOT(p->ring, uf_job_index(p, j)), j->reply_length);
		else
			err = why->err = -ENOMEM;
	}
	j->state = UF_JOB_FREE;
	p->jobs_used--;
	uf_job_freed(p);
out:
	pthread_mutex_unlock(&p->lock);
	return err;
}

int uf_source_load(struct uf_pager *p, uint32_t id, uint64_t timeout_ns, void **reply, size_t *len, bool *failed,
		   struct uf_failure *why)
{
	return ask(p, id, UF_REQUEST_LOAD, timeout_ns, reply, len, failed, why);
}

int uf_source_flush(struct uf_pager *p, uint32_t id, struct uf_failure *why)
{
	void *reply = NULL;
	size_t len;
	bool failed = false;
	// A commit of all that was written may take longer than a read.
	int err = ask(p, id, UF_REQUEST_FLUSH, 10 * p->options.deadline_ns, &reply, &len, &failed, why);
	free(reply);
	if (!err && failed)
		err = why->err = -EIO;
	return err;
}
