// SPDX-License-Identifier: Apache-2.0
// Fork while memory is watched: the child's memory is plain, with all its bytes, before fork returns there. The parent goes on.
//
// Mirrors are inherited. The kernel copies a page table while it locks the mapping, and COPY and MOVE need both mappings: so
// in the child a page is in the area, or in the mirror, or in both (a copy of which the mirror's part was not dropped yet).
// The handler of the parent serves faults all the while: the forking thread may need pages itself. Before our handler in
// the child runs, the C library looks at its own data there; what may lie beside that was brought back (blind).
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mirror_internal.h"

// No descriptor is free, or no memory: the child must not go on with zeros.
_Noreturn static void give_up(const char *what)
{
	uf_log("a forked child ends: its tracked memory cannot be brought back (%s: %s).", what, strerrordesc_np(errno));
	_exit(127);
}

enum { BATCH = 512, WHOLE = 64, MOST_MAPPINGS = 4096 };

static void prepare(void)
{
	uf_mirror_lock();
	struct uf_mirror *m = uf_mirror_running;
	if (!m)
		return;
	m->request.op = UF_MIRROR_FORK;
	m->request.address = 0;
	uf_mirror_ask(m);
}

static void parent(void)
{
	struct uf_mirror *m = uf_mirror_running;
	if (m) {
		m->request.op = UF_MIRROR_FORKED;
		uf_mirror_ask(m);
	}
	uf_mirror_unlock();
}

static uint64_t entries(int pagemap, uint64_t page, uint64_t address, uint64_t n, uint64_t *ret)
{
	ssize_t got = pread(pagemap, ret, n * sizeof(*ret), (off_t)(address / page * sizeof(*ret)));
	return got < 0 ? 0 : (uint64_t)got / sizeof(*ret);
}

// Whole pages: what a sanitizer forbids of them is copied, too.
__attribute__((no_sanitize_address, no_sanitize_thread)) static void copy_bytes(volatile uint64_t *to, const uint64_t *from,
										 size_t length)
{
	for (size_t i = 0; i < length / sizeof(*to); i++)
		to[i] = from[i];
}

// Into pages that are there. Not into a file or shared memory: it was mapped there meanwhile (see the log below).
static void copy_pages(struct uf_mirror *m, uint64_t address, uint64_t mirror, uint64_t n, int pagemap)
{
	uint64_t now[WHOLE];
	for (uint64_t k = 0; k < n; k += WHOLE) {
		uint64_t count = uf_min(WHOLE, n - k);
		if (entries(pagemap, m->page, address + k * m->page, count, now) != count)
			give_up("pagemap");
		for (uint64_t i = 0; i < count; i++)
			if (!(now[i] >> 61 & 1))
				copy_bytes((void *)(uintptr_t)(address + (k + i) * m->page),
					   (const void *)(uintptr_t)(mirror + (k + i) * m->page), m->page);
	}
}

// Pages [address, address + n pages) from the mirror. Many at once keep their place in memory, shared with the parent.
static void restore(struct uf_mirror *m, uint64_t address, uint64_t mirror, uint64_t n, int pagemap, unsigned *mappings)
{
	size_t length = n * m->page;
	void *to = (void *)(uintptr_t)address, *from = (void *)(uintptr_t)mirror;
	if (n >= WHOLE && *mappings < MOST_MAPPINGS &&
	    mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED) {
		++*mappings;
		return;
	}
	if (!madvise(to, length, MADV_POPULATE_WRITE)) {
		copy_pages(m, address, mirror, n, pagemap);
		return;
	}
	if (n > 1) { // a part of it cannot be written to
		for (uint64_t i = 0; i < n; i++)
			restore(m, address + i * m->page, mirror + i * m->page, 1, pagemap, mappings);
		return;
	}
	if (errno == ENOMEM) // it was not inherited (MADV_DONTFORK)
		return;
	// The program has forbidden to write there. (It keeps that; where this way is closed it becomes writable.)
	int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	ssize_t done = mem < 0 ? -1 : pwrite(mem, from, length, (off_t)address);
	if (mem >= 0)
		close(mem);
	if (done != (ssize_t)length && mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED)
		give_up("writing");
}

