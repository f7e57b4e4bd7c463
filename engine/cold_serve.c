// SPDX-License-Identifier: Apache-2.0
// The thread of cold.h: it serves faults, and evicts.
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cold_internal.h"

static bool messages(struct uf_cold *c);

static uint8_t *state_of(struct uf_cold *c, uint64_t address)
{
	return address >= c->start && address < c->end ? &c->state[(address - c->start) / c->page] : NULL;
}

static int protect(struct uf_cold *c, uint64_t address, uint64_t length, uint64_t mode)
{
	struct uffdio_rwprotect x = {{address, length}, mode};
	return ioctl(c->uffd, UFFDIO_RWPROTECT, &x) ? errno : 0;
}

static void wake(struct uf_cold *c, uint64_t address, uint64_t length)
{
	struct uffdio_range r = {address, length};
	ioctl(c->uffd, UFFDIO_WAKE, &r);
}

static bool again(int err)
{
	return err == EAGAIN || err == ENOMEM;
}

static void pause_shortly(void)
{
	poll(NULL, 0, 1);
}

// The staging area takes part in moves only while it is registered; while it is not, its pages can be dropped without an event.
// Not for RWP: what is moved there would come protected, and our own write would wait for us.
int uf_cold_staging(struct uf_cold *c, bool on)
{
	struct uffdio_register r = {.range = {(uintptr_t)c->staging, UF_COLD_CHUNK * c->page}, .mode = UFFDIO_REGISTER_MODE_WP};
	return ioctl(c->uffd, on ? UFFDIO_REGISTER : UFFDIO_UNREGISTER, on ? (void *)&r : (void *)&r.range) ? -errno : 0;
}

static void empty_staging(struct uf_cold *c)
{
	if (uf_cold_staging(c, false))
		return; // to drop it would wait for ourselves
	madvise(c->staging, UF_COLD_CHUNK * c->page, MADV_DONTNEED);
	uf_cold_staging(c, true);
}

// From the store to `address`, which may be another than the page's own after mremap.
static int load(struct uf_cold *c, uint64_t index, uint64_t address)
{
	for (uint64_t n = 0; n < c->page;) {
		ssize_t got = pread(c->store, (char *)c->buffer + n, c->page - n, (off_t)(c->offset + index * c->page + n));
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0) {
			uf_log("the store of cold pages cannot be read at byte %llu (%s): access to it in memory raises SIGBUS.",
			       (unsigned long long)(c->offset + index * c->page), got ? strerrordesc_np(errno) : "it ends there");
			struct uffdio_poison x = {{address, c->page}, 0, 0};
			return ioctl(c->uffd, UFFDIO_POISON, &x) ? errno : EIO;
		}
		n += (uint64_t)got;
	}
	struct uffdio_copy x = {address, (uintptr_t)c->buffer, c->page, 0, 0};
	return ioctl(c->uffd, UFFDIO_COPY, &x) ? errno : 0;
}

static int put_back(struct uf_cold *c, uint64_t address)
{
	struct uffdio_move x = {address, (uintptr_t)c->staging + (address - c->chunk), c->page, UFFDIO_MOVE_MODE_DONTWAKE, 0};
	int err = ioctl(c->uffd, UFFDIO_MOVE, &x) ? errno : 0;
	if (err && err != EEXIST)
		return err;
	*state_of(c, address) = UF_COLD_HERE;
	protect(c, address, c->page, 0); // what is moved there comes protected
	wake(c, address, c->page);
	return 0;
}

// The program moved something there that is not loaded yet.
static bool is_arriving(const struct uf_cold *c, uint64_t address)
{
	for (unsigned i = 0; i < c->nleaving; i++)
		if (address - c->leaving[i].to < c->leaving[i].length)
			return true;
	return false;
}

