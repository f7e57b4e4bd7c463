// SPDX-License-Identifier: Apache-2.0
// What each file of the engine offers the others. The structures, and the rules of locking, are in types.h.
#ifndef UF_INTERNAL_H
#define UF_INTERNAL_H

#include "types.h"

// --- util.c
uint64_t uf_now_ns(void);
void uf_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
void uf_histogram_add(struct uf_histogram *h, uint64_t ns);
int uf_thread_start(pthread_t *thread, void *(*run)(void *), void *arg);
void uf_thread_name(const char *name);
int uf_high_fd(int fd); // moves a descriptor above those that a child's set-up uses; -1 and errno on failure
void uf_bell_ring(int fd);
void uf_bell_drain(int fd);

// --- host.c
int uf_uffd_open(bool user_mode_only, uint64_t features, int *ret);
int uf_range_wake(int uffd, const void *start, size_t len);
void uf_forget_pages(struct uf_memory *m, const struct uf_range *ranges, unsigned n);

// --- pager.c
int uf_pager_start(struct uf_pager *p);             // lock held; may drop it while an old run ends
int uf_pager_open_fds(struct uf_pager *p);
void uf_pager_close_fds(struct uf_pager *p);
int uf_io_start(struct uf_pager *p);                // lock held
void *uf_fault_thread(void *arg);
int uf_memory_listen(struct uf_memory *m);          // puts its uffd in the epoll set
void uf_memory_free(struct uf_memory *m);           // the last reference is gone
void uf_pager_release_holder(struct uf_pager *p);   // lock held
void uf_wait_changed(struct uf_pager *p, long milliseconds); // lock held
void uf_fault_thread_kick(struct uf_pager *p);      // lock held
void uf_super_kick(struct uf_pager *p);             // lock held
struct uf_memory *uf_memory_get(struct uf_pager *p, uint32_t id); // lock held; takes a reference or NULL
void uf_memory_put(struct uf_memory *m);            // any time without lock
void uf_memory_put_locked(struct uf_memory *m);     // lock held
extern struct uf_pager *uf_pagers;
extern pthread_mutex_t uf_registry_lock;

// --- fault.c
void uf_fault_drain(struct uf_pager *p, struct uf_memory *m);
void uf_demand(struct uf_memory *m, uint64_t block, uint64_t t_ns, struct uf_staging *st);
void uf_pending_retry(struct uf_pager *p);
bool uf_background_step(struct uf_pager *p); // true: more to do at once
bool uf_state_cas(struct uf_memory *m, uint64_t block, uint32_t from, uint32_t to);

// --- load.c
struct uf_op *uf_op_begin(struct uf_pager *p, struct uf_memory *m, enum uf_state owned); // lock held
void uf_op_end(struct uf_op *op);                                                        // lock held
uint64_t uf_claim(struct uf_memory *m, uint64_t first, uint64_t count, bool poisoned);    // lock held
int uf_install(struct uf_memory *m, uint64_t first, uint64_t count, const void *src, struct uf_staging *st, bool *huge,
	       bool *woken);
void uf_reserve(struct uf_memory *m, uint64_t first, uint64_t blocks, uint8_t kind);   // lock held, may drop it
void uf_unreserve(struct uf_memory *m, uint64_t first, uint64_t blocks, uint8_t kind); // lock held
// Lock held. True: a fault was dropped meanwhile, the caller must wake.
bool uf_loaded(struct uf_memory *m, uint64_t first, uint64_t count, bool huge, uint8_t kind);
void uf_unclaim(struct uf_memory *m, uint64_t first, uint64_t count); // lock held; the caller wakes
void uf_poison(struct uf_memory *m, uint64_t block, unsigned attempts, int err, const char *message);
void uf_wake(struct uf_memory *m, uint64_t first, uint64_t count);
uint64_t uf_run_bytes(const struct uf_memory *m, uint64_t first, uint64_t count);
int uf_load_inline(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, struct uf_staging *st,
		   struct uf_op *op, uint64_t fault_ns, bool may_block, struct uf_failure *why);
int uf_staging_init(struct uf_staging *st);
void uf_staging_deinit(struct uf_staging *st);
void uf_record_error(struct uf_memory *m, uint64_t block, uint64_t count, unsigned attempts, int err,
		     const char *message, bool poisoned); // lock held
void uf_trace(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind); // lock held

