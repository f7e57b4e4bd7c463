// SPDX-License-Identifier: Apache-2.0
// Pages between an area and its mirror, and their states. Everything here runs on the handler thread.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mirror_internal.h"

// Bytes moved. With none, `*err` says why; what stopped it in the middle is told by the next call.
static uint64_t move(int uffd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int *err)
{
	struct uffdio_move x = {dst, src, len, mode, 0};
	*err = 0;
	if (!ioctl(uffd, UFFDIO_MOVE, &x))
		return len;
	if (x.move > 0)
		return (uint64_t)x.move;
	*err = errno;
	return 0;
}

bool uf_mirror_wake(struct uf_mirror *m, uint64_t address, uint64_t length)
{
	struct uffdio_range r = {address, length};
	return !ioctl(m->uffd, UFFDIO_WAKE, &r);
}

// Present, or in swap.
static bool populated(struct uf_mirror *m, uint64_t address)
{
	uint64_t entry = 0;
	if (pread(m->pagemap, &entry, sizeof(entry), (off_t)(address / m->page * sizeof(entry))) != sizeof(entry))
		return true;
	return entry >> 62;
}

// Drops pages of a mirror. MADV_DONTNEED there would send an event to this very thread: they are moved to where nobody listens.
void uf_mirror_drop(struct uf_mirror *m, uint64_t address, uint64_t length)
{
	while (length) {
		if (m->trash_used == UF_MIRROR_TRASH) {
			madvise(m->trash, UF_MIRROR_TRASH * m->page, MADV_DONTNEED);
			m->trash_used = 0;
		}
		uint64_t n = uf_min(length, (UF_MIRROR_TRASH - m->trash_used) * m->page);
		int err;
		uint64_t done = move(m->trash_uffd, (uintptr_t)m->trash + m->trash_used * m->page, address, n,
				     UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES | UFFDIO_MOVE_MODE_DONTWAKE, &err);
		if (!done && err == EAGAIN)
			continue; // two of the kernel's threads met
		if (!done) {
			// Shared with a child, most likely: five times slower, as it cuts the mapping and joins it again.
			struct uffdio_register r = {.range = {address, length}, .mode = UFFDIO_REGISTER_MODE_WP};
			if (!ioctl(m->uffd, UFFDIO_UNREGISTER, &r.range)) {
				madvise((void *)(uintptr_t)address, length, MADV_DONTNEED);
				ioctl(m->uffd, UFFDIO_REGISTER, &r);
			} // else it stays: the page of the area can then not be taken away, and becomes blind
			return;
		}
		m->trash_used += (unsigned)(done / m->page);
		address += done;
		length -= done;
	}
}