// False: later.
static bool serve(struct uf_cold *c, const struct uffd_msg *fault)
{
	uint64_t address = fault->arg.pagefault.address & ~(c->page - 1);
	uint8_t *s = state_of(c, address);
	int err;
	if (fault->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_RWP) {
		err = protect(c, address, c->page, 0);
		c->stats.kept += !err && c->sync;
	} else if (s && *s == UF_COLD_TAKEN) {
		err = put_back(c, address);
		c->stats.kept += !err;
	} else if (s && *s == UF_COLD_OUT) {
		err = load(c, (address - c->start) / c->page, address);
		if (!err) {
			*s = UF_COLD_HERE;
			c->stats.out--;
			c->stats.loaded++;
		}
	} else if (c->nleaving && (!s || is_arriving(c, address))) {
		err = EAGAIN; // it may be on its way there
	} else {
		struct uffdio_zeropage x = {{address, c->page}, 0, 0};
		err = ioctl(c->uffd, UFFDIO_ZEROPAGE, &x) ? errno : 0;
		if (!err && s && *s == UF_COLD_DROPPED)
			*s = UF_COLD_HERE;
	}
	if (again(err))
		return false;
	if (err)
		wake(c, address, c->page);
	return true;
}

// The bytes of [start, end) are not wanted any more.
static void dropped(struct uf_cold *c, uint64_t start, uint64_t end, bool removed)
{
	for (uint64_t a = start > c->start ? start : c->start; a < uf_min(end, c->end); a += c->page) {
		uint8_t *s = state_of(c, a);
		c->stats.out -= *s == UF_COLD_OUT;
		if (*s != UF_COLD_LEAVING) // of a removal we are told before it is done
			*s = removed && *s != UF_COLD_OUT && *s != UF_COLD_TAKEN ? UF_COLD_DROPPED : UF_COLD_HERE;
	}
}

static void moved(struct uf_cold *c, uint64_t from, uint64_t to, uint64_t length)
{
	for (unsigned i = 0; i < c->nleaving; i++)
		if (c->leaving[i].to >= from && c->leaving[i].to < from + length)
			c->leaving[i].to += to - from;
	uint64_t first = from > c->start ? from : c->start, stop = uf_min(from + length, c->end);
	if (from <= c->start && c->end <= from + length) {
		c->start += to - from;
		c->end += to - from;
		c->chunk += to - from;
	} else if (first < stop) {
		for (uint64_t a = first; a < stop; a += c->page) {
			uint8_t *s = state_of(c, a);
			if (*s == UF_COLD_OUT || *s == UF_COLD_TAKEN) {
				c->stats.out -= *s == UF_COLD_OUT;
				*s = UF_COLD_LEAVING; // what is taken was written to the store before events are read
			}
		}
		if (c->nleaving == sizeof(c->leaving) / sizeof(*c->leaving)) {
			uf_log("evicted memory is moved by mremap faster than it can be loaded.");
			abort(); // bytes would be lost
		}
		unsigned i = c->nleaving++;
		c->leaving[i].from = first;
		c->leaving[i].to = first + (to - from);
		c->leaving[i].length = stop - first;
	}
	wake(c, from, length);
}

// Loads one chunk of what the program has moved. False: nothing is left, or an event must be read first.
static bool load_leaving(struct uf_cold *c)
{
	if (!c->nleaving)
		return false;
	unsigned i = c->nleaving - 1;
	for (uint64_t at = 0; at < c->leaving[i].length; at += c->page) {
		uint8_t *s = state_of(c, c->leaving[i].from + at);
		if (s && *s == UF_COLD_LEAVING) {
			if (again(load(c, (c->leaving[i].from + at - c->start) / c->page, c->leaving[i].to + at)))
				return false;
			*s = UF_COLD_HERE;
		}
	}
	c->nleaving = i;
	return true;
}

