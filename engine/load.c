// SPDX-License-Identifier: Apache-2.0
// Blocks in and out of LOADING: claim, read, install, account, wake.
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

bool uf_state_cas(struct uf_memory *m, uint64_t block, uint32_t from, uint32_t to)
{
	// Acquire-release: pairs with uf_word_store of the owner before and of the next owner.
	return atomic_compare_exchange_strong_explicit(&m->state[block], &from, to, memory_order_acq_rel,
						       memory_order_acquire);
}

struct uf_op *uf_op_begin(struct uf_pager *p, struct uf_memory *m, enum uf_state owned)
{
	// The fault thread always finds one; others wait.
	for (unsigned i = uf_is_fault_thread(p) ? 0 : UF_OPS_FAULT; i < UF_OPS; i++) {
		struct uf_op *op = &p->ops[i];
		if (op->used)
			continue;
		op->used = true;
		op->restores = false;
		op->owned = owned;
		op->n = 0;
		if (m) {
			atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed); // under lock, as all gets
			op->part[0].memory = m;
			op->part[0].first = op->part[0].count = 0;
			op->n = 1;
		}
		return op;
	}
	return NULL;
}

void uf_op_end(struct uf_op *op)
{
	struct uf_pager *p = op->n ? op->part[0].memory->pager : NULL;
	for (unsigned i = 0; i < op->n; i++)
		uf_memory_put_locked(op->part[i].memory);
	op->used = false;
	if (p && !uf_is_fault_thread(p) && (p->pending_count || p->rescan)) { // it may have found no record free
		uf_rescan(p);
		uf_fault_thread_kick(p);
	}
}

// Takes as many blocks from `first` on as are absent (or, with `poisoned`, poisoned) without a gap.
// All of them are to be read in one place.
uint64_t uf_claim(struct uf_memory *m, uint64_t first, uint64_t count, bool poisoned)
{
	uint64_t n = 0;
	int kind = first < m->nblocks ? uf_kind_at(m, first) : 0;
	for (; n < count && first + n < m->nblocks; n++) {
		uint32_t w = uf_word(m, first + n);
		if (UF_STATE(w) != UF_ABSENT && !(poisoned && UF_STATE(w) == UF_POISONED))
			break;
		if (uf_kind_at(m, first + n) != kind)
			break;
		// The stamp stays in the word: uf_enqueue asks whether this block is a ghost.
		bool marked = UF_STATE(w) == UF_POISONED;
		if (!uf_state_cas(m, first + n, w, (w & ~15u) | UF_LOADING | (marked ? UF_WORD_MARKED : 0)))
			break;
		m->stats.poisoned -= marked;
	}
	return n;
}

// The next may come. Lock held.
static void refilled(struct uf_memory *m)
{
	m->refilling = UF_NIL;
	uf_rescan(m->pager);
	if (!uf_is_fault_thread(m->pager))
		uf_fault_thread_kick(m->pager);
}

void uf_unclaim(struct uf_memory *m, uint64_t first, uint64_t count)
{
	for (uint64_t b = first; b < first + count; b++) {
		uint32_t w = uf_word(m, b);
		if (b == m->refilling) { // the pages that are there are dirty as before
			refilled(m);
			uf_account(m, uf_block_size(m));
			uf_word_store(m, b, UF_DIRTY);
			uf_enqueue_main(m, b);
			continue;
		}
		if (m->dirty)
			uf_dirty_clear(m, b);
		// A poisoned block that could not be read again is what it was.
		m->stats.poisoned += (w & UF_WORD_MARKED) != 0;
		uf_word_store(m, b, w & UF_WORD_MARKED ? UF_POISONED : (w & ~(15u | UF_WORD_DROPPED)) | UF_ABSENT);
	}
}

void uf_wake(struct uf_memory *m, uint64_t first, uint64_t count)
{
	if (m->delivery == UF_DELIVERY_DIRECT) {
		uf_direct_wake(m, first, count);
		return;
	}
	uf_range_wake(m->uffd, uf_block_address(m, first), count << m->shift);
}

// Bytes of the source behind a run of blocks: the last block may be cut short by the end.
uint64_t uf_run_bytes(const struct uf_memory *m, uint64_t first, uint64_t count)
{
	return uf_min(count << m->shift, m->nbytes - (first << m->shift));
}

void uf_trace(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, uint64_t demanded, uint64_t took_ns)
{
	if (!m->trace)
		return;
	uint64_t now = uf_now_ns();
	for (uint64_t b = first; b < first + count; b++) {
		m->trace[m->trace_in++ & (m->trace_capacity - 1)] = (struct uf_trace_record){
			.t_ns = now,
			.block = (uint32_t)b,
			// What came with the block that was asked for was read ahead.
			.kind = kind == UF_TRACE_DEMAND && b != demanded ? UF_TRACE_READAHEAD : kind,
			.took_ns = b == demanded ? (uint32_t)uf_min(took_ns, UINT32_MAX) : 0,
		};
	}
}

