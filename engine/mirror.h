// SPDX-License-Identifier: Apache-2.0
// Exact tracking of accesses to private anonymous memory that the program made, from Linux 6.8.
//
// An *area* is registered with a userfaultfd, and its pages are moved to a *mirror* mapping: so the first access to each is a
// fault. A thread of its own serves it: a page that is read comes back write-protected, one that is written comes back plain.
// Its state says what happened to it. The thread never touches memory that could be tracked, and needs no lock.
//
// Unless a comment says otherwise functions may be called from any thread, may block for as long as moving pages takes (some
// 0.2 s per GiB), and return 0 or a negative errno.
#ifndef UF_MIRROR_H
#define UF_MIRROR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct uf_span {
	uint64_t start, end; // addresses of pages
};

enum {
	UF_FOUND_ACCESSED = 1, // read or written
	UF_FOUND_WRITTEN = 2,
	UF_FOUND_BLIND = 4, // it could not be watched: pinned for I/O, unmapped, or handed to a forked child
};

struct uf_found {
	uint64_t start, end;
	uint64_t what;
};

// What uf_mirror_begin would say of this kernel and user: 0, -EPERM or -ENOSYS. May block for some milliseconds the first time.
int uf_mirror_available(void);
// Watches runs of pages, which are disjoint and not watched yet. All or nothing:
// -EPERM   this user gets no faults of the kernel (system calls on the memory would fail)
// -ENOSYS  the kernel has no UFFDIO_MOVE
// -EBUSY   another userfaultfd has it
// -EEXIST  it is watched already
// -EINVAL  it is not private, anonymous, readable and writable memory, or it is locked, or the engine's own
// -ENOMEM  some of it is not mapped, or there is no address space for the mirror
int uf_mirror_begin(const struct uf_span *runs, size_t n);
// What happened to the pages of the runs since the last call with `rearm`. With it each page that is reported is taken away again
// in the same step: an access is in this report or in the next, never in none. `*ret` (malloc) is in no order.
int uf_mirror_collect(const struct uf_span *runs, size_t n, bool rearm, struct uf_found **ret, size_t *count);
// Makes it plain memory again. What is not watched is left out.
int uf_mirror_end(const struct uf_span *runs, size_t n);

struct uf_mirror_stats {
	uint64_t reads, writes, upgrades; // pages that came back for a read, for a write; writes to pages that had been read
	uint64_t pages;                   // watched
};
// All zeros if nothing is watched.
void uf_mirror_stats(struct uf_mirror_stats *ret);

#endif
