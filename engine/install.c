// SPDX-License-Identifier: Apache-2.0
// Pages into place: UFFDIO_COPY of runs of blocks, or a huge page that is filled aside and moved in (engine notes §7).
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "internal.h"

int uf_staging_init(struct uf_staging *st)
{
	char *area = mmap(NULL, 2 * UF_EXTENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		return -errno;
	// Aligned, so that it is one huge page and moves as one.
	char *aligned = (char *)(((uintptr_t)area + UF_EXTENT - 1) & ~(uintptr_t)(UF_EXTENT - 1));
	if (aligned > area)
		munmap(area, (size_t)(aligned - area));
	munmap(aligned + UF_EXTENT, (size_t)(area + UF_EXTENT - aligned));
	st->area = aligned;
	st->packed = mmap(NULL, UF_EXTENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (st->packed == MAP_FAILED) {
		int err = -errno;
		munmap(aligned, UF_EXTENT);
		st->area = st->packed = NULL;
		return err;
	}
	madvise(st->packed, UF_EXTENT, MADV_DONTFORK);
	st->huge = uf_host_probe()->thp && !madvise(aligned, UF_EXTENT, MADV_HUGEPAGE);
	// MOVE refuses pages that a fork shares (EBUSY). The child makes a staging area of its own.
	madvise(aligned, UF_EXTENT, MADV_DONTFORK);
	return 0;
}

void uf_staging_deinit(struct uf_staging *st)
{
	if (st->area) {
		munmap(st->area, UF_EXTENT);
		munmap(st->packed, UF_EXTENT);
	}
	st->area = st->packed = NULL;
}

// UFFDIO_COPY of a run, with every outcome of kernel.md §2.5. 0, or a negative errno that is the end for this run.
//
// `*woken`: one call did it all, and woke the run's waiters itself; that saves a system call per fault. It comes before the
// new state is stored, so a fault that meets LOADING afterwards (a write, or foreign code dropped the page at once) would
// be lost. Therefore whoever drops a fault on LOADING leaves UF_WORD_DROPPED, and the owner then wakes as the rule says.
int uf_copy_run(struct uf_memory *m, char *dst, const char *src, size_t len, bool protect, bool *woken)
{
	*woken = false;
	size_t page = m->pager->page, done = 0, step = len;
	unsigned stalls = 0;
	while (done < len) {
		// What has arrived writable may be written to already: then there is no way back.
		bool given = done && m->store && !protect;
		struct uffdio_copy c = {
			.dst = (uintptr_t)dst + done,
			.src = (uintptr_t)src + done,
			.len = uf_min(step, len - done),
			.mode = protect && m->wp ? UFFDIO_COPY_MODE_WP : 0,
		};
		if (!ioctl(m->uffd, UFFDIO_COPY, &c)) {
			*woken = c.len == len;
			done += c.len;
			continue;
		}
		if (c.copy > 0) { // partial: the second call tells the true error
			done += (size_t)c.copy;
			stalls = 0;
			continue;
		}
		switch (errno) {
		case EEXIST: // that page is there (a foreign call put it back, or an earlier attempt): not ours to replace
			done += page;
			break;
		case EAGAIN: // the address space is changing, or a lock race: no event of ours to read, it passes by itself
			if (++stalls > 10000 && !given)
				return -EAGAIN;
			sched_yield();
			break;
		case ENOENT: // the mapping is gone, or the run crosses a border that foreign code made: page by page
			if (atomic_load_explicit(&m->closed, memory_order_acquire))
				return -ENOENT;
			if (step > page)
				step = page;
			else
				done += page;
			break;
		case ENOMEM:
			if (++stalls > 100 && !given)
				return -ENOMEM;
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
			break;
		case EINTR:
			break;
		default:
			return -errno;
		}
	}
	return 0;
}

// Moves two MiB, whole if it is a huge page. Returns how many bytes went; the rest is where it was.
static size_t move_extent(struct uf_memory *m, char *dst, char *src)
{
	size_t done = 0;
	unsigned stalls = 0;
	while (done < UF_EXTENT) {
		struct uffdio_move v = {
			.dst = (uintptr_t)dst + done,
			.src = (uintptr_t)src + done,
			.len = UF_EXTENT - done,
			.mode = UFFDIO_MOVE_MODE_DONTWAKE,
		};
		if (!ioctl(m->uffd, UFFDIO_MOVE, &v))
			done = UF_EXTENT;
		else if (v.move > 0)
			done += (size_t)v.move;
		else if (errno != EAGAIN || ++stalls > 1000)
			break;
		else
			sched_yield();
	}
	return done;
}

// Blocks that are being made dirty arrive writable, the others write-protected.
static int copy_blocks(struct uf_memory *m, uint64_t first, uint64_t count, const char *src, bool *woken)
{
	int err = 0;
	uint64_t n;
	// Those last: their writers go on at once, so nothing may fail after that.
	for (uint64_t at = 0, pass = 0; pass < 2 && !err; at = at + n < count ? at + n : (pass++, 0)) {
		bool dirty = uf_is_dirty(m, first + at);
		for (n = 1; at + n < count && uf_is_dirty(m, first + at + n) == dirty; n++)
			;
		if (dirty != pass)
			continue;
		err = uf_copy_run(m, uf_block_address(m, first + at), src + (at << m->shift), n << m->shift, !dirty, woken);
		*woken &= n == count;
	}
	return err;
}

static bool is_extent(const struct uf_memory *m, uint64_t first, uint64_t count)
{
	return m->extents && count << m->shift == UF_EXTENT && ((first << m->shift) & (UF_EXTENT - 1)) == 0;
}

// Puts `count` LOADING blocks in place. `src` holds the run's bytes (padded with zeros to whole blocks where the source
// ends); it may be the staging area. `*huge`: it came as one 2 MiB
// extent. `*woken`: the run's waiters were woken. Without lock; may take milliseconds.
int uf_install(struct uf_memory *m, uint64_t first, uint64_t count, const void *src, struct uf_staging *st, bool *huge,
	       bool *woken)
{
	char *dst = uf_block_address(m, first);
	size_t len = count << m->shift, moved = 0;
	*huge = *woken = false;
	// Not where each extent displaces another: the small pages that an eviction frees come back warm and need no clearing,
	// while a fresh huge page must be cleared, and on a virtual machine whose free pages are reported to the host even
	// fetched anew: a scan within a full budget took 1.6 times as much CPU time with extents.
	if (is_extent(m, first, count) && st && st->huge && !atomic_load_explicit(&m->pool->full, memory_order_relaxed)) {
		// Always a fresh page: an evicted extent's cannot be filled again, however dear clearing is. Others may still
		// read it by a plain reference (vmsplice, MSG_ZEROCOPY), which user space cannot see.
		if (src != st->area)
			memcpy(st->area, src, len);
		moved = move_extent(m, dst, st->area);
		if (moved) {
			// In between the pages were writable: mode "r" has no writers but wild ones.
			struct uffdio_writeprotect w = {{(uintptr_t)dst, moved}, UFFDIO_WRITEPROTECT_MODE_WP};
			ioctl(m->uffd, UFFDIO_WRITEPROTECT, &w);
		}
		*huge = moved == len;
		src = st->area; // what did not move is still there
	}
	int err = *huge    ? 0
		  : moved ? uf_copy_run(m, dst + moved, (const char *)src + moved, len - moved, true, woken)
			  : copy_blocks(m, first, count, src, woken);
	*woken &= !moved;
	// A dirty block alone: nothing of it came, or it is refilled, and what was there stays.
	if (err && !(count == 1 && uf_is_dirty(m, first)) && !atomic_load_explicit(&m->closed, memory_order_acquire)) {
		struct uf_range run = {first, count}; // what came before the failure is counted nowhere
		uf_forget_pages(m, &run, 1);
	}
	return err;
}
