// SPDX-License-Identifier: Apache-2.0
// Budgets: what is resident, in which order it leaves, and how it is dropped.
//
// Replacement is 2Q on fault history, which costs no traps: a block that comes in for the first time goes to the
// probation queue; one that was evicted not long ago and is asked for again goes to the main queue. Both are first in,
// first out; probation gives way first while it holds more than a quarter. So a scan flows through probation and leaves
// the main queue alone. "Not long ago" needs no ghost list: an evicted block's state word keeps the eviction clock of
// that moment, and it is a ghost as long as no more than a budget's worth of blocks was evicted since.
#include <sys/mman.h>

#include "internal.h"

void uf_pool_init(struct uf_pool *pool, uint64_t limit)
{
	*pool = (struct uf_pool){
		.limit = limit,
		.probation = {UF_NIL, UF_NIL, 0},
		.main = {UF_NIL, UF_NIL, 0},
	};
}

static inline uint64_t ref_of(const struct uf_memory *m, uint64_t block)
{
	return (uint64_t)m->id << 32 | block;
}

static inline struct uf_link *link_of(struct uf_pager *p, uint64_t ref)
{
	return &p->memories[ref >> 32]->links[(uint32_t)ref];
}

static void push(struct uf_pager *p, struct uf_queue *q, uint64_t ref, uint64_t bytes)
{
	struct uf_link *l = link_of(p, ref);
	l->prev = UF_NIL;
	l->next = q->head;
	if (q->head != UF_NIL)
		link_of(p, q->head)->prev = ref;
	else
		q->tail = ref;
	q->head = ref;
	q->bytes += bytes;
}

static void unlink_ref(struct uf_pager *p, struct uf_queue *q, uint64_t ref, uint64_t bytes)
{
	struct uf_link *l = link_of(p, ref);
	if (l->prev != UF_NIL)
		link_of(p, l->prev)->next = l->next;
	else
		q->head = l->next;
	if (l->next != UF_NIL)
		link_of(p, l->next)->prev = l->prev;
	else
		q->tail = l->prev;
	q->bytes -= bytes;
}

uint64_t uf_pool_effective_limit(const struct uf_pager *p, const struct uf_pool *pool)
{
	uint64_t limit = pool->limit ? pool->limit : p->limit;
	return uf_max(limit > pool->reserved ? limit - pool->reserved : 0, pool->least);
}

static uint64_t pager_limit(const struct uf_pager *p)
{
	return uf_max(p->limit > p->reserved ? p->limit - p->reserved : 0, p->least);
}

// The block's state word still holds its stamp (see uf_claim).
void uf_enqueue(struct uf_memory *m, uint64_t block)
{
	struct uf_pool *pool = m->pool;
	uint32_t w = uf_word(m, block), stamp = w >> UF_STAMP_SHIFT;
	uint64_t window = uf_min(uf_pool_effective_limit(m->pager, pool) >> m->shift, 1u << 23);
	bool ghost = stamp && (((uint32_t)pool->stamp - stamp) & 0xffffff) <= window;
	uf_word_store(m, block, (w & 15u) | (ghost ? UF_WORD_MAIN : 0));
	push(m->pager, ghost ? &pool->main : &pool->probation, ref_of(m, block), uf_block_size(m));
}

void uf_dequeue(struct uf_memory *m, uint64_t block)
{
	struct uf_pool *pool = m->pool;
	unlink_ref(m->pager, uf_word(m, block) & UF_WORD_MAIN ? &pool->main : &pool->probation, ref_of(m, block),
		   uf_block_size(m));
}

void uf_unroom(struct uf_memory *m, uint64_t bytes)
{
	m->pool->resident -= bytes;
	m->stats.resident -= bytes;
	m->pager->resident -= bytes;
}

// An eviction under way: blocks in EVICTING, grouped by memory, named in op records.
struct batch {
	struct uf_op *op;
	unsigned n;
	uint64_t bytes;
};

static bool take(struct batch *b, struct uf_memory *m, uint64_t first, uint64_t count)
{
	struct uf_op *op = b->op;
	if (op->n && op->part[op->n - 1].memory == m && op->part[op->n - 1].first + op->part[op->n - 1].count == first) {
		op->part[op->n - 1].count += count;
	} else {
		if (op->n == UF_BATCH)
			return false;
		atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
		op->part[op->n].memory = m;
		op->part[op->n].first = first;
		op->part[op->n++].count = count;
	}
	for (uint64_t i = first; i < first + count; i++) {
		uint32_t w = uf_word(m, i);
		uf_dequeue(m, i);
		uf_word_store(m, i, (w & ~15u) | UF_EVICTING);
	}
	b->bytes += count << m->shift;
	b->n++;
	return true;
}