static void count(struct uf_memory *m, uint64_t blocks, uint8_t kind, uint64_t bytes)
{
	m->stats.bytes_read += bytes;
	if (kind == UF_TRACE_DEMAND)
		m->stats.blocks_demand += blocks;
	else if (kind == UF_TRACE_READAHEAD)
		m->stats.blocks_readahead += blocks;
	else if (kind == UF_TRACE_REPLAY)
		m->stats.blocks_replay += blocks;
	else
		m->stats.blocks_prefetch += blocks;
}

// Makes room for a run that is about to be installed, and counts it: before its waiters are woken, so that a program that
// reads the counters finds its own reads in them. Lock held; may drop it.
void uf_reserve(struct uf_memory *m, uint64_t first, uint64_t blocks, uint8_t kind)
{
	uf_room(m, blocks << m->shift);
	m->installs_begun++;
	count(m, blocks, kind, uf_run_bytes(m, first, blocks));
}

// It was not installed after all. Lock held.
void uf_unreserve(struct uf_memory *m, uint64_t first, uint64_t blocks, uint8_t kind)
{
	uf_unroom(m, blocks << m->shift);
	m->installs_done++;
	count(m, -blocks, kind, -uf_run_bytes(m, first, blocks)); // modulo 2^64
}

// Gives installed blocks up to their pool. The room was reserved before. Lock held.
bool uf_loaded(struct uf_memory *m, uint64_t first, uint64_t count, bool huge, uint8_t kind, uint64_t demanded, uint64_t took_ns)
{
	bool dropped = false;
	if (huge)
		m->stats.bytes_extent += uf_run_bytes(m, first, count);
	uf_trace(m, first, count, kind, demanded, took_ns);
	m->installs_done++;
	uf_seen_done(m, first, count);
	for (uint64_t b = first; b < first + count; b++) {
		dropped |= (uf_word(m, b) & UF_WORD_DROPPED) != 0;
		uf_enqueue(m, b);
		uint32_t w = uf_word(m, b) & UF_WORD_MAIN;
		uf_word_store(m, b, w | (huge ? UF_WORD_HUGE : 0) | (uf_is_dirty(m, b) ? UF_DIRTY : UF_CLEAN));
		if (b == m->refilling)
			refilled(m);
		else if (uf_is_dirty(m, b))
			uf_trace(m, b, 1, UF_TRACE_DIRTY, UF_NIL, 0);
	}
	return dropped;
}

void uf_record_error(struct uf_memory *m, uint64_t block, uint64_t count, unsigned attempts, int err, const char *message,
		     bool poisoned)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	struct uf_error_record *e = &m->stats.errlog[m->errlog_next++ % UF_ERRORS_KEPT];
	*e = (struct uf_error_record){ // `write` is set by who writes
		.block = block,
		.offset = block << m->shift,
		.length = uf_run_bytes(m, block, count),
		.time_ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec,
		.attempts = attempts,
		.err = err,
		.poisoned = poisoned,
	};
	snprintf(e->message, sizeof(e->message), "%s", message);
	m->stats.errors++;
}

// The end for a LOADING block whose source is gone: say so, then make every access fail loudly. Without lock.
void uf_poison(struct uf_memory *m, uint64_t block, unsigned attempts, int err, const char *message)
{
	struct uf_pager *p = m->pager;
	uf_log("%s: block %llu (bytes %llu-%llu) cannot be read after %u attempts: %s. It is poisoned: reading it raises "
	       "%s.",
	       m->name, (unsigned long long)block, (unsigned long long)(block << m->shift),
	       (unsigned long long)((block << m->shift) + uf_run_bytes(m, block, 1)), attempts, message,
	       uf_host_probe()->poison ? "SIGBUS" : "SIGSEGV");
	char *at = uf_block_address(m, block);
	for (size_t off = 0; off < uf_block_size(m); off += p->page) {
		struct uffdio_poison z = {{(uintptr_t)at + off, p->page}, UFFDIO_POISON_MODE_DONTWAKE, 0};
		if (uf_host_probe()->poison) {
			unsigned stalls = 0;
			int r;
			while ((r = ioctl(m->uffd, UFFDIO_POISON, &z)) && errno == EAGAIN && ++stalls < 1000)
				sched_yield();
			if (!r || errno == EEXIST)
				continue;
		}
		// Before 6.6: SIGSEGV instead of SIGBUS, as loud.
		mprotect(at + off, p->page, PROT_NONE);
	}
	pthread_mutex_lock(&p->lock);
	if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		pthread_mutex_unlock(&p->lock);
		return;
	}
	m->stats.poisoned++;
	uf_trace(m, block, 1, UF_TRACE_POISON, UF_NIL, 0);
	uf_record_error(m, block, 1, attempts, err, message, true);
	if (block == m->refilling) { // what other code did not drop is there, and dirty as before
		uf_unclaim(m, block, 1);
	} else {
		if (m->dirty)
			uf_dirty_clear(m, block); // the write that it was loaded for dies, too
		uf_word_store(m, block, UF_POISONED);
	}
	pthread_cond_broadcast(&p->changed);
	pthread_mutex_unlock(&p->lock);
	uf_wake(m, block, 1);
}