static bool messages(struct uf_cold *c)
{
	struct uffd_msg batch[16];
	ssize_t n = read(c->uffd, batch, sizeof(batch));
	for (unsigned i = 0; n > 0 && i < (size_t)n / sizeof(*batch); i++) {
		const struct uffd_msg *m = &batch[i];
		if (m->event == UFFD_EVENT_PAGEFAULT) {
			if (serve(c, m))
				continue;
			if (c->ndeferred < UF_COLD_DEFERRED)
				c->deferred[c->ndeferred++] = *m;
			else
				wake(c, m->arg.pagefault.address & ~(c->page - 1), c->page);
		} else if (m->event == UFFD_EVENT_REMAP) {
			moved(c, m->arg.remap.from, m->arg.remap.to, m->arg.remap.len);
		} else {
			dropped(c, m->arg.remove.start, m->arg.remove.end, m->event == UFFD_EVENT_REMOVE);
			wake(c, m->arg.remove.start, m->arg.remove.end - m->arg.remove.start);
		}
	}
	for (unsigned i = 0, left = c->ndeferred; left && i < c->ndeferred; left--) {
		if (serve(c, &c->deferred[i]))
			c->deferred[i] = c->deferred[--c->ndeferred];
		else
			i++;
	}
	return n > 0;
}

static void set_sync(struct uf_cold *c, bool sync)
{
	if (c->sync == sync)
		return;
	struct uffdio_set_mode m = {sync ? 0 : UFFD_FEATURE_RWP_ASYNC, sync ? UFFD_FEATURE_RWP_ASYNC : 0};
	if (!ioctl(c->uffd, UFFDIO_SET_MODE, &m))
		c->sync = sync;
}

// Moves those pages of the chunk to the staging area that are protected: in synchronous mode none of them has been accessed.
static bool take(struct uf_cold *c, uint64_t start, uint64_t n)
{
	uint64_t entries[UF_COLD_CHUNK];
	bool any = false;
	if (pread(c->pagemap, entries, n * 8, (off_t)(start / c->page * 8)) != (ssize_t)(n * 8))
		return false;
	for (uint64_t i = 0; i < n;) {
		uint64_t address = start + i * c->page, k = 0;
		uint8_t *s = state_of(c, address);
		if (!s) // it was moved meanwhile
			break;
		while (i + k < n && address + k * c->page < c->end && s[k] == UF_COLD_HERE && entries[i + k] >> 62 &&
		       entries[i + k] >> 57 & 1)
			k++;
		if (!k) {
			i++;
			continue;
		}
		struct uffdio_move x = {(uintptr_t)c->staging + i * c->page, address, k * c->page, UFFDIO_MOVE_MODE_DONTWAKE, 0};
		int err = ioctl(c->uffd, UFFDIO_MOVE, &x) ? errno : 0;
		uint64_t done = err ? (x.move > 0 ? (uint64_t)x.move / c->page : 0) : k;
		memset(s, UF_COLD_TAKEN, done);
		any |= done;
		// What it stopped at is pinned, shared with a child, or of another mapping; or an event has to be read: left alone.
		i += done ? done : 1;
	}
	return any;
}

static int write_out(struct uf_cold *c, uint64_t start, uint64_t n)
{
	uint64_t length = n * c->page, offset = c->offset + (start - c->start);
	const char *from = c->staging + (start - c->chunk);
	for (uint64_t done = 0; done < length;) {
		ssize_t wrote = pwrite(c->store, from + done, length - done, (off_t)(offset + done));
		if (wrote < 0 && errno == EINTR)
			continue;
		if (wrote <= 0)
			return wrote ? -errno : -EIO;
		done += (uint64_t)wrote;
	}
	return 0;
}

// Brings a page back from the staging area to where it belongs, wherever the program moves it meanwhile.
static void keep(struct uf_cold *c, uint64_t index)
{
	uint8_t *s = &c->state[index];
	const uint64_t staged = (uintptr_t)c->staging + (c->start + index * c->page - c->chunk);
	for (int err = EAGAIN; *s == UF_COLD_TAKEN || *s == UF_COLD_LEAVING;) {
		uint64_t address = c->start + index * c->page;
		if (*s == UF_COLD_TAKEN) {
			err = put_back(c, address);
		} else {
			for (unsigned i = 0; i < c->nleaving; i++)
				if (address - c->leaving[i].from < c->leaving[i].length) {
					struct uffdio_copy x = {c->leaving[i].to + (address - c->leaving[i].from), staged, c->page, 0, 0};
					err = ioctl(c->uffd, UFFDIO_COPY, &x) ? errno : 0;
				}
		}
		if (!again(err))
			break;
		messages(c);
		pause_shortly();
	}
	*s = UF_COLD_HERE;
}

