// SPDX-License-Identifier: Apache-2.0
// Written, but not yet on the disk. Once fdatasync has failed, the kernel takes the pages that it could not write for clean, and
// the next fdatasync succeeds without them. So we remember what was written since the last one that succeeded, and write it
// again: from memory what is still there (it is dirty again), the rest as the kernel's page cache has it, from the file itself.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

static bool closed(const struct uf_memory *m)
{
	return atomic_load_explicit(&m->closed, memory_order_relaxed);
}

static bool has(const uint64_t *bits, uint64_t block)
{
	return bits[block / 64] >> block % 64 & 1;
}

void uf_unsynced_add(struct uf_memory *m, uint64_t first, uint64_t count)
{
	for (uint64_t b = first; m->unsynced && b < first + count; b++)
		m->unsynced[b / 64] |= 1ULL << b % 64;
	m->unsynced_first = uf_min(m->unsynced_first, first / 64);
	m->unsynced_end = uf_max(m->unsynced_end, (first + count + 63) / 64);
}

// Of an absent block, which the caller has claimed. Without lock.
static int rewrite(struct uf_memory *m, uint64_t block, char *area)
{
	uint64_t at = m->offset + (block << m->shift), n = uf_run_bytes(m, block, 1);
	for (uint64_t done = 0, got = 0; done < n;) {
		ssize_t r = got < n ? pread(m->fd, area + got, n - got, (off_t)(at + got))
				    : pwrite(m->fd, area + done, n - done, (off_t)(at + done));
		if (r < 0 && errno != EINTR)
			return -errno;
		if (r == 0)
			return -EIO; // the file was cut
		if (r > 0)
			*(got < n ? &got : &done) += (uint64_t)r;
	}
	return 0;
}

// After a sync that failed: what was written before it is written anew, by this and by the flush that follows. Without lock.
int uf_resync(struct uf_memory *m, struct uf_flush *f)
{
	struct uf_pager *p = m->pager;
	char *area = NULL;
	int err = 0;
	pthread_mutex_lock(&p->lock);
	// What was in the kernel's hands when the sync failed is noted only when its slot ends.
	uint64_t seq = p->slot_seq;
	for (unsigned i = 0; m->resync && i < UF_SLOTS; i++) {
		const struct uf_slot *s = &p->slots[i];
		while (!closed(m) && s->memory == m && s->seq <= seq && !s->settled && s->state >= UF_SLOT_ACTIVE)
			uf_wait_changed(p, 10);
	}
	uint64_t end = m->resync ? uf_min(m->unsynced_end * 64, m->nblocks) : 0;
	for (uint64_t b = m->unsynced_first * 64; b < end && !err && !closed(m);) {
		if (!m->unsynced[b / 64]) {
			b = (b / 64 + 1) * 64;
			continue;
		}
		if (!has(m->unsynced, b)) {
			b++;
			continue;
		}
		uint32_t w = uf_word(m, b);
		struct uf_op *op = NULL;
		switch (UF_STATE(w)) {
		case UF_CLEAN:
			uf_dirty_set(m, b);
			uf_word_store(m, b, (w & ~(15u | UF_WORD_HUGE)) | UF_DIRTY); // still protected: the next write lifts that
			b++;
			break;
		case UF_ABSENT:
			if (!area && (area = mmap(NULL, UF_EXTENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) == MAP_FAILED) {
				area = NULL;
				err = -ENOMEM;
				break;
			}
			op = uf_op_begin(p, m, UF_LOADING);
			if (op) {
				op->part[0].first = b;
				op->part[0].count = 1;
			}
			if (!op || !uf_claim(m, b, 1, false)) {
				if (op)
					uf_op_end(op);
				uf_wait_changed(p, 1);
				break;
			}
			pthread_mutex_unlock(&p->lock);
			err = rewrite(m, b, area);
			pthread_mutex_lock(&p->lock);
			if (!closed(m))
				uf_unclaim(m, b, 1);
			pthread_mutex_unlock(&p->lock);
			uf_wake(m, b, 1);
			pthread_mutex_lock(&p->lock);
			uf_op_end(op);
			if (err)
				uf_flush_failed(f, b, err, strerrordesc_np(-err));
			b++;
			break;
		case UF_LOADING:
		case UF_EVICTING:
		case UF_UPGRADING:
			uf_wait_changed(p, 1);
			break;
		default: // dirty, or on its way to the file once more
			b++;
			break;
		}
	}
	if (!err && !closed(m))
		m->resync = false;
	pthread_mutex_unlock(&p->lock);
	if (area)
		munmap(area, UF_EXTENT);
	return err;
}

// Everything that was written to the file before is on the disk, or `why` says what happened. Without lock.
int uf_sync(struct uf_memory *m, struct uf_failure *why)
{
	struct uf_pager *p = m->pager;
	// What is written while the kernel syncs counts for the next one.
	size_t bytes = (m->nblocks + 63) / 64 * sizeof(*m->unsynced);
	uint64_t *fresh = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (fresh == MAP_FAILED)
		return why->err = -ENOMEM;
	pthread_mutex_lock(&p->lock);
	uint64_t *before = m->unsynced, first = m->unsynced_first, end = m->unsynced_end;
	m->unsynced = fresh;
	m->unsynced_first = UINT64_MAX;
	m->unsynced_end = 0;
	pthread_mutex_unlock(&p->lock);
	int err = fdatasync(m->fd) ? -errno : 0;
	if (err) {
		why->err = err;
		snprintf(why->message, sizeof(why->message), "fdatasync: %s", strerrordesc_np(-err));
		pthread_mutex_lock(&p->lock);
		for (uint64_t i = first; i < end; i++)
			m->unsynced[i] |= before[i];
		m->unsynced_first = uf_min(m->unsynced_first, first);
		m->unsynced_end = uf_max(m->unsynced_end, end);
		m->resync = true;
		pthread_mutex_unlock(&p->lock);
	}
	munmap(before, bytes);
	return err;
}
