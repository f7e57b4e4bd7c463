// SPDX-License-Identifier: Apache-2.0
// The shared memory between a pager and its worker processes. Both sides map it; the engine trusts nothing in it but
// claim words, lengths that it checks, and text.
#ifndef UF_RING_H
#define UF_RING_H

#include <stdatomic.h>
#include <stdint.h>

#include "uf.h"

enum {
	UF_RING_MAGIC = 0x75665231, // "ufR1"
	UF_RING_ENTRIES = 64,
	UF_RING_SOURCES = 1024,
	UF_SLOT_SIZE = UF_EXTENT,
	UF_ANY_WORKER = 255,
};

// A claim word holds state (bits 0-7), worker (8-15) and generation (32-63) together: claiming, answering and taking
// back are one compare-and-swap each, and an answer to a request that was taken back does not match.
enum uf_entry_state { UF_ENTRY_FREE, UF_ENTRY_QUEUED, UF_ENTRY_TAKEN, UF_ENTRY_DONE, UF_ENTRY_FAILED };
#define UF_CLAIM(state, worker, generation) ((uint64_t)(state) | (uint64_t)(worker) << 8 | (uint64_t)(generation) << 32)
#define UF_CLAIM_STATE(word) ((enum uf_entry_state)((word)&255))
#define UF_CLAIM_WORKER(word) ((unsigned)((word) >> 8 & 255))
#define UF_CLAIM_GENERATION(word) ((uint32_t)((word) >> 32))

struct uf_ring_entry {
	_Atomic uint64_t word;
	_Atomic uint32_t priority; // 0 a fault waits, 1 somebody waits, 2 ahead of demand
	uint32_t kind, source_id;
	uint32_t target; // the only worker that may take it, or UF_ANY_WORKER
	uint64_t seq, offset, length;
	_Atomic uint64_t taken_ns;
	uint64_t reply_length;
	char message[UF_MESSAGE_MAX];
};

struct uf_ring_source {
	_Atomic uint32_t live; // generation; 0 = not in use
	uint64_t blob_offset, blob_length;
	_Atomic uint64_t cache;
};

struct uf_ring {
	uint32_t magic, entries, slot_size, sources_count;
	int32_t owner_pid;
	_Atomic uint32_t posted;   // futex: rises with each request; idle workers wait on it
	_Atomic uint32_t sleepers; // threads that wait on it
	_Atomic uint32_t dropped;  // rises when a source is dropped
	_Atomic uint32_t stop;
	_Atomic uint32_t ready[UF_MAX_WORKERS]; // pid of the attached worker
	struct uf_ring_entry entry[UF_RING_ENTRIES];
	struct uf_ring_source sources[UF_RING_SOURCES];
};

// Slots begin at the first multiple of the slot size after the header, so that each is aligned.
#define UF_RING_SLOTS_OFFSET ((sizeof(struct uf_ring) + UF_SLOT_SIZE - 1) / UF_SLOT_SIZE * UF_SLOT_SIZE)
#define UF_RING_SIZE (UF_RING_SLOTS_OFFSET + (size_t)UF_RING_ENTRIES * UF_SLOT_SIZE)
#define UF_RING_SLOT(ring, i) ((char *)(ring) + UF_RING_SLOTS_OFFSET + (size_t)(i) * UF_SLOT_SIZE)

long uf_futex_wait(_Atomic uint32_t *word, uint32_t value, uint64_t timeout_ns);
long uf_futex_wake(_Atomic uint32_t *word, int n);

#endif
