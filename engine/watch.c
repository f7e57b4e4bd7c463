// SPDX-License-Identifier: Apache-2.0
// Which blocks are touched: a bit per block, set when a trap has let somebody in.
//
// A block that is not resident traps every access, a resident block that is write-protected every write. So to watch accesses
// all that is resident is evicted first, and readahead is off; to watch writes what is dirty is written back, and protected by
// that. A bit is set when a fault's handler takes the block, before its thread can go on: so a program that touches a block and
// then ends the interval finds it there.
//
// An interval ends in this order: the bits are taken, then those blocks (and no others) trap again. What is done to one of them in
// between belongs to the interval that ends, where it is counted already. A block whose handler is still at it then is waited
// for; if that takes long (a slow source) it is *late*: it will be resident without a trap, and is counted in the next interval,
// too. A block that cannot be made to trap (pinned, its store fails, prefetched) is *blind*: it counts as touched, in each
// interval, until it traps again.
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

enum {
	CHUNK = 4096, // words in one go under the lock
	ROUNDS = 20,  // tries to make a block trap again, a millisecond apart
};

static uint64_t words(const struct uf_memory *m)
{
	return (m->nblocks + 63) / 64;
}

static void set(struct uf_memory *m, enum uf_seen what, uint64_t block)
{
	m->seen[what][block / 64] |= 1ULL << block % 64;
}

static bool is_set(const struct uf_memory *m, enum uf_seen what, uint64_t block)
{
	return m->seen[what][block / 64] >> block % 64 & 1;
}

void uf_seen(struct uf_memory *m, uint64_t block, bool write)
{
	if (!m->watchers)
		return;
	set(m, UF_SEEN_ACCESSED, block);
	if (write)
		set(m, UF_SEEN_WRITTEN, block);
}

void uf_seen_done(struct uf_memory *m, uint64_t first, uint64_t count)
{
	for (uint64_t b = first; m->watchers && b < first + count; b++) {
		if (!is_set(m, UF_SEEN_LATE, b))
			continue;
		m->seen[UF_SEEN_LATE][b / 64] &= ~(1ULL << b % 64);
		uf_seen(m, b, uf_is_dirty(m, b));
	}
}

// Before they are installed: COPY wakes, and from then on everybody passes. An interval that ends in between finds them LOADING
// and waits for them, or calls them late.
void uf_seen_coming(struct uf_memory *m, uint64_t first, uint64_t count, bool demanded)
{
	uf_seen_done(m, first, count);
	// What comes without a fault, or with another block's.
	for (uint64_t b = first; m->access_watchers && b < first + count; b++)
		if (!(demanded && b == first) && !(uf_word(m, b) & UF_WORD_DROPPED))
			set(m, UF_SEEN_BLIND, b);
}

void uf_seen_blind(struct uf_memory *m, uint64_t block)
{
	if (m->watchers)
		set(m, UF_SEEN_BLIND, block);
}

void uf_watch_free(struct uf_memory *m)
{
	for (unsigned i = 0; i < UF_SEEN; i++)
		if (m->seen[i])
			munmap(m->seen[i], words(m) * sizeof(uint64_t));
}

// Does nothing trap on this block, of what is watched? Lock held.
static bool lets_pass(const struct uf_memory *m, uint64_t block)
{
	switch (UF_STATE(uf_word(m, block))) {
	case UF_CLEAN:
	case UF_RESTORED:
		return m->access_watchers;
	case UF_DIRTY:
	case UF_REINSTALLED:
		return true;
	case UF_EVICTING: // it may be refused
		return uf_is_dirty(m, block);
	default:
		return false;
	}
}

// Looks at blocks after they were made to trap: at those that do not, and that nobody has touched since. `last`: of these the
// owned ones are late, the others blind. Else: is it worth another try? Lock held.
static bool look(struct uf_memory *m, uint64_t first, uint64_t end, const uint64_t *only, bool last)
{
	bool again = false;
	for (uint64_t b = first; b < end; b++) {
		if (only && !(only[b / 64] >> b % 64)) {
			b |= 63; // none of the rest of this word
			continue;
		}
		if (only && !(only[b / 64] >> b % 64 & 1))
			continue;
		enum uf_state s = UF_STATE(uf_word(m, b));
		// What is read only comes protected.
		bool owned = s == UF_UPGRADING || (s == UF_LOADING && (m->access_watchers || uf_is_dirty(m, b)));
		if ((!owned && !lets_pass(m, b)) || is_set(m, m->access_watchers && !uf_is_dirty(m, b) ? UF_SEEN_ACCESSED : UF_SEEN_WRITTEN, b))
			continue;
		if (last || (!owned && uf_pinned(m, b)))
			set(m, owned ? UF_SEEN_LATE : UF_SEEN_BLIND, b);
		else
			again = true;
	}
	return again;
}

static void evict(struct uf_memory *m, uint64_t first, uint64_t end, const uint64_t *only)
{
	if (!only)
		uf_evict_blocks(m, first, end - first, false);
	for (uint64_t i = first / 64, n = 0; only && i * 64 < end; i += n + !n, n = 0) {
		while ((i + n) * 64 < end && only[i + n])
			n++;
		if (n)
			uf_evict_blocks(m, i * 64, uf_min(n * 64, end - i * 64), false);
	}
}

