// SPDX-License-Identifier: Apache-2.0
// Budgets: what is resident, in which order it leaves, and how it is dropped.
//
// Replacement is 2Q on fault history, which costs no traps: a block that comes in for the first time goes to the
// probation queue; one that was evicted not long ago and is asked for again goes to the main queue. Both are first in,
// first out; probation gives way first while it holds more than its share. So a scan flows through probation and leaves
// the main queue alone. "Not long ago" needs no ghost list: an evicted block's state word keeps the eviction clock of
// that moment, and it is a ghost as long as no more than a budget's worth of blocks was evicted since.
//
// The share follows the faults, as in ARC: a ghost that comes back says that the queue which it left is too short. Where
// the hot set moves, what was hot must go, and only the ghosts of probation tell. However large the share, main gives way
// only with its older blocks, so that the worst that can come of it is first in, first out (benchmarks/replacement.py).
#include <sys/mman.h>

#include "internal.h"

enum { GATHER = 512 << 10 };

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
	l->came = ++p->came;
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

// Evictions serve many blocks with one flush (engine-notes §1), but what they free lies idle until it is filled: no more
// than a 64th of the budget.
static uint64_t batch_bytes(uint64_t limit)
{
	return uf_min(1u << 20, limit / 64);
}

// What probation keeps in any case: a newcomer must stay long enough to be used.
static uint64_t least_share(const struct uf_pool *pool, uint64_t limit)
{
	return uf_max(limit / 16, pool->least / 4);
}

// A ghost came back: the queue that it left should have been longer. It counts for the more, the fewer of the ghosts left
// that queue (ARC's rule, on the evictions of about one budget).
static void adapt(struct uf_pool *pool, bool left_main, uint64_t block_size, uint64_t limit)
{
	uint64_t own = left_main ? pool->from_main : UF_ALL - pool->from_main;
	uint64_t times = uf_min(uf_max((UF_ALL - own) / uf_max(own, 1), 1), 8);
	uint64_t step = 4 * times * block_size, share = uf_max(pool->share, least_share(pool, limit));
	if (left_main)
		pool->share = share - uf_min(step, share);
	else
		pool->share = uf_min(share + step, limit);
}

// The block's state word still holds its stamp, and the queue that it left (see uf_claim).
void uf_enqueue(struct uf_memory *m, uint64_t block)
{
	struct uf_pool *pool = m->pool;
	uint32_t w = uf_word(m, block), stamp = w >> UF_STAMP_SHIFT;
	uint64_t limit = uf_pool_effective_limit(m->pager, pool);
	uint64_t window = uf_min(limit >> m->shift, 1u << 23);
	bool ghost = stamp && (((uint32_t)pool->stamp - stamp) & 0xffffff) <= window;
	if (ghost)
		adapt(pool, w & UF_WORD_MAIN, uf_block_size(m), limit);
	uf_word_store(m, block, (w & 15u) | (ghost ? UF_WORD_MAIN : 0));
	push(m->pager, ghost ? &pool->main : &pool->probation, ref_of(m, block), uf_block_size(m));
}

void uf_enqueue_main(struct uf_memory *m, uint64_t block)
{
	uf_word_store(m, block, uf_word(m, block) | UF_WORD_MAIN);
	push(m->pager, &m->pool->main, ref_of(m, block), uf_block_size(m));
}

