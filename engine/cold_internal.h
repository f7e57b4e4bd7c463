// SPDX-License-Identifier: Apache-2.0
// What cold.c (calls, fork) and cold_serve.c (the thread) share. As with the mirror all of it belongs to the thread alone, and
// calls are requests to it.
#ifndef UF_COLD_INTERNAL_H
#define UF_COLD_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "cold.h"
#include "internal.h"

enum { UF_COLD_CHUNK = 512, UF_COLD_DEFERRED = 256 }; // pages of one step; faults

// HERE: in memory, or never populated, or not ours any more. OUT: in the store only. TAKEN: in the staging area, for the time of one
// step. LEAVING: as OUT, but the program has moved it, by mremap: it is loaded where it is now.
// DROPPED: the program has dropped it, or is about to: not to be evicted before it is gone, else its old bytes would come back.
enum { UF_COLD_HERE, UF_COLD_OUT, UF_COLD_TAKEN, UF_COLD_LEAVING, UF_COLD_DROPPED };

enum uf_cold_op { UF_COLD_DETECT, UF_COLD_EVICT, UF_COLD_EVICTED, UF_COLD_LOOK, UF_COLD_CLOSE };

struct uf_cold {
	size_t length; // of this mapping
	struct uf_cold *next;
	uint64_t page, start, end, offset; // offset: of `start` in the store
	int uffd, bell, pagemap, store;
	char *staging;
	pthread_t thread;
	_Atomic uint32_t posted, finished; // requests; `finished` is a futex
	enum uf_cold_op op;
	int err;
	uint64_t at, until; // EVICT: what is next
	uint32_t nreply;
	struct uf_span reply[UF_COLD_CHUNK];
	bool sync;
	uint64_t chunk; // of the pages that are TAKEN
	struct uf_cold_stats stats;
	unsigned ndeferred;
	struct uffd_msg deferred[UF_COLD_DEFERRED]; // faults that wait for an event to be read
	unsigned nleaving;
	struct {
		uint64_t from, to, length;
	} leaving[8]; // `from`: in the area
	uint64_t buffer[65536 / 8];                 // a page of the store on its way back
	uint8_t state[];
};

int uf_cold_staging(struct uf_cold *c, bool on);
void *uf_cold_thread(void *arg);
void uf_cold_fork_handlers(void);

#endif
