// SPDX-License-Identifier: Apache-2.0
// Readahead: recognises sequential and strided scans in the order of faults.
//
// Unlike the kernel's readahead, which marks a page and sees it touched, we see only faults: a reader inside its window is
// silent, and would stall a whole round trip at the window's end. For sources that answer late one read in the middle of
// the window is therefore *held*: its bytes wait in their slot, its blocks stay LOADING, and the reader's fault there
// both installs them at once and asks for the next window. For native sources filling is faster than reading, and the
// background fill goes on while the reader works.
#include "internal.h"

enum { FIRST_WINDOW = 4, NEAR = 1024 };

static uint64_t window_most(const struct uf_memory *m)
{
	uint64_t most = m->kind == UF_SOURCE_WORKER ? 16u << 20 : 8u << 20;
	uint64_t share = uf_min(uf_pool_effective_limit(m->pager, m->pool), m->pager->limit) / 8;
	return uf_max(uf_min(most, share) >> m->shift, 1);
}

void uf_background_add(struct uf_memory *m, struct uf_background what)
{
	if (!what.count)
		return;
	// A scan's next window continues its last one: join them, so that there is one entry per stream.
	for (unsigned i = 0; i < m->nbackground; i++) {
		struct uf_background *b = &m->background[i];
		if (b->step == 1 && what.step == 1 && b->kind == what.kind && b->single == what.single && b->first + b->count == what.first) {
			b->count += what.count;
			if (what.trigger != UF_NIL)
				b->trigger = what.trigger;
			uf_rescan(m->pager);
			return;
		}
	}
	if (m->nbackground == UF_BACKGROUND) {
		// Advice may be forgotten; the oldest is the one that the program has left behind.
		for (unsigned i = 1; i < UF_BACKGROUND; i++)
			m->background[i - 1] = m->background[i];
		m->nbackground--;
	}
	m->background[m->nbackground++] = what;
	uf_rescan(m->pager);
}

// Asks for what the stream wants beyond `s->next`.
static void extend(struct uf_memory *m, struct uf_stream *s, uint64_t block)
{
	uint64_t end = uf_min(block + s->window, m->nblocks);
	if (end <= s->next)
		return;
	struct uf_background b = {s->next, end - s->next, 1, UF_NIL, UF_TRACE_READAHEAD, false};
	if (m->kind == UF_SOURCE_WORKER && s->window >= 8 && end < m->nblocks)
		b.trigger = s->next + (end - s->next) / 2;
	s->next = end;
	uf_background_add(m, b);
}

static bool is_scan(const struct uf_stream *s)
{
	return s->live && (s->stride != 1 || s->window >= FIRST_WINDOW);
}

static bool off(const struct uf_memory *m)
{
	return m->advice == UF_RANDOM || m->access_watchers || m->stats.faults < m->quiet_until;
}

static struct uf_stream *sequential_at(struct uf_memory *m, uint64_t block)
{
	for (unsigned i = 0; i < UF_STREAMS; i++) {
		struct uf_stream *s = &m->streams[i];
		if (s->live && s->stride == 1 && block >= s->last && block <= s->next)
			return s;
	}
	return NULL;
}

// A fault met a block that is being read: if it is in a scan's window, the window moves on.
void uf_readahead_follow(struct uf_memory *m, uint64_t block)
{
	struct uf_stream *s = off(m) ? NULL : sequential_at(m, block);
	if (!s || s->window < FIRST_WINDOW)
		return;
	s->last = block;
	s->used = ++m->stream_clock;
	s->window = uf_min(s->window * 2, window_most(m));
	extend(m, s, block);
}

// How many blocks from `block` on should be read for this fault (at least 1, within its 2 MiB extent); queues the rest.
uint64_t uf_readahead_plan(struct uf_memory *m, uint64_t block)
{
	if (off(m))
		return 1;
	uint64_t most = window_most(m);
	struct uf_stream *s = sequential_at(m, block);
	if (s) {
		s->window = uf_min(uf_max(s->window * 2, FIRST_WINDOW), most);
		s->last = block;
		s->used = ++m->stream_clock;
		uint64_t per = UF_EXTENT >> m->shift;
		uint64_t now = uf_min(s->window, per - block % per);
		s->next = uf_max(s->next, block + now);
		extend(m, s, block);
		return now;
	}

	struct uf_stream *near = NULL;
	for (unsigned i = 0; i < UF_STREAMS; i++) {
		s = &m->streams[i];
		if (s->live && s->stride != 1 && s->stride != 0 && block == s->expect) {
			// A strided scan goes on: the next few of its blocks, one by one.
			s->window = uf_min(s->window * 2, uf_min(uf_max(most, 1), 32));
			s->last = block;
			s->used = ++m->stream_clock;
			uint64_t room = s->stride > 0 ? (m->nblocks - 1 - block) / (uint64_t)s->stride
						      : block / (uint64_t)-s->stride;
			uint64_t n = uf_min(s->window, room);
			uf_background_add(m, (struct uf_background){block + (uint64_t)s->stride, n, s->stride, UF_NIL,
								    UF_TRACE_READAHEAD, false});
			s->expect = block + (uint64_t)s->stride * (n + 1);
			return 1;
		}
		int64_t d = (int64_t)(block - s->last);
		if (s->live && !is_scan(s) && d >= -NEAR && d <= NEAR && (!near || s->used > near->used))
			near = s;
	}
	int64_t distance = near ? (int64_t)(block - near->last) : 0;
	if (near && near->candidate && distance == near->candidate) {
		// The same distance twice: a stride. It reads ahead once the next fault comes where it is expected.
		near->stride = distance;
		near->window = 2;
		near->last = block;
		near->expect = block + (uint64_t)distance;
		near->used = ++m->stream_clock;
		return 1;
	}
	// A new stream: the next block would make it sequential, the same distance to another point again a stride. It takes the
	// place of the point that was used longest ago, and of a known scan only if there are but scans.
	s = NULL;
	for (unsigned i = 0; i < UF_STREAMS; i++) {
		struct uf_stream *c = &m->streams[i];
		bool scans = is_scan(c), s_scans = s && is_scan(s);
		if (!s || (s_scans && !scans) || (s_scans == scans && (!c->live || (s->live && c->used < s->used))))
			s = c;
	}
	uint64_t window = m->advice == UF_SEQUENTIAL ? most : 1;
	*s = (struct uf_stream){
		.live = true,
		.stride = 1,
		.candidate = distance,
		.last = block,
		.next = block + 1,
		.window = window,
		.used = ++m->stream_clock,
	};
	if (window > 1)
		extend(m, s, block);
	return 1;
}