static const char zeros[1 << 16];

// Reads a run in the calling thread. 0 and *bytes (the run padded to whole blocks), -EAGAIN where that would block.
static int read_inline(struct uf_memory *m, uint64_t first, uint64_t count, struct uf_staging *st, bool may_block, const void **bytes)
{
	char *area = st->area;
	uint64_t at = first << m->shift, want = uf_run_bytes(m, first, count), len = count << m->shift;
	switch (uf_kind_at(m, first)) {
	case UF_SOURCE_SCRATCH: {
		int err = uf_scratch_read(m, first, count, st->area, st->packed,
					  !may_block && !m->inline_scratch);
		*bytes = area;
		return err;
	}
	case UF_SOURCE_ZERO:
		if (len <= sizeof(zeros)) {
			*bytes = zeros;
		} else {
			memset(area, 0, len);
			*bytes = area;
		}
		return 0;
	case UF_SOURCE_MEMORY:
		if (want == len) {
			*bytes = m->address + at;
			return 0;
		}
		memcpy(area, m->address + at, want);
		break;
	case UF_SOURCE_FILE:
		for (uint64_t done = 0; done < want;) {
			struct iovec v = {area + done, want - done};
			bool nowait = !may_block && !m->inline_file;
			// preadv2(RWF_NOWAIT) (4.14): EAGAIN where it would read from the disk, and the read is started all the
			// same; short counts are normal; overlayfs does not know it.
			ssize_t n = preadv2(m->fd, &v, 1, (off_t)(m->offset + at + done), nowait ? RWF_NOWAIT : 0);
			if (n > 0) {
				done += (uint64_t)n;
			} else if (n == 0) {
				return -ENODATA; // the file was cut since it was opened
			} else if (errno == EOPNOTSUPP && nowait) {
				atomic_store_explicit(&m->no_nowait, true, memory_order_relaxed);
				return -EAGAIN;
			} else if (errno != EINTR) {
				return -errno;
			}
		}
		break;
	case UF_SOURCE_WORKER:
		return -EAGAIN;
	}
	if (want < len)
		memset(area + want, 0, len - want);
	*bytes = area;
	return 0;
}

// Loads up to an extent of LOADING blocks of a native source in the calling thread. `op`, if any, is the record that names
// them; it ends here unless the blocks stay the caller's. The caller has reserved (uf_reserve) and holds a reference. 0: the blocks are CLEAN. Negative: they are still LOADING, reservation and op still the caller's. -EAGAIN: would
// block. Without lock.
int uf_load_inline(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, struct uf_staging *st,
		   struct uf_op *op, uint64_t fault_ns, bool may_block, struct uf_failure *why)
{
	struct uf_pager *p = m->pager;
	if (!may_block && uf_waits_for_disk(m, first))
		return -EAGAIN;
	const void *bytes = NULL;
	uint64_t t0 = uf_now_ns();
	int err = read_inline(m, first, count, st, may_block, &bytes);
	if (err) {
		if (err != -EAGAIN && why) {
			why->block = first;
			why->err = err;
			snprintf(why->message, sizeof(why->message), "%s",
				 err == -ENODATA ? "the file ends before this block: it was cut after it was opened"
						 : strerrordesc_np(-err));
		}
		return err;
	}
	uint64_t t1 = uf_kind_at(m, first) == UF_SOURCE_MEMORY ? t0 : uf_now_ns();
	bool huge, woken;
	err = uf_install(m, first, count, bytes, st, &huge, &woken);
	uint64_t t2 = uf_now_ns();

	pthread_mutex_lock(&p->lock);
	if (!err && atomic_load_explicit(&m->closed, memory_order_relaxed))
		err = -ECANCELED; // it left its pool already
	if (err) {
		if (why) {
			why->block = first;
			why->err = err;
			snprintf(why->message, sizeof(why->message), "UFFDIO_COPY: %s", strerrordesc_np(-err));
		}
	} else {
		woken &= !uf_loaded(m, first, count, huge, kind, kind == UF_TRACE_DEMAND ? first : UF_NIL, fault_ns ? t2 - fault_ns : 0);
		uf_histogram_add(&m->stats.latency[UF_STAGE_SOURCE], t1 - t0);
		uf_histogram_add(&m->stats.latency[UF_STAGE_INSTALL], t2 - t1);
		if (fault_ns) {
			uf_histogram_add(&m->stats.latency[UF_STAGE_QUEUE], t0 - fault_ns);
			uf_histogram_add(&m->stats.latency[UF_STAGE_FAULT], t2 - fault_ns);
		}
		if (op)
			uf_op_end(op);
	}
	pthread_mutex_unlock(&p->lock);
	if (!err && (!woken || m->delivery == UF_DELIVERY_DIRECT))
		uf_wake(m, first, count);
	return err;
}