// Blocks of [first, end) trap again, as far as they can. With `only` (a bit per block of the memory) just the blocks that it
// names are looked at afterwards.
static void arm(struct uf_memory *m, uint64_t first, uint64_t end, const uint64_t *only)
{
	struct uf_pager *p = m->pager;
	if (first >= end)
		return;
	bool again = true;
	for (int round = 0; again && !atomic_load_explicit(&m->closed, memory_order_relaxed) && round <= ROUNDS; round++) {
		pthread_mutex_lock(&p->lock);
		bool accesses = m->access_watchers;
		if (round)
			uf_wait_changed(p, 1);
		pthread_mutex_unlock(&p->lock);
		// Also what was touched meanwhile and is not named: it has its bit already.
		bool last = !uf_write_back(m, first, end - first) || round == ROUNDS;
		if (accesses)
			evict(m, first, end, only);
		again = false;
		for (uint64_t at = first; at < end; at = at / (64 * CHUNK) * 64 * CHUNK + 64 * CHUNK) {
			pthread_mutex_lock(&p->lock);
			if (m->watchers)
				again |= look(m, at, uf_min(at / (64 * CHUNK) * 64 * CHUNK + 64 * CHUNK, end), only, last);
			pthread_mutex_unlock(&p->lock);
		}
	}
}

int uf_memory_watch(struct uf_memory *m, bool accesses)
{
	struct uf_pager *p = m->pager;
	uint64_t *fresh[UF_SEEN];
	for (unsigned i = 0; i < UF_SEEN; i++) {
		fresh[i] = mmap(NULL, words(m) * sizeof(uint64_t), PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (fresh[i] == MAP_FAILED) {
			int err = -errno;
			while (i--)
				munmap(fresh[i], words(m) * sizeof(uint64_t));
			return err;
		}
	}
	struct uf_staging none = {0};
	if (accesses && m->kind == UF_SOURCE_WORKER)
		uf_job_release_held(p, m, &none); // they would stay LOADING until somebody asks
	pthread_mutex_lock(&p->lock);
	if (atomic_load_explicit(&m->closed, memory_order_relaxed)) {
		pthread_mutex_unlock(&p->lock);
		for (unsigned i = 0; i < UF_SEEN; i++)
			munmap(fresh[i], words(m) * sizeof(uint64_t));
		return -EBADF;
	}
	if (!m->watchers) // a clean slate; otherwise the bits of the watch that is on go on
		for (unsigned i = 0; i < UF_SEEN; i++) {
			uint64_t *old = m->seen[i];
			m->seen[i] = fresh[i];
			fresh[i] = old;
		}
	m->watchers++;
	m->access_watchers += accesses;
	if (accesses) {
		m->nbackground = 0; // what they bring would be blind
		uf_replay_end(m);
	}
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < UF_SEEN; i++)
		if (fresh[i])
			munmap(fresh[i], words(m) * sizeof(uint64_t));
	arm(m, 0, m->nblocks, NULL);
	uf_memory_put(m);
	return 0;
}

void uf_memory_unwatch(struct uf_memory *m, bool accesses)
{
	pthread_mutex_lock(&m->pager->lock);
	if (m->watchers)
		m->watchers--;
	if (accesses && m->access_watchers)
		m->access_watchers--;
	pthread_mutex_unlock(&m->pager->lock);
}

int uf_memory_watched(struct uf_memory *m, uint64_t *accessed, uint64_t *written, uint64_t *blind, bool rearm)
{
	struct uf_pager *p = m->pager;
	uint64_t *const ret[] = {accessed, written, blind};
	uint64_t n = words(m), first = n, last = 0;
	int err = 0;
	pthread_mutex_lock(&p->lock);
	atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed); // a second thread may destroy it meanwhile
	pthread_mutex_unlock(&p->lock);
	for (uint64_t at = 0; at < n && !err; at += CHUNK) {
		size_t len = uf_min(CHUNK, n - at) * sizeof(uint64_t);
		pthread_mutex_lock(&p->lock);
		if (!m->watchers || atomic_load_explicit(&m->closed, memory_order_relaxed))
			err = m->watchers ? -EBADF : -EINVAL;
		for (unsigned i = 0; i <= UF_SEEN_BLIND && !err; i++) {
			memcpy(ret[i] + at, m->seen[i] + at, len);
			for (uint64_t k = at; rearm && k < uf_min(at + CHUNK, n); k++)
				if (m->seen[i][k]) // pages of zeros cost nothing as long as nobody writes to them
					m->seen[i][k] = 0;
		}
		pthread_mutex_unlock(&p->lock);
	}
	if (err || !rearm) {
		uf_memory_put(m);
		return err;
	}
	uint64_t *named = mmap(NULL, n * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bool whole = named == MAP_FAILED; // then all blocks are looked at
	for (uint64_t i = 0; i < n; i++) {
		uint64_t w = accessed[i] | written[i] | blind[i];
		if (!w)
			continue;
		first = uf_min(first, i);
		last = i + 1;
		if (!whole)
			named[i] = w;
	}
	arm(m, first * 64, uf_min(last * 64, m->nblocks), whole ? NULL : named);
	if (!whole)
		munmap(named, n * sizeof(uint64_t));
	uf_memory_put(m);
	return 0;
}