__attribute__((noinline)) static void restore_pages(struct uf_mirror *m, uint64_t start, uint64_t end, uint64_t mirror, int pagemap,
						    unsigned *mappings)
{
	uint64_t there[BATCH], here[BATCH], n = (end - start) / m->page, first = 0, run = 0;
	for (uint64_t k = 0; k < n; k += BATCH) {
		uint64_t count = uf_min(BATCH, n - k);
		if (entries(pagemap, m->page, mirror + k * m->page, count, there) != count ||
		    entries(pagemap, m->page, start + k * m->page, count, here) != count)
			give_up("pagemap");
		for (uint64_t i = 0; i < count; i++) {
			bool away = there[i] >> 62 && !(here[i] >> 62);
			if (away && !run++)
				first = k + i;
			if (!away && run) {
				restore(m, start + first * m->page, mirror + first * m->page, run, pagemap, mappings);
				run = 0;
			}
		}
	}
	if (run)
		restore(m, start + first * m->page, mirror + first * m->page, run, pagemap, mappings);
}

// What other threads did to the memory between our handler before the fork and the fork itself is in the log. But the kernel lets a thread go on
// when its event is read, and noting it takes some microseconds more: if the fork falls between the two, the child knows nothing of it, and has
// what was there before. Nothing can be held back instead: the forking thread may need pages, which are not served while events are unread.
static void restore_part(struct uf_mirror *m, uint64_t start, uint64_t end, uint64_t mirror, uint32_t at, int pagemap,
			 unsigned *mappings)
{
	for (uint32_t n = (uint32_t)uf_min(atomic_load(&m->nlog), UF_MIRROR_LOG); at < n; at++) {
		const struct uffd_msg *e = &m->log[at];
		bool moved = e->event == UFFD_EVENT_REMAP;
		uint64_t from = moved ? e->arg.remap.from : e->arg.remove.start;
		uint64_t to = moved ? from + e->arg.remap.len : e->arg.remove.end;
		if (from >= end || to <= start)
			continue;
		if (start < from)
			restore_part(m, start, from, mirror, at + 1, pagemap, mappings);
		if (to < end)
			restore_part(m, to, end, mirror + (to - start), at + 1, pagemap, mappings);
		if (!moved)
			return;
		uint64_t first = from > start ? from : start;
		mirror += first - start;
		end = uf_min(to, end) + (e->arg.remap.to - from);
		start = first + (e->arg.remap.to - from);
	}
	restore_pages(m, start, end, mirror, pagemap, mappings);
}

static void child(void)
{
	struct uf_mirror *m = uf_mirror_running;
	uf_mirror_lock_forked();
	uf_pieces_forked();
	if (!m)
		return;
	uf_mirror_running = NULL;
	unsigned mappings = 0;
	close(m->bell); // the program may have used up all descriptors: makes room for one
	close(m->trash_uffd);
	m->bell = m->trash_uffd = -1;
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		give_up("pagemap");
	const struct uf_piece *p = m->inherited, *last = p + m->ninherited;
	for (; p < last; p++)
		restore_part(m, p->start, p->end, p->mirror, 0, pagemap, &mappings);
	close(pagemap);
	for (p = m->inherited; p < last; p++)
		p->book->pieces = 0; // the parent's handler may have been counting
	for (p = m->inherited; p < last; p++)
		p->book->pieces++;
	for (p = m->inherited; p < last; p++) {
		struct uf_book *book = p->book;
		if (!--book->pieces)
			munmap(book, book->length);
	}
	uf_mirror_unmap(m);
}

static void install(void)
{
	pthread_atfork(prepare, parent, child);
}

void uf_mirror_fork_handlers(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, install);
}