uint32_t uf_piece_at(struct uf_mirror *m, uint64_t address)
{
	uint32_t low = 0, high = m->npieces;
	while (low < high) {
		uint32_t middle = (low + high) / 2;
		if (m->pieces[middle].end > address)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

static void insert(struct uf_mirror *m, const struct uf_piece *piece)
{
	if (m->npieces == UF_MIRROR_PIECES) {
		uf_log("tracked memory was cut into more than %d pieces.", UF_MIRROR_PIECES);
		abort(); // bytes would be lost
	}
	uint32_t i = uf_piece_at(m, piece->start);
	memmove(&m->pieces[i + 1], &m->pieces[i], (m->npieces - i) * sizeof(*m->pieces));
	m->pieces[i] = *piece;
	m->npieces++;
	m->nending += piece->ending;
}

static void take_out(struct uf_mirror *m, uint32_t i)
{
	m->nending -= m->pieces[i].ending;
	m->npieces--;
	memmove(&m->pieces[i], &m->pieces[i + 1], (m->npieces - i) * sizeof(*m->pieces));
}

static void split(struct uf_mirror *m, uint64_t at)
{
	uint32_t i = uf_piece_at(m, at);
	if (i == m->npieces || m->pieces[i].start >= at)
		return;
	struct uf_piece rest = m->pieces[i];
	rest.mirror += at - rest.start;
	rest.state += (at - rest.start) / m->page;
	rest.start = at;
	rest.book->pieces++;
	m->pieces[i].end = at;
	insert(m, &rest);
}

// Ranges that the program was about to drop when they were watched, or ceased to be. The thread that does it was let go on, and
// may not have come to it: until it surely has, these pages must not be taken away by those who watch them anew.
static struct {
	uint64_t start, end, until_ns;
} dropping[64];
static unsigned ndropping;
static const uint64_t DROPPING_NS = 100000000;

void uf_pieces_forked(void)
{
	ndropping = 0;
}

static void remember(uint64_t start, uint64_t end)
{
	unsigned last = ndropping - !!ndropping;
	if (ndropping && dropping[last].end == start) {
		dropping[last].end = end;
	} else if (ndropping < sizeof(dropping) / sizeof(*dropping)) {
		last = ndropping++;
		dropping[last].start = start;
		dropping[last].end = end;
	} else { // rather too much than too little
		dropping[last].start = uf_min(dropping[last].start, start);
		if (dropping[last].end < end)
			dropping[last].end = end;
	}
	dropping[last].until_ns = uf_now_ns() + DROPPING_NS;
}

static void remember_piece(struct uf_mirror *m, const struct uf_piece *p)
{
	for (uint64_t a = p->start; a < p->end; a += m->page)
		if (p->state[(a - p->start) / m->page] & UF_PAGE_DROPPED && populated(m, a))
			remember(a, a + m->page);
}

static bool is_dropping(uint64_t start, uint64_t end)
{
	bool found = false;
	for (unsigned i = 0; i < ndropping;) {
		if (uf_now_ns() > dropping[i].until_ns) {
			dropping[i] = dropping[--ndropping];
			continue;
		}
		found |= dropping[i].start < end && start < dropping[i].end;
		i++;
	}
	return found;
}

void uf_book_free(struct uf_mirror *m, struct uf_book *book)
{
	struct uffdio_range r = {(uintptr_t)book, book->length}; // whole: that cuts nothing
	if (!ioctl(m->uffd, UFFDIO_UNREGISTER, &r))
		munmap(book, book->length);
}

// The piece goes; its part of the mirror holds nothing that is still needed.
static void forget(struct uf_mirror *m, uint32_t i)
{
	struct uf_piece p = m->pieces[i];
	take_out(m, i);
	atomic_fetch_sub_explicit(&m->pages, (p.end - p.start) / m->page, memory_order_relaxed);
	struct uffdio_range r = {p.mirror, p.end - p.start};
	// Before its pages go, as events of our own would wait for us. It may need more mappings than there may be.
	if (!ioctl(m->uffd, UFFDIO_UNREGISTER, &r))
		madvise((void *)(uintptr_t)p.mirror, p.end - p.start, MADV_DONTNEED);
	else
		uf_mirror_drop(m, p.mirror, p.end - p.start);
	if (--p.book->pieces)
		return;
	if (!m->forking) {
		uf_book_free(m, p.book);
	} else { // a child looks at it
		p.book->next = m->gone;
		m->gone = p.book;
	}
}

int uf_piece_add(struct uf_mirror *m, const struct uf_piece *piece)
{
	uint32_t i = uf_piece_at(m, piece->start);
	if (i < m->npieces && m->pieces[i].start < piece->end)
		return -EEXIST;
	if (is_dropping(piece->start, piece->end))
		return -EAGAIN;
	if (m->npieces >= UF_MIRROR_PIECES / 2) // the rest is for those that the program cuts
		return -ENOMEM;
	struct uffdio_register mirror = {.range = {piece->mirror, piece->end - piece->start}, .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_register area = {.range = {piece->start, piece->end - piece->start},
				       .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP};
	if (ioctl(m->uffd, UFFDIO_REGISTER, &mirror))
		return -errno;
	if (ioctl(m->uffd, UFFDIO_REGISTER, &area)) {
		int err = -errno;
		ioctl(m->uffd, UFFDIO_UNREGISTER, &mirror.range);
		return err;
	}
	insert(m, piece);
	atomic_fetch_add_explicit(&m->pages, (piece->end - piece->start) / m->page, memory_order_relaxed);
	return 0;
}

// The program has unmapped this range, or put something else there.
void uf_pieces_lost(struct uf_mirror *m, uint64_t start, uint64_t end)
{
	split(m, start);
	split(m, end);
	for (uint32_t i = uf_piece_at(m, start); i < m->npieces && m->pieces[i].start < end;)
		forget(m, i);
	uf_mirror_wake(m, start, end - start); // the kernel leaves who waits there asleep
}

void uf_pieces_moved(struct uf_mirror *m, uint64_t from, uint64_t to, uint64_t length)
{
	split(m, from);
	split(m, from + length);
	for (uint32_t i; (i = uf_piece_at(m, from)) < m->npieces && m->pieces[i].start < from + length;) {
		struct uf_piece p = m->pieces[i];
		take_out(m, i);
		p.start += to - from;
		p.end += to - from;
		p.ending = true;
		insert(m, &p);
	}
	uf_mirror_wake(m, from, length);
}

void uf_pieces_dropped(struct uf_mirror *m, uint64_t start, uint64_t end)
{
	// Parts that are not watched any more, for they were when the program began to drop them.
	uint64_t seen = start;
	for (uint32_t i = uf_piece_at(m, start); seen < end; i++) {
		bool more = i < m->npieces && m->pieces[i].start < end;
		uint64_t next = more ? m->pieces[i].start : end;
		if (seen < next)
			remember(seen, next);
		seen = more ? m->pieces[i].end : end;
	}
	for (uint32_t i = uf_piece_at(m, start); i < m->npieces && m->pieces[i].start < end; i++) {
		struct uf_piece *p = &m->pieces[i];
		uint64_t first = start > p->start ? start : p->start, stop = uf_min(end, p->end);
		for (uint64_t a = first; a < stop;) {
			uint8_t *s = p->state + (a - p->start) / m->page;
			uint64_t n = 1;
			if (*s != UF_PAGE_AWAY) {
				*s |= UF_PAGE_DROPPED;
			} else {
				while (a + n * m->page < stop && s[n] == UF_PAGE_AWAY)
					n++;
				uf_mirror_drop(m, p->mirror + (a - p->start), n * m->page);
			}
			a += n * m->page;
		}
	}
}

static void tell(struct uf_mirror *m, struct uf_mirror_request *r, uint64_t address, uint64_t length, uint64_t what)
{
	(void)m;
	if (r->nreply && r->reply[r->nreply - 1].end == address && r->reply[r->nreply - 1].what == what)
		r->reply[r->nreply - 1].end += length;
	else
		r->reply[r->nreply++] = (struct uf_found){address, address + length, what};
}

static uint64_t told(uint8_t state)
{
	static const uint8_t what[] = {0, UF_FOUND_ACCESSED, UF_FOUND_ACCESSED | UF_FOUND_WRITTEN, UF_FOUND_BLIND};
	return what[state & UF_PAGE_STATE];
}

// Tells what happened to the pages of [r->address, end) and takes away what it tells.
static enum uf_step take_pages(struct uf_mirror *m, struct uf_mirror_request *r, struct uf_piece *p, uint64_t end)
{
	uint64_t limit = UF_MIRROR_CHUNK, cleared = 0;
	while (r->address < end) {
		uint64_t a = r->address;
		uint8_t *s = p->state + (a - p->start) / m->page;
		bool stays = *s & UF_PAGE_DROPPED && populated(m, a);
		if (*s == UF_PAGE_AWAY || !r->rearm || stays) {
			if (*s != UF_PAGE_AWAY)
				tell(m, r, a, m->page, told(*s));
			if (r->rearm && stays)
				*s = UF_PAGE_BLIND | UF_PAGE_DROPPED;
			r->address += m->page;
			continue;
		}
		uint64_t n = 1;
		while (n < limit && a + n * m->page < end && s[n] != UF_PAGE_AWAY && !(s[n] & UF_PAGE_DROPPED))
			n++;
		int err;
		uint64_t done = move(m->uffd, p->mirror + (a - p->start), a, n * m->page,
				     UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES | UFFDIO_MOVE_MODE_DONTWAKE, &err);
		if (done) {
			for (uint64_t k = 0; k < done / m->page; k++) {
				tell(m, r, a + k * m->page, m->page, told(s[k]));
				s[k] = UF_PAGE_AWAY;
			}
			r->address += done;
			limit = uf_min(limit * 2, UF_MIRROR_CHUNK);
			continue;
		}
		if (err == EAGAIN)
			return UF_STEP_AGAIN;
		if (err == EEXIST && cleared != a) {
			uf_mirror_drop(m, p->mirror + (a - p->start), m->page);
			cleared = a;
			continue;
		}
		if (err != EBUSY && err != EEXIST && n > 1) {
			limit = n / 2; // it may cross from one mapping to another
			continue;
		}
		if (err == EBUSY && !r->last) {
			tell(m, r, a, m->page, UF_FOUND_BUSY);
		} else {
			if (r->strict && err != EBUSY) {
				r->err = -(err == ENOENT || err == ENOMEM ? ENOMEM : EINVAL);
				return UF_STEP_DONE;
			}
			tell(m, r, a, m->page, told(*s));
			*s = UF_PAGE_BLIND | (*s & UF_PAGE_DROPPED);
		}
		r->address += m->page;
	}
	return UF_STEP_DONE;
}

// One chunk. DONE with spans left: the reply is full.
enum uf_step uf_pieces_take(struct uf_mirror *m, struct uf_mirror_request *r)
{
	uint64_t left = UF_MIRROR_CHUNK * m->page;
	while (r->at < r->n && !r->err) {
		uint64_t end = r->spans[r->at].end;
		if (r->address >= end) {
			if (++r->at < r->n)
				r->address = r->spans[r->at].start;
			continue;
		}
		if (r->nreply + UF_MIRROR_CHUNK + 1 > UF_MIRROR_REPLY)
			return UF_STEP_DONE;
		if (!left)
			return UF_STEP_MORE;
		uint32_t i = uf_piece_at(m, r->address);
		uint64_t known = i < m->npieces ? m->pieces[i].start : UINT64_MAX;
		if (known > r->address || m->pieces[i].ending) {
			end = uf_min(end, known > r->address ? known : m->pieces[i].end);
			tell(m, r, r->address, end - r->address, UF_FOUND_BLIND);
			r->address = end;
			continue;
		}
		end = uf_min(uf_min(end, m->pieces[i].end), r->address + left);
		left -= end - r->address;
		enum uf_step step = take_pages(m, r, &m->pieces[i], end);
		if (step != UF_STEP_DONE)
			return step;
	}
	return UF_STEP_DONE;
}

// Brings back what is away of [*address, end) of a piece. Its pages are plain then.
static enum uf_step return_pages(struct uf_mirror *m, struct uf_piece *p, uint64_t *address, uint64_t end)
{
	uint64_t limit = UF_MIRROR_CHUNK;
	while (*address < end) {
		uint64_t a = *address, n = 1, from = p->mirror + (a - p->start);
		uint8_t *s = p->state + (a - p->start) / m->page;
		if (*s != UF_PAGE_AWAY) {
			*address += m->page;
			continue;
		}
		while (n < limit && a + n * m->page < end && s[n] == UF_PAGE_AWAY)
			n++;
		int err;
		uint64_t done = move(m->uffd, a, from, n * m->page, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES, &err);
		if (!done && err == EAGAIN)
			return UF_STEP_AGAIN;
		if (!done && n > 1 && err != EBUSY && err != EEXIST) {
			limit = n / 2;
			continue;
		}
		if (!done) {
			// Shared with a child, or the program has changed the mapping's protection.
			struct uffdio_copy x = {a, from, m->page, 0, 0};
			if (populated(m, from) && ioctl(m->uffd, UFFDIO_COPY, &x) && (errno == EAGAIN || errno == ENOMEM))
				return UF_STEP_AGAIN;
			uf_mirror_wake(m, a, m->page);
			done = m->page;
		}
		memset(s, UF_PAGE_BLIND, done / m->page); // they were away, so not to be dropped
		*address += done;
	}
	return UF_STEP_DONE;
}

enum uf_step uf_pieces_return(struct uf_mirror *m, uint64_t *address, uint64_t end, bool forget_them)
{
	for (uint64_t left = UF_MIRROR_CHUNK * m->page; *address < end;) {
		uint32_t i = uf_piece_at(m, *address);
		if (i == m->npieces || m->pieces[i].start >= end) {
			*address = end;
			break;
		}
		if (!left)
			return UF_STEP_MORE;
		struct uf_piece *p = &m->pieces[i];
		if (p->start > *address)
			*address = p->start;
		uint64_t start = *address, stop = uf_min(uf_min(p->end, end), start + left);
		left -= stop - start;
		enum uf_step step = return_pages(m, p, address, stop);
		if (step != UF_STEP_DONE) {
			if (forget_them)
				*address = start; // what is back already has to be forgotten, too
			return step;
		}
		if (!forget_them)
			continue;
		split(m, start);
		split(m, stop);
		struct uffdio_range r = {start, stop - start};
		i = uf_piece_at(m, start);
		remember_piece(m, &m->pieces[i]);
		ioctl(m->uffd, UFFDIO_UNREGISTER, &r); // lifts the protection
		forget(m, i);
		uf_mirror_wake(m, start, stop - start);
	}
	return UF_STEP_DONE;
}

enum uf_step uf_pieces_ending(struct uf_mirror *m)
{
	for (uint32_t i = 0; i < m->npieces; i++)
		if (m->pieces[i].ending) {
			uint64_t address = m->pieces[i].start;
			return uf_pieces_return(m, &address, m->pieces[i].end, true);
		}
	return UF_STEP_DONE;
}

// What may hold malloc's own data: a forked child looks at that before our handler in it has run.
enum uf_step uf_pieces_return_heap(struct uf_mirror *m, struct uf_mirror_request *r)
{
	for (uint32_t i; (i = uf_piece_at(m, r->address)) < m->npieces;) {
		struct uf_piece *p = &m->pieces[i];
		if (r->address < p->start)
			r->address = p->start;
		if (!p->heap) {
			r->address = p->end;
			continue;
		}
		return uf_pieces_return(m, &r->address, p->end, false) == UF_STEP_AGAIN ? UF_STEP_AGAIN : UF_STEP_MORE;
	}
	return UF_STEP_DONE;
}