// What leaves together with `block`: the extent that it came with, since part of a huge page frees nothing.
static void unit_of(struct uf_memory *m, uint64_t block, uint64_t *first, uint64_t *count)
{
	*first = block;
	*count = 1;
	if (!(uf_word(m, block) & UF_WORD_HUGE))
		return;
	uint64_t per = UF_EXTENT >> m->shift, start = block / per * per;
	uint64_t end = uf_min(start + per, m->nblocks);
	while (*first > start && (uf_word(m, *first - 1) & (UF_WORD_HUGE | 15u)) == (UF_WORD_HUGE | UF_CLEAN))
		--*first;
	uint64_t last = block + 1;
	while (last < end && (uf_word(m, last) & (UF_WORD_HUGE | 15u)) == (UF_WORD_HUGE | UF_CLEAN))
		last++;
	*count = last - *first;
}

// Drops the batch's pages and finishes its blocks. Called with lock, drops it, returns with it.
static void finish(struct uf_pager *p, struct batch *b)
{
	struct uf_op *op = b->op;
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < op->n;) {
		struct uf_memory *m = op->part[i].memory;
		struct uf_range ranges[UF_BATCH];
		unsigned n = 0;
		for (; i < op->n && op->part[i].memory == m; i++)
			ranges[n++] = (struct uf_range){op->part[i].first, op->part[i].count};
		if (!atomic_load_explicit(&m->closed, memory_order_acquire))
			uf_forget_pages(m, ranges, n);
	}
	pthread_mutex_lock(&p->lock);
	for (unsigned i = 0; i < op->n; i++) {
		struct uf_memory *m = op->part[i].memory;
		uint64_t first = op->part[i].first, count = op->part[i].count;
		uf_trace(m, first, count, UF_TRACE_EVICT);
		for (uint64_t k = first; k < first + count; k++) {
			uint32_t stamp = (uint32_t)++m->pool->stamp & 0xffffff;
			uf_word_store(m, k, (stamp ? stamp : 1) << UF_STAMP_SHIFT | UF_ABSENT);
		}
		m->stats.evictions += count;
		uf_unroom(m, count << m->shift);
	}
	pthread_mutex_unlock(&p->lock);
	// The rule: new state first, then wake the whole block. A thread that met EVICTING was dropped and asks again.
	for (unsigned i = 0; i < op->n; i++)
		uf_wake(op->part[i].memory, op->part[i].first, op->part[i].count);
	pthread_mutex_lock(&p->lock);
	uf_op_end(op);
}

// Evicts from the tail of the pool's queues: at least `want` bytes, and a batch's worth, where it can. False if nothing
// could be taken (all that is resident is under way, or no op record is free).
static bool evict_batch(struct uf_pager *p, struct uf_pool *pool, uint64_t want)
{
	struct batch b = {.op = uf_op_begin(p, NULL, UF_EVICTING)};
	if (!b.op)
		return false;
	uint64_t quarter = uf_pool_effective_limit(p, pool) / 4;
	// One flush serves the whole batch (engine-notes §1), but a batch is no more than a sixteenth of the budget.
	uint64_t goal = uf_max(want, uf_min(1u << 20, quarter / 4));
	while (b.bytes < goal && b.n < UF_BATCH) {
		uint64_t ref = pool->probation.tail;
		if (ref == UF_NIL || (pool->main.tail != UF_NIL && pool->probation.bytes <= quarter))
			ref = pool->main.tail;
		if (ref == UF_NIL)
			break;
		struct uf_memory *m = p->memories[ref >> 32];
		uint64_t first, count;
		unit_of(m, (uint32_t)ref, &first, &count);
		if (!take(&b, m, first, count))
			break;
	}
	if (!b.n) {
		uf_op_end(b.op);
		return false;
	}
	finish(p, &b);
	return true;
}

// The pool that gives way when all pools together are over the pager's limit: the shared one, else the largest.
static struct uf_pool *fattest(struct uf_pager *p)
{
	struct uf_pool *best = &p->shared;
	if (best->probation.bytes + best->main.bytes)
		return best;
	for (uint32_t i = 0; i < p->memories_capacity; i++) {
		struct uf_memory *m = p->memories[i];
		if (m && m->pool == &m->own && m->own.probation.bytes + m->own.main.bytes > best->probation.bytes + best->main.bytes)
			best = &m->own;
	}
	return best;
}

