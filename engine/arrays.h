// SPDX-License-Identifier: Apache-2.0
// Memory for NumPy's large arrays: each in a mapping of its own, so that whole pages belong to it, and known by address.
// It stands alone: no pager, no userfaultfd. Whoever tracks the arrays learns of them by draining events.
#ifndef UF_ARRAYS_H
#define UF_ARRAYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// NumPy's interface for allocators (NEP 49): `PyDataMem_Handler`, version 1, as in numpy/ndarraytypes.h since 1.22.
struct uf_array_allocator {
	void *ctx;
	void *(*malloc)(void *ctx, size_t size);
	void *(*calloc)(void *ctx, size_t count, size_t size);
	void *(*realloc)(void *ctx, void *ptr, size_t size);
	void (*free)(void *ctx, void *ptr, size_t size);
};

struct uf_array_handler {
	char name[127];
	uint8_t version;
	struct uf_array_allocator allocator;
};

enum uf_array_pages {
	UF_ARRAY_PAGES_DEFAULT, // what the system does with a mapping nobody advises on
	UF_ARRAY_PAGES_HUGE,    // advise huge pages from 4 MiB on, as NumPy does
	UF_ARRAY_PAGES_SMALL,   // advise against huge pages
};

struct uf_array_options {
	uint64_t threshold; // bytes from which on an array gets a mapping of its own; at least a page
	enum uf_array_pages pages;
	uint64_t most_dead; // bytes of arrays that died and were not drained yet, from which on their pages are given back
	struct uf_array_allocator below; // serves what is smaller; all zero: the C library
};

enum uf_array_event_kind { UF_ARRAY_BORN = 1, UF_ARRAY_DIED = 2 };

struct uf_array_event {
	uint64_t address;
	uint64_t nbytes;
	uint64_t born_ns; // CLOCK_MONOTONIC
	uint64_t died_ns; // 0 of one that was born
	uint32_t kind;
	uint32_t dropped; // of one that died: its pages were given back, so what they say is void
};

struct uf_array_stats {
	uint64_t live, live_bytes;     // arrays with a mapping of their own
	uint64_t dead, dead_bytes;     // those that died and were not released yet
	uint64_t brief, brief_bytes;   // that died before a drain told of them, since the start
	uint64_t brief_most;           // the largest of them, in bytes
	uint64_t spare_bytes;          // kept for the next array
	uint64_t failed;               // large arrays that were left to the allocator below, for want of memory or mappings
};

// All functions may be called from any thread at any time, also the handler's. They take one lock, over which no
// system call is made that waits for a page, unless a userfaultfd on an array asks for events of removal.

// The handler, which is there as long as the process: arrays keep a pointer to it. Before `start` and after `stop` it passes
// new arrays on to the allocator below.
struct uf_array_handler *uf_arrays_handler(void);

// -EINVAL: the threshold is below a page. -EBUSY: it is running. The allocator below is that of the first start.
int uf_arrays_start(const struct uf_array_options *o);

// No array is told of from here on; what lives stays where it is, and what is or becomes dead is unmapped at once. Call it when
// nothing is tracked any more.
void uf_arrays_stop(void);

// Arrays born at least `min_age_ns` ago that no drain told of, then those that died of which one had told. Returns how many
// events there are, at most `most`. From being told of until `uf_arrays_release` an array's addresses are not used again, not
// even if it dies.
size_t uf_arrays_drain(uint64_t min_age_ns, struct uf_array_event *out, size_t most);

// Whether a living array that no drain told of holds this address. Looks at all of these.
bool uf_arrays_is_young(uint64_t address);

// Unmaps an array whose death a drain has told of. False: there is none at this address.
bool uf_arrays_release(uint64_t address);

void uf_arrays_get_stats(struct uf_array_stats *ret);

#endif
