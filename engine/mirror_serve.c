// SPDX-License-Identifier: Apache-2.0
// The mirror's thread: faults, events, requests.
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mirror_internal.h"

static int copy(struct uf_mirror *m, uint64_t dst, uint64_t src, uint64_t mode)
{
	struct uffdio_copy x = {dst, src, m->page, mode, 0};
	return ioctl(m->uffd, UFFDIO_COPY, &x) ? errno : 0;
}

static int unprotect(struct uf_mirror *m, uint64_t address)
{
	struct uffdio_writeprotect x = {{address, m->page}, 0};
	return ioctl(m->uffd, UFFDIO_WRITEPROTECT, &x) ? errno : 0;
}

// Registered, but of no piece: the program has made a mapping larger, or emptied it by mremap.
static int serve_unknown(struct uf_mirror *m, uint64_t address, bool protection)
{
	if (protection)
		return unprotect(m, address);
	struct uffdio_zeropage x = {{address, m->page}, 0, 0};
	return ioctl(m->uffd, UFFDIO_ZEROPAGE, &x) ? errno : 0;
}

// The page is not in the mirror. Mostly a second message for one that has come back; else the program has dropped it, and reads
// zeros.
static int serve_again(struct uf_mirror *m, uint64_t address, uint8_t *s, bool write)
{
	uint8_t now = *s & UF_PAGE_STATE;
	int err = copy(m, address, (uintptr_t)m->zero, now == UF_PAGE_READ && !write ? UFFDIO_COPY_MODE_WP : 0);
	if (!err)
		*s = now == UF_PAGE_READ && write ? UF_PAGE_WRITTEN : now;
	return err;
}

static int serve_away(struct uf_mirror *m, uint64_t address, uint64_t mirror, uint8_t *s, bool write)
{
	if (write) {
		struct uffdio_move x = {address, mirror, m->page, 0, 0};
		int err = ioctl(m->uffd, UFFDIO_MOVE, &x) ? errno : 0;
		if (!err) {
			*s = UF_PAGE_WRITTEN;
			m->writes++;
			return 0;
		}
		if (err == EAGAIN)
			return err;
		// A hole, or shared with a child: copied as for a read.
	}
	int err = copy(m, address, mirror, write ? 0 : UFFDIO_COPY_MODE_WP);
	if (err)
		return err;
	*s = write ? UF_PAGE_WRITTEN : UF_PAGE_READ;
	*(write ? &m->writes : &m->reads) += 1;
	uf_mirror_drop(m, mirror, m->page); // the child of a fork takes what is in the area, if both are there
	return 0;
}

// False: later, an event must be read first.
static bool serve(struct uf_mirror *m, const struct uffd_msg *fault)
{
	uint64_t address = fault->arg.pagefault.address & ~(m->page - 1);
	bool write = fault->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE;
	bool protection = fault->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP;
	uint32_t i = uf_piece_at(m, address);
	int err;
	if (i == m->npieces || m->pieces[i].start > address) {
		err = serve_unknown(m, address, protection);
	} else {
		const struct uf_piece *p = &m->pieces[i];
		uint8_t *s = p->state + (address - p->start) / m->page;
		if (!protection && *s == UF_PAGE_AWAY) {
			err = serve_away(m, address, p->mirror + (address - p->start), s, write);
		} else if (!protection) {
			err = serve_again(m, address, s, write);
		} else if (*s == UF_PAGE_AWAY) {
			err = EEXIST; // it was taken away while the message was on its way: woken, the thread asks again
		} else {
			err = unprotect(m, address);
			if (!err && (*s & UF_PAGE_STATE) == UF_PAGE_READ) {
				*s = UF_PAGE_WRITTEN | (*s & UF_PAGE_DROPPED);
				m->upgrades++;
			}
		}
	}
	if (err == EAGAIN || err == ENOMEM)
		return false;
	// There already, or unmapped meanwhile: who waits asks again, or gets the signal that it would have got.
	if (err)
		uf_mirror_wake(m, address, m->page);
	return true;
}

static void happened(struct uf_mirror *m, const struct uffd_msg *event)
{
	if (m->forking) { // a child has to know it, before it is done
		uint32_t n = atomic_load_explicit(&m->nlog, memory_order_relaxed);
		if (n < UF_MIRROR_LOG)
			m->log[n] = *event;
		atomic_store_explicit(&m->nlog, n + 1, memory_order_release);
	}
	if (event->event == UFFD_EVENT_REMOVE)
		uf_pieces_dropped(m, event->arg.remove.start, event->arg.remove.end);
	else if (event->event == UFFD_EVENT_UNMAP)
		uf_pieces_lost(m, event->arg.remove.start, event->arg.remove.end);
	else if (event->event == UFFD_EVENT_REMAP)
		uf_pieces_moved(m, event->arg.remap.from, event->arg.remap.to, event->arg.remap.len);
}

