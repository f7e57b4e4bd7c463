// SPDX-License-Identifier: Apache-2.0
// What the parts of the mirror share: mirror.c (calls), mirror_pages.c (pages and states), mirror_serve.c (the thread),
// mirror_fork.c.
//
// Everything here belongs to the handler thread alone. A call writes a request, rings, and waits; so each step of a request is
// atomic with respect to faults, and no lock exists that a faulting thread could hold. All of it lies in mappings of its own:
// the heap, the stacks and the data of the program may be among what is watched.
#ifndef UF_MIRROR_INTERNAL_H
#define UF_MIRROR_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "internal.h"
#include "mirror.h"

enum {
	UF_MIRROR_PIECES = 1 << 17,
	UF_MIRROR_SPANS = 4096,    // runs of one request
	UF_MIRROR_REPLY = 1 << 15, // entries of one reply
	UF_MIRROR_CHUNK = 1024,    // pages of one step: faults wait no longer than that
	UF_MIRROR_TRASH = 512,     // pages
	UF_MIRROR_DEFERRED = 1024,
	UF_MIRROR_LOG = 4096, // events during a fork
	UF_FOUND_BUSY = 8, // MOVE refused it: shared with a forked child, or pinned
};

// Of each page of a piece.
enum {
	UF_PAGE_AWAY = 0,    // in the mirror (a hole there: it was never populated); not accessed
	UF_PAGE_READ = 1,    // here, write-protected
	UF_PAGE_WRITTEN = 2, // here, plain
	UF_PAGE_BLIND = 3,   // here, plain, and accesses go unnoticed
	UF_PAGE_STATE = 3,
	// The program has dropped it (MADV_DONTNEED, MADV_FREE), or is about to: it must not go to the mirror before it is gone, else
	// its old bytes would come back instead of zeros.
	UF_PAGE_DROPPED = 4,
};

// The mapping of a mirror: this header, the states, the mirror's pages. Pieces are what is left of the run that it was made for.
struct uf_book {
	size_t length;
	uint64_t pieces;
	struct uf_book *next; // without pieces, during a fork
};

struct uf_piece {
	uint64_t start, end, mirror; // addresses; `mirror` is where the page `start` goes
	uint8_t *state;
	struct uf_book *book;
	bool heap;   // malloc's own data may be beside it
	bool ending; // it was moved by mremap: brought back where it is now, then forgotten
};

enum uf_mirror_op { UF_MIRROR_ADD, UF_MIRROR_TAKE, UF_MIRROR_END, UF_MIRROR_FORK, UF_MIRROR_FORKED, UF_MIRROR_LOOK, UF_MIRROR_STOP };

struct uf_mirror_request {
	enum uf_mirror_op op;
	bool rearm, last, strict; // TAKE; last: what is busy becomes blind; strict: what cannot be moved is an error
	struct uf_piece piece; // ADD
	uint32_t n, at;        // spans, the one that is next
	uint64_t address;      // within it
	int err;
	uint32_t nreply;
	struct uf_span spans[UF_MIRROR_SPANS];
	struct uf_found reply[UF_MIRROR_REPLY];
};

struct uf_mirror {
	uint64_t page;   // its size
	int uffd;       // areas and mirrors, with events
	int trash_uffd; // without events: what is moved there can be dropped without waiting for ourselves
	int bell, pagemap;
	pthread_t thread;
	char *trash, *zero;
	unsigned trash_used;
	_Atomic uint32_t posted, finished; // requests; `finished` is a futex
	bool forking;
	unsigned ndeferred;
	struct uffd_msg deferred[UF_MIRROR_DEFERRED];   // faults that wait for an event to be read
	uint64_t reads, writes, upgrades; // written by the handler; read by a call after a request
	_Atomic uint64_t pages;
	struct uf_mirror_request request;
	// For a child: the pieces as they were before the fork, and what happened since.
	uint32_t ninherited;
	_Atomic uint32_t nlog;
	struct uf_book *gone;
	struct uffd_msg log[UF_MIRROR_LOG];
	struct uf_piece inherited[UF_MIRROR_PIECES];
	uint32_t npieces, nending;
	struct uf_piece pieces[UF_MIRROR_PIECES]; // sorted
};

enum uf_step { UF_STEP_DONE, UF_STEP_MORE, UF_STEP_AGAIN }; // AGAIN: the kernel wants an event to be read first

// mirror_pages.c; on the handler thread
uint32_t uf_piece_at(struct uf_mirror *m, uint64_t address); // the first that ends behind the address
void uf_book_free(struct uf_mirror *m, struct uf_book *book);
int uf_piece_add(struct uf_mirror *m, const struct uf_piece *piece);
void uf_pieces_lost(struct uf_mirror *m, uint64_t start, uint64_t end);
void uf_pieces_moved(struct uf_mirror *m, uint64_t from, uint64_t to, uint64_t length);
void uf_pieces_forked(void); // in the child
void uf_pieces_dropped(struct uf_mirror *m, uint64_t start, uint64_t end);
void uf_mirror_drop(struct uf_mirror *m, uint64_t address, uint64_t length);
bool uf_mirror_wake(struct uf_mirror *m, uint64_t address, uint64_t length);
enum uf_step uf_pieces_take(struct uf_mirror *m, struct uf_mirror_request *r);
// Brings back what is away of one chunk of [*address, end); with `forget` the pieces go.
enum uf_step uf_pieces_return(struct uf_mirror *m, uint64_t *address, uint64_t end, bool forget);
enum uf_step uf_pieces_ending(struct uf_mirror *m);
enum uf_step uf_pieces_return_heap(struct uf_mirror *m, struct uf_mirror_request *r);

// mirror_serve.c
void *uf_mirror_thread(void *arg);

// mirror_fork.c
void uf_mirror_fork_handlers(void);

// mirror.c; the lock is held by calls, and by fork
void uf_mirror_lock(void);
void uf_mirror_unlock(void);
void uf_mirror_lock_forked(void);
extern struct uf_mirror *uf_mirror_running; // NULL: nothing is watched
int uf_mirror_ask(struct uf_mirror *m);     // posts m->request and waits
void uf_mirror_unmap(struct uf_mirror *m);

#endif
