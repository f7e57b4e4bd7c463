// SPDX-License-Identifier: Apache-2.0
// A recorded working set, loaded ahead of demand: extents in the order in which an earlier run needed them.
//
// The fault thread loads them when no fault waits, like any background fill. What does not fit into half of the budget is loaded
// window by window: a window ends before blocks that were not loaded, so the reader's next fault there says that it has come
// so far, and asks for the next one. A run that leaves something out is followed from where it goes on. One that does something else is
// recognised by its faults on blocks that are not in the plan; a plan that is wrong too often is dropped, since what it
// brings only takes room.
#include <stdlib.h>

#include "internal.h"

enum {
	WRONG_LEAST = 16, // so many faults outside of the plan are no sign of anything
	WRONG_SHARE = 4,  // dropped when there is one such fault for every four blocks that were loaded
};

struct extent {
	uint64_t first, count, place; // its number in the plan
};

struct uf_replay {
	uint64_t n, at;   // extents; the one to load next, n = the plan has ended
	uint64_t done;    // blocks of it that were asked for
	uint64_t window, left; // blocks that are loaded before a fault must follow; of these, still to load
	uint64_t asked, wrong; // blocks asked for; faults outside of the plan
	struct extent *extent; // in the order of the plan; no block is in two of them
	struct extent *sorted; // the same by address, without empty ones
	uint64_t nsorted;
};

static int by_address(const void *a, const void *b)
{
	const struct extent *x = a, *y = b;
	return x->first < y->first ? -1 : x->first > y->first;
}

// The extent that holds this block, NULL if none does.
static const struct extent *extent_of(const struct uf_replay *r, uint64_t block)
{
	uint64_t low = 0, high = r->nsorted;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (r->sorted[middle].first <= block)
			low = middle + 1;
		else
			high = middle;
	}
	return low && block - r->sorted[low - 1].first < r->sorted[low - 1].count ? &r->sorted[low - 1] : NULL;
}

static void release(struct uf_replay *r)
{
	free(r->extent);
	free(r->sorted);
	free(r);
}

void uf_replay_end(struct uf_memory *m)
{
	struct uf_replay *r = m->replay;
	if (!r)
		return;
	m->replay = NULL;
	release(r);
}

// The next piece of the plan becomes a background fill. Lock held.
void uf_replay_feed(struct uf_memory *m)
{
	struct uf_replay *r = m->replay;
	if (!r || m->nbackground)
		return;
	while (r->at < r->n && r->done >= r->extent[r->at].count) {
		r->at++;
		r->done = 0;
	}
	if (r->at == r->n) {
		uf_replay_end(m);
		return;
	}
	if (!r->left)
		return;
	const struct extent *e = &r->extent[r->at];
	uint64_t per = UF_EXTENT >> m->shift, first = e->first + r->done;
	// Piece by piece: what the program asks for comes in between.
	uint64_t n = uf_min(uf_min(e->count - r->done, r->left), per - first % per);
	uf_background_add(m, (struct uf_background){first, n, 1, UF_NIL, UF_TRACE_REPLAY, false});
	r->done += n;
	r->left -= n;
	r->asked += n;
}

// A fault on an absent block. Lock held; maybe in a signal handler.
void uf_replay_demanded(struct uf_memory *m, uint64_t block)
{
	struct uf_replay *r = m->replay;
	if (!r || r->at == r->n)
		return;
	const struct extent *e = extent_of(r, block);
	if (!e) {
		if (++r->wrong < WRONG_LEAST || r->wrong * WRONG_SHARE <= r->asked)
			return;
		m->stats.replays_dropped++;
		for (unsigned i = 0; i < m->nbackground; i++)
			if (m->background[i].kind == UF_TRACE_REPLAY)
				m->background[i].count = 0;
		r->at = r->n; // the fault thread frees it
		uf_rescan(m->pager);
		return;
	}
	// If all of it fits there is nothing to skip, and nothing to wait for. What is behind was evicted again: no news.
	bool ahead = e->place > r->at || (e->place == r->at && block - e->first >= r->done);
	if (r->window == UF_NIL || !ahead)
		return;
	r->at = e->place;
	r->done = block - e->first + 1;
	r->left = r->window;
	uf_rescan(m->pager);
}

// Copies the plan, as far as it is inside of the memory; a block that is in two extents stays in the one at the lower address.
static uint64_t take_over(struct uf_replay *r, const struct uf_memory *m, const uint64_t *extents, uint64_t n)
{
	uint64_t total = 0, end = 0;
	for (uint64_t i = 0; i < n; i++) {
		uint64_t first = extents[2 * i], count = first < m->nblocks ? uf_min(extents[2 * i + 1], m->nblocks - first) : 0;
		if (count)
			r->sorted[r->n] = r->extent[r->n] = (struct extent){first, count, r->n}, r->n++;
	}
	qsort(r->sorted, r->n, sizeof(*r->sorted), by_address);
	for (uint64_t i = 0; i < r->n; i++) { // cut where they overlap
		struct extent cut = r->sorted[i], *e = &cut;
		uint64_t over = uf_min(end > e->first ? end - e->first : 0, e->count);
		e->first += over;
		e->count -= over;
		end = uf_max(end, e->first + e->count);
		r->extent[e->place] = *e;
		total += e->count;
		if (e->count)
			r->sorted[r->nsorted++] = *e;
	}
	return total;
}

int uf_memory_replay(struct uf_memory *m, const uint64_t *extents, uint64_t n)
{
	struct uf_pager *p = m->pager;
	struct uf_replay *r = calloc(1, sizeof(*r));
	if (r) {
		r->extent = calloc(n + 1, sizeof(*r->extent));
		r->sorted = calloc(n + 1, sizeof(*r->sorted));
	}
	if (!r || !r->extent || !r->sorted) {
		if (r)
			release(r);
		return -ENOMEM;
	}
	uint64_t total = take_over(r, m, extents, n);
	pthread_mutex_lock(&p->lock);
	int err = atomic_load_explicit(&m->closed, memory_order_relaxed) ? -EBADF : 0;
	if (!err) {
		uint64_t limit = uf_min(uf_pool_effective_limit(p, m->pool), p->limit) >> m->shift;
		r->window = r->left = total <= limit / 2 ? UF_NIL : uf_max(limit / 2, 1);
		uf_replay_end(m);
		m->replay = r;
		uf_rescan(p);
		uf_fault_thread_kick(p);
	}
	pthread_mutex_unlock(&p->lock);
	if (err)
		release(r);
	return err;
}