// --- pool.c
void uf_room(struct uf_memory *m, uint64_t bytes); // lock held, may drop it
void uf_unroom(struct uf_memory *m, uint64_t bytes); // lock held
void uf_enqueue(struct uf_memory *m, uint64_t block); // lock held
void uf_dequeue(struct uf_memory *m, uint64_t block); // lock held
bool uf_evict_low(struct uf_pager *p);
uint64_t uf_evict_blocks(struct uf_memory *m, uint64_t first, uint64_t count); // without lock
void uf_pool_leave(struct uf_memory *m);
void uf_pool_init(struct uf_pool *pool, uint64_t limit);
uint64_t uf_pool_effective_limit(const struct uf_pager *p, const struct uf_pool *pool);

// --- readahead.c; lock held
uint64_t uf_readahead_plan(struct uf_memory *m, uint64_t block);
void uf_readahead_follow(struct uf_memory *m, uint64_t block);
void uf_background_add(struct uf_memory *m, struct uf_background what);

// --- jobs.c
// Lock held. Blocks [first, first + count) are LOADING and belong to the caller; on success they belong to the job.
struct uf_job *uf_job_post(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, uint64_t fault_ns,
			   struct uf_ticket *ticket);
bool uf_job_available(const struct uf_pager *p, bool ahead);
void uf_job_free(struct uf_job *j); // lock held
void uf_job_freed(struct uf_pager *p); // lock held: a job is free again
bool uf_is_fault_thread(const struct uf_pager *p);
void uf_job_read(struct uf_job *j, const void *bytes, struct uf_staging *st); // without lock; the bytes are there
void uf_job_failed(struct uf_job *j, int err, const char *message);          // without lock
// Lock held: a fault waits for this LOADING block. Returns a held job that the caller must install (uf_job_read).
struct uf_job *uf_job_demand(struct uf_memory *m, uint64_t block, uint64_t t_ns);
bool uf_job_release_held(struct uf_pager *p, struct uf_memory *m, struct uf_staging *st); // without lock; m NULL: any
void uf_job_cancel(struct uf_memory *m);                                    // lock held: the memory closes
void uf_jobs_collect(struct uf_pager *p);                                   // fault thread: what workers finished
uint64_t uf_jobs_due(struct uf_pager *p, uint64_t now);                     // lock held: re-posts what is due; next due time

// --- spawn.c
int uf_worker_spawn(struct uf_pager *p, unsigned index, int fds[3], pid_t *ret); // without lock; fds >= 16

// --- io.c
void *uf_io_thread(void *arg);

// --- supervisor.c
void *uf_super_thread(void *arg);
void uf_workers_forget(struct uf_pager *p); // fork's child: they are the parent's

// --- ring_owner.c; lock held
int uf_ring_create(struct uf_pager *p);
void uf_ring_destroy(struct uf_pager *p);
int uf_ring_publish(struct uf_pager *p, uint32_t id);
void uf_ring_post(struct uf_pager *p, struct uf_job *j, enum uf_request_kind kind, uint64_t offset, uint64_t length);
static inline unsigned uf_job_index(const struct uf_pager *p, const struct uf_job *j)
{
	return (unsigned)(j - p->jobs);
}

// --- fork.c
void uf_fork_handlers(void);

// There may be background work, or a free job for what waits. Lock held.
static inline void uf_rescan(struct uf_pager *p)
{
	p->rescan = true;
	// Relaxed: the fault thread sets it itself, or is kicked afterwards.
	atomic_store_explicit(&p->attention, true, memory_order_relaxed);
}

static inline uint64_t uf_min(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}
static inline uint64_t uf_max(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}
static inline uint64_t uf_block_size(const struct uf_memory *m)
{
	return 1ULL << m->shift;
}
static inline char *uf_block_address(const struct uf_memory *m, uint64_t block)
{
	return m->base + (block << m->shift);
}
static inline uint32_t uf_word(const struct uf_memory *m, uint64_t block)
{
	// Acquire: pairs with the release of whoever left an owned state.
	return atomic_load_explicit(&m->state[block], memory_order_acquire);
}
static inline void uf_word_store(struct uf_memory *m, uint64_t block, uint32_t word)
{
	// Release: what was done to the block's pages comes before its new state. Sequentially consistent would cost a
	// fence per block; the wake-up that always follows is a system call.
	atomic_store_explicit(&m->state[block], word, memory_order_release);
}

#endif
