// SPDX-License-Identifier: Apache-2.0
// The worker's side of the ring. Runs in worker processes (and in the engine's tests), on any number of threads.
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

struct uf_ring_client {
	struct uf_ring *ring;
	int blob_fd, bell_fd;
	unsigned worker;
	pid_t owner;
	_Atomic uint32_t dropped_seen;
};

// Not by kill(owner, 0): a zombie can be signalled.
static bool orphaned(const struct uf_ring_client *c)
{
	return getpid() != c->owner && getppid() != c->owner;
}

int uf_client_attach(int ring_fd, int blob_fd, int bell_fd, unsigned worker, struct uf_ring_client **ret)
{
	struct stat st;
	if (worker >= UF_MAX_WORKERS || fstat(ring_fd, &st))
		return -EINVAL;
	if (st.st_size != (off_t)UF_RING_SIZE)
		return -EPROTO;
	struct uf_ring_client *c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->ring = mmap(NULL, UF_RING_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd, 0);
	if (c->ring == MAP_FAILED || c->ring->magic != UF_RING_MAGIC) {
		int err = c->ring == MAP_FAILED ? -errno : -EPROTO;
		if (c->ring != MAP_FAILED)
			munmap(c->ring, UF_RING_SIZE);
		free(c);
		return err;
	}
	c->blob_fd = blob_fd;
	c->bell_fd = bell_fd;
	c->worker = worker;
	c->owner = c->ring->owner_pid;
	// Our parent is the owner's supervisor thread, which ends last and after its workers. (In tests we are a thread.)
	if (getpid() != c->owner)
		prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	if (orphaned(c)) { // it died before that
		munmap(c->ring, UF_RING_SIZE);
		free(c);
		return -ESRCH;
	}
	atomic_store(&c->ring->ready[worker], (uint32_t)getpid());
	*ret = c;
	return 0;
}

void uf_client_detach(struct uf_ring_client *c)
{
	munmap(c->ring, UF_RING_SIZE);
	free(c);
}

// The most urgent request that this worker may take: least priority number, then oldest.
static bool claim(struct uf_ring_client *c, struct uf_request *ret)
{
	for (;;) {
		struct uf_ring_entry *best = NULL;
		uint64_t best_word = 0, best_seq = 0;
		uint32_t best_priority = 0;
		for (unsigned i = 0; i < UF_RING_ENTRIES; i++) {
			struct uf_ring_entry *e = &c->ring->entry[i];
			// Acquire: pairs with the owner's release after it filled the entry.
			uint64_t word = atomic_load_explicit(&e->word, memory_order_acquire);
			if (UF_CLAIM_STATE(word) != UF_ENTRY_QUEUED)
				continue;
			uint32_t target = __atomic_load_n(&e->target, __ATOMIC_RELAXED);
			uint64_t seq = __atomic_load_n(&e->seq, __ATOMIC_RELAXED);
			uint32_t priority = atomic_load_explicit(&e->priority, memory_order_relaxed);
			if (target != UF_ANY_WORKER && target != c->worker)
				continue;
			if (!best || priority < best_priority || (priority == best_priority && seq < best_seq)) {
				best = e;
				best_word = word;
				best_seq = seq;
				best_priority = priority;
			}
		}
		if (!best)
			return false;
		uint64_t mine = UF_CLAIM(UF_ENTRY_TAKEN, c->worker, UF_CLAIM_GENERATION(best_word));
		if (!atomic_compare_exchange_strong_explicit(&best->word, &best_word, mine, memory_order_acq_rel,
							     memory_order_relaxed))
			continue; // another thread was faster, or it was taken back
		unsigned index = (unsigned)(best - c->ring->entry);
		atomic_store_explicit(&best->taken_ns, uf_now_ns(), memory_order_relaxed);
		*ret = (struct uf_request){
			.kind = best->kind,
			.index = index,
			.source_id = best->source_id,
			.generation = uf_client_generation(c, best->source_id),
			.offset = best->offset,
			.length = uf_min(best->length, UF_SLOT_SIZE),
			.buffer = UF_RING_SLOT(c->ring, index),
			.capacity = UF_SLOT_SIZE,
			.word = mine,
		};
		return true;
	}
}

void uf_client_take(struct uf_ring_client *c, struct uf_request *ret)
{
	for (;;) {
		uint32_t posted = atomic_load(&c->ring->posted);
		*ret = (struct uf_request){.kind = UF_REQUEST_STOP};
		// The owner may die without a word. (Its death signal is tied to the thread that spawned us.)
		if (atomic_load(&c->ring->stop) || orphaned(c))
			return;
		uint32_t dropped = atomic_load(&c->ring->dropped), seen = atomic_load(&c->dropped_seen);
		if (dropped != seen && atomic_compare_exchange_strong(&c->dropped_seen, &seen, dropped)) {
			ret->kind = UF_REQUEST_DROP;
			return;
		}
		if (claim(c, ret))
			return;
		// Sequentially consistent, as the owner's post: see uf_ring_post.
		atomic_fetch_add(&c->ring->sleepers, 1);
		uf_futex_wait(&c->ring->posted, posted, 1000000000u);
		atomic_fetch_sub(&c->ring->sleepers, 1);
	}
}

int64_t uf_client_blob(struct uf_ring_client *c, uint32_t id, void *ret, size_t len)
{
	if (id >= UF_RING_SOURCES || !atomic_load_explicit(&c->ring->sources[id].live, memory_order_acquire))
		return -ENOENT;
	struct uf_ring_source *s = &c->ring->sources[id];
	uint64_t length = s->blob_length;
	for (size_t done = 0; ret && done < uf_min(len, length);) {
		ssize_t n = pread(c->blob_fd, (char *)ret + done, uf_min(len, length) - done, (off_t)(s->blob_offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EIO;
		done += (size_t)n;
	}
	return (int64_t)length;
}

uint64_t uf_client_cache(struct uf_ring_client *c, uint32_t id)
{
	return id < UF_RING_SOURCES ? atomic_load_explicit(&c->ring->sources[id].cache, memory_order_relaxed) : 0;
}

uint32_t uf_client_generation(struct uf_ring_client *c, uint32_t id)
{
	return id < UF_RING_SOURCES ? atomic_load_explicit(&c->ring->sources[id].live, memory_order_acquire) : 0;
}

static bool answer(struct uf_ring_client *c, const struct uf_request *r, enum uf_entry_state state, const char *message,
		   uint64_t reply_length)
{
	struct uf_ring_entry *e = &c->ring->entry[r->index];
	// Taken back: the slot may be somebody else's now.
	if (atomic_load_explicit(&e->word, memory_order_acquire) != r->word)
		return false;
	e->reply_length = reply_length;
	snprintf(e->message, sizeof(e->message), "%s", message);
	uint64_t word = r->word;
	// Release: pairs with the owner's look, which must see the slot filled.
	if (!atomic_compare_exchange_strong_explicit(&e->word, &word,
						     UF_CLAIM(state, c->worker, UF_CLAIM_GENERATION(r->word)),
						     memory_order_acq_rel, memory_order_relaxed))
		return false;
	uf_bell_ring(c->bell_fd);
	return true;
}

bool uf_client_done(struct uf_ring_client *c, const struct uf_request *r, uint64_t len)
{
	return answer(c, r, UF_ENTRY_DONE, "", len);
}

bool uf_client_fail(struct uf_ring_client *c, const struct uf_request *r, const char *message, uint64_t reply_len)
{
	return answer(c, r, UF_ENTRY_FAILED, message, reply_len);
}