uint32_t uf_stamp(struct uf_memory *m)
{
	uint32_t stamp = (uint32_t)++m->pool->stamp & 0xffffff;
	return stamp ? stamp : 1;
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

// Room that is kept free ahead of need. What takes a write-back to get rid of is begun earlier.
static uint64_t low_water(uint64_t limit, const struct uf_pool *pool)
{
	return pool->leaving ? uf_min(4u << 20, limit / 8) : batch_bytes(limit) / 4;
}

// An eviction under way: blocks in EVICTING, grouped by memory, named in op records. `slot` is where a dirty part goes.
struct batch {
	struct uf_op *op;
	unsigned n;
	uint64_t bytes;
	bool dirty;      // some part is
	bool clean_only; // dirty blocks are passed over
	uint64_t at[2];  // where the search in either queue goes on, UF_NIL = at its tail
	struct uf_slot *slot[UF_BATCH];
};

static bool take(struct batch *b, struct uf_memory *m, uint64_t first, uint64_t count, struct uf_slot *slot)
{
	struct uf_op *op = b->op;
	if (!slot && op->n && !b->slot[op->n - 1] && op->part[op->n - 1].memory == m &&
	    op->part[op->n - 1].first + op->part[op->n - 1].count == first) {
		op->part[op->n - 1].count += count;
	} else {
		if (op->n == UF_BATCH)
			return false;
		b->slot[op->n] = slot;
		b->dirty |= slot != NULL;
		atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
		op->part[op->n].memory = m;
		op->part[op->n].first = first;
		op->part[op->n++].count = count;
	}
	struct uf_pool *pool = m->pool;
	int64_t window = (int64_t)uf_max(uf_pool_effective_limit(m->pager, pool) >> m->shift, 1);
	for (uint64_t i = first; i < first + count; i++) {
		uint32_t w = uf_word(m, i);
		pool->from_main += (uint64_t)(((int64_t)(w & UF_WORD_MAIN ? UF_ALL : 0) - (int64_t)pool->from_main) / window);
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
	while (*first > start && (uf_word(m, *first - 1) & (UF_WORD_HUGE | 15u)) == (UF_WORD_HUGE | UF_CLEAN) &&
	       !uf_pinned(m, *first - 1))
		--*first;
	uint64_t last = block + 1;
	while (last < end && (uf_word(m, last) & (UF_WORD_HUGE | 15u)) == (UF_WORD_HUGE | UF_CLEAN) && !uf_pinned(m, last))
		last++;
	*count = last - *first;
}

// A neighbour that is written together with `block`: dirty, and if that is only for speed, not much younger.
static bool goes_along(struct uf_memory *m, uint64_t neighbour, uint64_t block, bool same_unit)
{
	if (UF_STATE(uf_word(m, neighbour)) != UF_DIRTY || uf_pinned(m, neighbour))
		return false;
	uint64_t a = m->links[neighbour].came, b = m->links[block].came;
	return same_unit || (a > b ? a - b : b - a) <= 2 * ((uint64_t)GATHER >> m->shift);
}

// The run of dirty blocks that are written together with this one: what is in its unit; files and scratch take more at once,
// as far as their budget is large enough for several such runs on their way.
static uint64_t dirty_run(struct uf_memory *m, uint64_t block, uint64_t *first)
{
	bool to_worker = m->kind == UF_SOURCE_WORKER && m->store == UF_STORE_SOURCE;
	uint64_t unit = 1ULL << (m->unit_shift - m->shift), size = unit;
	uint64_t limit = uf_min(uf_pool_effective_limit(m->pager, m->pool), m->pager->limit);
	while (!to_worker && size << m->shift < uf_min(GATHER, limit / 32))
		size *= 2;
	uint64_t start = block / size * size, last = block + 1, end = uf_min(start + size, m->nblocks);
	*first = block;
	while (*first > start && goes_along(m, *first - 1, block, (*first - 1) / unit == block / unit))
		--*first;
	while (last < end && goes_along(m, last, block, last / unit == block / unit))
		last++;
	return last - *first;
}

static bool take_dirty(struct batch *b, struct uf_memory *m, uint64_t block)
{
	uint64_t first, count = dirty_run(m, block, &first);
	if (b->op->n == UF_BATCH || m->flush_waits || (m->write_not_before_ns && uf_now_ns() < m->write_not_before_ns))
		return false;
	struct uf_slot *s = uf_slot_take(m, first, count, false);
	if (!s)
		return false;
	uf_slot_hold(s); // already now, so that the rest of this batch does not take more than it should
	return take(b, m, first, count, s);
}

// What became of the batch's parts. Returns the bytes that are gone, or will be when they are written.
static uint64_t settle(struct batch *b, int *err)
{
	struct uf_op *op = b->op;
	uint64_t gone = 0;
	for (unsigned i = 0; i < op->n; i++) {
		struct uf_memory *m = op->part[i].memory;
		struct uf_slot *slot = b->slot[i];
		uint64_t first = op->part[i].first, count = op->part[i].count;
		bool closed = atomic_load_explicit(&m->closed, memory_order_relaxed);
		if (slot && !closed && !err[i]) {
			for (uint64_t k = first; k < first + count; k++)
				uf_word_store(m, k, (uint32_t)(slot - m->pager->slots) << UF_SLOT_SHIFT |
						     (uf_word(m, k) & UF_WORD_MAIN) | UF_WRITING);
			uf_slot_queue(slot);
		} else if (slot) {
			// Pinned or shared: it stays, and is looked at again last.
			err[i] = err[i] ? err[i] : -ECANCELED; // the slot is free again
			slot->settled = true;
			uf_slot_unhold(slot);
			for (uint64_t k = first; k < first + count && !closed; k++) {
				uf_word_store(m, k, UF_DIRTY);
				uf_enqueue_main(m, k);
				uf_repair_add(m, k);
			}
			continue;
		} else {
			uf_trace(m, first, count, UF_TRACE_EVICT, UF_NIL, 0);
			for (uint64_t k = first; k < first + count; k++)
				uf_word_store(m, k, uf_stamp(m) << UF_STAMP_SHIFT | (uf_word(m, k) & UF_WORD_MAIN) | UF_ABSENT);
			m->stats.evictions += count;
			uf_unroom(m, count << m->shift);
		}
		gone += count << m->shift;
	}
	return gone;
}

// Drops the batch's pages, or takes them to slots, and finishes its blocks. Called with lock, drops it, returns with it.
static uint64_t finish(struct uf_pager *p, struct batch *b)
{
	struct uf_op *op = b->op;
	int err[UF_BATCH] = {0};
	p->moving += b->dirty;
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < op->n;) {
		struct uf_memory *m = op->part[i].memory;
		struct uf_range ranges[UF_BATCH];
		unsigned n = 0;
		if (b->slot[i]) {
			err[i] = uf_slot_fill(b->slot[i]);
			i++;
			continue;
		}
		for (; i < op->n && op->part[i].memory == m && !b->slot[i]; i++)
			ranges[n++] = (struct uf_range){op->part[i].first, op->part[i].count};
		if (!atomic_load_explicit(&m->closed, memory_order_acquire))
			uf_forget_pages(m, ranges, n);
	}
	pthread_mutex_lock(&p->lock);
	uint64_t gone = settle(b, err);
	if (b->dirty) {
		p->moving--;
		pthread_cond_broadcast(&p->changed);
	}
	pthread_mutex_unlock(&p->lock);
	// The rule: new state first, then wake the whole block. A thread that met EVICTING was dropped and asks again.
	for (unsigned i = 0; i < op->n; i++)
		uf_wake(op->part[i].memory, op->part[i].first, op->part[i].count);
	pthread_mutex_lock(&p->lock);
	for (unsigned i = 0; i < op->n && b->dirty; i++)
		if (b->slot[i] && err[i])
			uf_slot_free(b->slot[i]);
	uf_op_end(op);
	return gone;
}

static bool main_gives_way(struct uf_pager *p, const struct uf_pool *pool)
{
	uint64_t probation = pool->probation.tail, main = pool->main.tail;
	if (probation == UF_NIL || main == UF_NIL)
		return probation == UF_NIL;
	if (pool->probation.bytes <= least_share(pool, uf_pool_effective_limit(p, pool)))
		return true;
	return pool->probation.bytes <= pool->share && link_of(p, main)->came < link_of(p, probation)->came;
}

// The next block that leaves, from the tail of the queue that gives way, else of the other. Pinned blocks go to the head;
// blocks that cannot leave now are passed over.
static bool take_next(struct uf_pager *p, struct uf_pool *pool, struct batch *b)
{
	struct uf_queue *queues[] = {&pool->probation, &pool->main};
	bool main_first = main_gives_way(p, pool);
	for (unsigned i = 0; i < 2; i++) {
		unsigned which = i ^ (unsigned)main_first, skipped = 0;
		struct uf_queue *q = queues[which];
		// What was passed over before in this batch is not looked at again, unless the place has left the queue.
		uint64_t from = b->at[which];
		if (from == UF_NIL || UF_STATE(uf_word(p->memories[from >> 32], (uint32_t)from)) == UF_EVICTING)
			from = q->tail;
		for (uint64_t ref = from, prev; ref != UF_NIL && skipped < UF_SKIP; ref = prev, skipped++) {
			struct uf_memory *m = p->memories[ref >> 32];
			uint64_t block = (uint32_t)ref, first, count;
			prev = link_of(p, ref)->prev;
			b->at[which] = prev;
			if (uf_pinned(m, block)) {
				unlink_ref(p, q, ref, uf_block_size(m));
				push(p, q, ref, uf_block_size(m));
				continue;
			}
			switch (UF_STATE(uf_word(m, block))) {
			case UF_CLEAN:
				unit_of(m, block, &first, &count);
				return take(b, m, first, count, NULL);
			case UF_DIRTY:
				if (!b->clean_only && take_dirty(b, m, block))
					return true;
				break;
			default: // its write-back is under way, or somebody owns it
				break;
			}
			if (skipped >= UF_SKIP / 16) { // many: they must not hide what could go
				unlink_ref(p, q, ref, uf_block_size(m));
				push(p, q, ref, uf_block_size(m));
			}
		}
	}
	return false;
}

// Evicts from the tail of the pool's queues: at least `want` bytes, and a batch's worth, where it can. False if nothing
// could be taken (all that is resident is under way, or no op record is free).
static bool evict_batch(struct uf_pager *p, struct uf_pool *pool, uint64_t want, bool clean_only)
{
	// While a fork waits for those that have begun, dirty blocks stay. (And no waiting here: nothing keeps the pool.)
	struct batch b = {.op = uf_op_begin(p, NULL, UF_EVICTING), .clean_only = clean_only || p->forking, .at = {UF_NIL, UF_NIL}};
	if (!b.op)
		return false;
	uint64_t goal = uf_max(want, batch_bytes(uf_pool_effective_limit(p, pool)));
	while (b.bytes < goal && b.n < UF_BATCH && take_next(p, pool, &b))
		;
	if (!b.n) {
		uf_op_end(b.op);
		return false;
	}
	return finish(p, &b) != 0;
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

void uf_account(struct uf_memory *m, uint64_t bytes)
{
	struct uf_pager *p = m->pager;
	struct uf_pool *pool = m->pool;
	uint64_t limit = uf_pool_effective_limit(p, pool);
	pool->resident += bytes;
	m->stats.resident += bytes;
	p->resident += bytes;
	pool->peak = uf_max(pool->peak, pool->resident);
	p->resident_peak = uf_max(p->resident_peak, p->resident);
	atomic_store_explicit(&pool->full, pool->resident > limit / 8 * 7 || p->resident > pager_limit(p) / 8 * 7,
			      memory_order_relaxed); // a hint for uf_install
	m->stats.resident_peak = uf_max(m->stats.resident_peak, m->stats.resident);
	// Little room left: the fault thread makes some when it has nothing better to do. Not before something had to be
	// evicted: what just fits the budget stays.
	pool->low = pool->stamp && pool->resident + low_water(limit, pool) > limit;
	if (pool->low) {
		p->low = true;
		atomic_store_explicit(&p->attention, true, memory_order_relaxed);
	}
}

// Evicts until `bytes` more would fit, counting what is on its way out as gone. Lock held, may drop it.
static void make_room(struct uf_memory *m, uint64_t bytes)
{
	struct uf_pager *p = m->pager;
	struct uf_pool *pool = m->pool;
	uint64_t limit = uf_pool_effective_limit(p, pool);
	for (;;) { // evicting drops the lock: both limits are looked at again
		uint64_t most = pager_limit(p), here = pool->resident - pool->leaving + bytes, all = p->resident - p->leaving + bytes;
		if (here > limit && evict_batch(p, pool, here - limit, false))
			continue;
		if (all > most && (evict_batch(p, fattest(p), all - most, false) || evict_batch(p, pool, all - most, false)))
			continue;
		break;
	}
}

bool uf_fits(const struct uf_memory *m, uint64_t bytes)
{
	const struct uf_pager *p = m->pager;
	return m->pool->resident + bytes <= uf_pool_effective_limit(p, m->pool) && p->resident + bytes <= pager_limit(p);
}

bool uf_room_now(struct uf_memory *m, uint64_t bytes, bool urgent)
{
	struct uf_pager *p = m->pager;
	make_room(m, bytes);
	// Nobody waits for the store while there are blocks that can go at once.
	while (urgent && !uf_fits(m, bytes) && (m->pool->leaving || p->leaving) &&
	       (evict_batch(p, m->pool, bytes, true) || (m->pool != fattest(p) && evict_batch(p, fattest(p), bytes, true))))
		;
	// What is being written may hang: more goes out beside it, as much as slots may hold.
	if (urgent && !uf_fits(m, bytes) && (m->pool->leaving || p->leaving))
		evict_batch(p, m->pool, bytes, false);
	return (m->pool->resident + bytes <= uf_pool_effective_limit(p, m->pool) || !m->pool->leaving) &&
	       (p->resident + bytes <= pager_limit(p) || !p->leaving);
}

// Reserves room for blocks that are about to be installed, evicting first. What is under way in other threads may be all
// that is resident: then the budget is passed by the blocks in flight, and by no more.
void uf_room(struct uf_memory *m, uint64_t bytes)
{
	make_room(m, bytes);
	uf_account(m, bytes);
}

static bool evict_if_low(struct uf_pager *p, struct uf_pool *pool)
{
	if (!pool->low)
		return false;
	pool->low = false;
	uint64_t limit = uf_pool_effective_limit(p, pool);
	uint64_t here = pool->resident - pool->leaving + low_water(limit, pool);
	return here > limit && evict_batch(p, pool, here - limit, false);
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

uint64_t uf_evict_blocks(struct uf_memory *m, uint64_t first, uint64_t count, bool forced)
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
			if (UF_STATE(uf_word(m, at)) != UF_CLEAN || (!forced && uf_pinned(m, at)))
				continue;
			unit_of(m, at, &start, &n);
			if (start < first || start + n > end) { // the rest of the extent was not asked for: as small blocks
				for (uint64_t i = start; i < start + n; i++)
					uf_word_store(m, i, uf_word(m, i) & ~UF_WORD_HUGE);
				start = at;
				n = 1;
			}
			if (!take(&b, m, start, n, NULL))
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