// Reserves room for blocks that are about to be installed, evicting first. What is under way in other threads may be all
// that is resident: then the budget is passed by the blocks in flight, and by no more.
void uf_room(struct uf_memory *m, uint64_t bytes)
{
	struct uf_pager *p = m->pager;
	struct uf_pool *pool = m->pool;
	uint64_t limit = uf_pool_effective_limit(p, pool);
	for (;;) { // evicting drops the lock: both limits are looked at again
		uint64_t most = pager_limit(p);
		if (pool->resident + bytes > limit && evict_batch(p, pool, pool->resident + bytes - limit))
			continue;
		if (p->resident + bytes > most && evict_batch(p, fattest(p), p->resident + bytes - most))
			continue;
		break;
	}
	pool->resident += bytes;
	m->stats.resident += bytes;
	p->resident += bytes;
	pool->peak = uf_max(pool->peak, pool->resident);
	p->resident_peak = uf_max(p->resident_peak, p->resident);
	atomic_store_explicit(&pool->full, pool->resident > limit / 8 * 7 || p->resident > pager_limit(p) / 8 * 7,
			      memory_order_relaxed); // a hint for uf_install
	m->stats.resident_peak = uf_max(m->stats.resident_peak, m->stats.resident);
	// Less room left than the next batch: the fault thread makes some when it has nothing better to do.
	pool->low = pool->resident + uf_min(1u << 20, limit / 16) > limit;
	if (pool->low) {
		p->low = true;
		atomic_store_explicit(&p->attention, true, memory_order_relaxed);
	}
}

static bool evict_if_low(struct uf_pager *p, struct uf_pool *pool)
{
	if (!pool->low)
		return false;
	pool->low = false;
	uint64_t limit = uf_pool_effective_limit(p, pool);
	uint64_t room = uf_min(1u << 20, limit / 16);
	if (pool->resident + room <= limit)
		return false;
	return evict_batch(p, pool, pool->resident + room - limit);
}

// Makes room ahead of demand. Fault thread, without lock. True if it evicted.
bool uf_evict_low(struct uf_pager *p)
{
	pthread_mutex_lock(&p->lock);
	p->low = false;
	bool did = evict_if_low(p, &p->shared);
	for (uint32_t i = 0; i < p->memories_capacity; i++)
		if (p->memories[i] && p->memories[i]->pool == &p->memories[i]->own)
			did |= evict_if_low(p, &p->memories[i]->own);
	pthread_mutex_unlock(&p->lock);
	return did;
}

// The memory leaves a pool that it shares. Lock held; walks what is resident in the pool.
void uf_pool_leave(struct uf_memory *m)
{
	struct uf_pager *p = m->pager;
	struct uf_queue *queues[] = {&m->pool->probation, &m->pool->main};
	for (unsigned i = 0; i < 2; i++) {
		for (uint64_t ref = queues[i]->head, next; ref != UF_NIL; ref = next) {
			next = link_of(p, ref)->next;
			if (ref >> 32 == m->id) {
				unlink_ref(p, queues[i], ref, uf_block_size(m));
				uf_word_store(m, (uint32_t)ref, UF_ABSENT);
				uf_unroom(m, uf_block_size(m));
			}
		}
	}
}

uint64_t uf_evict_blocks(struct uf_memory *m, uint64_t first, uint64_t count)
{
	struct uf_pager *p = m->pager;
	uint64_t freed = 0, end = first + count;
	pthread_mutex_lock(&p->lock);
	bool waited = uf_is_fault_thread(p);
	for (uint64_t at = first; at < end;) {
		struct batch b = {.op = uf_op_begin(p, NULL, UF_EVICTING)};
		if (!b.op)
			break;
		for (uint64_t look = 0; at < end && b.n < UF_BATCH && b.bytes < 64u << 20 && look < 1u << 14; at++, look++) {
			uint64_t start, n;
			if (UF_STATE(uf_word(m, at)) == UF_LOADING && !waited) {
				if (b.n)
					break; // not with others in EVICTING: come back
				// A thread that has just read a block may be awake before the block is CLEAN.
				waited = true;
				uf_wait_changed(p, 1);
			}
			if (UF_STATE(uf_word(m, at)) != UF_CLEAN)
				continue;
			unit_of(m, at, &start, &n);
			if (start < first || start + n > end) { // the rest of the extent was not asked for: as small blocks
				for (uint64_t i = start; i < start + n; i++)
					uf_word_store(m, i, uf_word(m, i) & ~UF_WORD_HUGE);
				start = at;
				n = 1;
			}
			if (!take(&b, m, start, n))
				break;
			at = start + n - 1;
		}
		freed += b.bytes;
		if (b.n)
			finish(p, &b);
		else
			uf_op_end(b.op);
		pthread_mutex_unlock(&p->lock); // a large memory has many blocks to look at: let faults in between
		pthread_mutex_lock(&p->lock);
	}
	pthread_mutex_unlock(&p->lock);
	return freed;
}
