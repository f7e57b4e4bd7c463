// SPDX-License-Identifier: Apache-2.0
// Cold pages of private anonymous memory, found and evicted to a file by read-write protection (Linux 7.3).
//
// One registration serves both: in asynchronous mode the kernel notes which pages are accessed; for an eviction it is switched to
// synchronous mode, where an access waits, is noticed, and keeps its page.
#ifndef UF_COLD_H
#define UF_COLD_H

#include "mirror.h"

struct uf_cold;

struct uf_cold_stats {
	uint64_t out;     // pages in the store
	uint64_t evicted; // pages written there, all in all
	uint64_t loaded;  // of these came back
	uint64_t kept;    // were accessed while they were to be evicted, and stay
};

// `store`: a descriptor to read and write, duplicated; byte i of the memory is at offset + i there. -ENOSYS: no RWP; -EPERM, -EBUSY, -EINVAL,
// -ENOMEM as for uf_mirror_begin.
int uf_cold_create(uint64_t start, uint64_t end, int store, uint64_t offset, struct uf_cold **ret);
// From here on pages count as cold until they are accessed. Found by PAGEMAP_SCAN: present, not ACCESSED.
int uf_cold_detect(struct uf_cold *c);
// Writes pages of the runs to the store that are cold still, and drops them. What went is in `*ret` (malloc), in order. An error
// of the store (-ENOSPC, -EIO) comes with what went before; the page that it is about stays.
int uf_cold_evict(struct uf_cold *c, const struct uf_span *runs, size_t n, struct uf_span **ret, size_t *count);
void uf_cold_stats(struct uf_cold *c, struct uf_cold_stats *ret);
// Brings everything back and frees. -EIO: the store cannot be read; pages that it holds raise SIGBUS from now on.
int uf_cold_close(struct uf_cold *c);

#endif