static void fault(struct uf_mirror *m, const struct uffd_msg *message)
{
	if (serve(m, message))
		return;
	if (m->ndeferred < UF_MIRROR_DEFERRED)
		m->deferred[m->ndeferred++] = *message;
	else
		uf_mirror_wake(m, message->arg.pagefault.address & ~(m->page - 1), m->page); // it asks again
}

// Reads until nothing is left. What the kernel refused until its events are read is tried again.
static bool messages(struct uf_mirror *m)
{
	struct uffd_msg batch[32];
	ssize_t n;
	bool any = false;
	while ((n = read(m->uffd, batch, sizeof(batch))) > 0) {
		any = true;
		for (unsigned i = 0; i < (size_t)n / sizeof(*batch); i++) {
			if (batch[i].event == UFFD_EVENT_PAGEFAULT)
				fault(m, &batch[i]);
			else
				happened(m, &batch[i]);
		}
		if ((size_t)n < sizeof(batch))
			break;
	}
	for (unsigned i = 0, left = m->ndeferred; left; left--) {
		if (serve(m, &m->deferred[i]))
			m->deferred[i] = m->deferred[--m->ndeferred];
		else
			i++;
	}
	return any;
}

// No thread waits for its event to be read: then the kernel looks at the arguments, which are none.
static bool settled(struct uf_mirror *m)
{
	struct uffdio_zeropage none = {0};
	return !ioctl(m->uffd, UFFDIO_ZEROPAGE, &none) || errno != EAGAIN;
}

static enum uf_step request(struct uf_mirror *m)
{
	struct uf_mirror_request *r = &m->request;
	enum uf_step step = UF_STEP_DONE;
	switch (r->op) {
	case UF_MIRROR_ADD:
		r->err = uf_piece_add(m, &r->piece);
		break;
	case UF_MIRROR_TAKE:
		step = uf_pieces_take(m, r);
		break;
	case UF_MIRROR_END:
		while (step == UF_STEP_DONE && r->at < r->n) {
			step = uf_pieces_return(m, &r->address, r->spans[r->at].end, true);
			if (step == UF_STEP_DONE && ++r->at < r->n)
				r->address = r->spans[r->at].start;
		}
		break;
	case UF_MIRROR_FORK:
		step = m->nending ? UF_STEP_MORE : uf_pieces_return_heap(m, r);
		if (step != UF_STEP_DONE)
			break;
		memcpy(m->inherited, m->pieces, m->npieces * sizeof(*m->pieces));
		m->ninherited = m->npieces;
		atomic_store_explicit(&m->nlog, 0, memory_order_relaxed);
		m->forking = true;
		break;
	case UF_MIRROR_FORKED:
		m->forking = false;
		while (m->gone) {
			struct uf_book *book = m->gone;
			m->gone = book->next;
			uf_book_free(m, book);
		}
		break;
	case UF_MIRROR_LOOK:
		break;
	case UF_MIRROR_STOP:
		// Closing the descriptor would let threads go on whose events were not read: not before we know of what they drop.
		step = settled(m) ? UF_STEP_DONE : UF_STEP_AGAIN;
		break;
	}
	return step;
}

void *uf_mirror_thread(void *arg)
{
	struct uf_mirror *m = arg;
	uf_thread_name("userfault-track");
	for (;;) {
		bool busy = messages(m);
		enum uf_step ending = m->nending && !m->forking ? uf_pieces_ending(m) : UF_STEP_DONE, step = UF_STEP_DONE;
		uint32_t posted = atomic_load_explicit(&m->posted, memory_order_acquire);
		if (posted != atomic_load_explicit(&m->finished, memory_order_relaxed)) {
			step = request(m);
			if (step == UF_STEP_DONE) {
				bool stop = m->request.op == UF_MIRROR_STOP;
				atomic_store_explicit(&m->finished, posted, memory_order_release);
				uf_futex_wake(&m->finished, 1);
				if (stop)
					return NULL;
			}
		}
		if (step == UF_STEP_MORE || ending != UF_STEP_DONE || busy)
			continue;
		// With work that waits for an event, or for memory: look again soon.
		bool waiting = step == UF_STEP_AGAIN || m->ndeferred;
		struct pollfd f[] = {{m->uffd, POLLIN, 0}, {m->bell, POLLIN, 0}};
		struct timespec soon = {0, 50000};
		if (ppoll(f, 2, waiting ? &soon : NULL, NULL) > 0 && f[1].revents)
			uf_bell_drain(m->bell);
	}
}