static void evict(struct uf_cold *c)
{
	uint64_t start = c->at, n = uf_min((c->until - start) / c->page, UF_COLD_CHUNK);
	c->at += n * c->page;
	set_sync(c, true);
	if (!c->sync) {
		c->err = -ENOSYS;
		return;
	}
	c->chunk = start;
	if (!take(c, start, n))
		return;
	// By number from here on: events may move the memory.
	const uint64_t first = (start - c->start) / c->page;
	n = uf_min(n, (c->end - start) / c->page);
	uint8_t *s = &c->state[first];
	bool taken[UF_COLD_CHUNK];
	for (uint64_t i = 0; i < n; i++)
		taken[i] = s[i] == UF_COLD_TAKEN;
	for (uint64_t i = 0, k; i < n && !c->err; i += k) {
		for (k = 0; i + k < n && taken[i + k]; k++)
			;
		if (k)
			c->err = write_out(c, start + i * c->page, k);
		k += !k;
	}
	if (!c->err)
		messages(c); // who waited meanwhile gets the page back
	for (uint64_t i = 0; i < n; i++) {
		if (c->err && taken[i])
			keep(c, first + i); // it is not known what of it was written
		if (s[i] != UF_COLD_TAKEN)
			continue;
		uint64_t address = c->start + (first + i) * c->page;
		s[i] = UF_COLD_OUT;
		c->stats.out++;
		c->stats.evicted++;
		if (c->nreply && c->reply[c->nreply - 1].end == address)
			c->reply[c->nreply - 1].end += c->page;
		else
			c->reply[c->nreply++] = (struct uf_span){address, address + c->page};
	}
	empty_staging(c);
}

static void finish(struct uf_cold *c)
{
	set_sync(c, false);
	while (c->nleaving)
		if (!load_leaving(c)) {
			messages(c);
			pause_shortly();
		}
	for (uint64_t i = 0; i < (c->end - c->start) / c->page; i++) {
		int err = 0;
		while (c->state[i] == UF_COLD_OUT && ((err = load(c, i, c->start + i * c->page)) == EAGAIN || err == ENOMEM)) {
			messages(c);
			pause_shortly();
		}
		if (err == EIO)
			c->err = -EIO;
		c->state[i] = UF_COLD_HERE;
	}
	struct uffdio_range area = {c->start, c->end - c->start};
	ioctl(c->uffd, UFFDIO_UNREGISTER, &area);
	uf_cold_staging(c, false);
	wake(c, c->start, c->end - c->start);
}

static bool request(struct uf_cold *c)
{
	switch (c->op) {
	case UF_COLD_DETECT:
		c->err = -protect(c, c->start, c->end - c->start, UFFDIO_RWPROTECT_MODE_RWP);
		return c->err != -EAGAIN;
	case UF_COLD_EVICT:
		evict(c);
		break;
	case UF_COLD_EVICTED:
		set_sync(c, false);
		break;
	case UF_COLD_LOOK:
		break;
	case UF_COLD_CLOSE:
		finish(c);
		break;
	}
	return true;
}

void *uf_cold_thread(void *arg)
{
	struct uf_cold *c = arg;
	uf_thread_name("userfault-cold");
	for (;;) {
		bool busy = messages(c) | load_leaving(c), waiting = c->ndeferred || c->nleaving;
		uint32_t posted = atomic_load_explicit(&c->posted, memory_order_acquire);
		if (posted != atomic_load_explicit(&c->finished, memory_order_relaxed)) {
			if (request(c)) {
				bool last = c->op == UF_COLD_CLOSE;
				atomic_store_explicit(&c->finished, posted, memory_order_release);
				uf_futex_wake(&c->finished, 1);
				if (last)
					return NULL;
			} else {
				waiting = true;
			}
		}
		if (busy)
			continue;
		struct pollfd f[] = {{c->uffd, POLLIN, 0}, {c->bell, POLLIN, 0}};
		struct timespec soon = {0, 50000};
		if (ppoll(f, 2, waiting ? &soon : NULL, NULL) > 0 && f[1].revents)
			uf_bell_drain(c->bell);
	}
}
