// SPDX-License-Identifier: Apache-2.0
// What each file of the engine offers the others. The structures, and the rules of locking, are in types.h.
#ifndef UF_INTERNAL_H
#define UF_INTERNAL_H

#include <signal.h>

#include "types.h"

// --- util.c
uint64_t uf_now_ns(void);
void uf_mutex_init(pthread_mutex_t *lock);
void uf_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
void uf_histogram_add(struct uf_histogram *h, uint64_t ns);
int uf_thread_start(pthread_t *thread, void *(*run)(void *), void *arg);
void uf_thread_name(const char *name);
// Cuts a huge page of which [at, at + length) is a part, and touches nothing of it.
void uf_cut_huge_page(void *at, size_t length);
int uf_high_dup(int fd);
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
void uf_fault_thread_kick(struct uf_pager *p);      // any time while it runs
void uf_super_kick(struct uf_pager *p);             // lock held
struct uf_memory *uf_memory_get(struct uf_pager *p, uint32_t id); // lock held; takes a reference or NULL
void uf_memory_put(struct uf_memory *m);            // any time without lock
void uf_memory_put_locked(struct uf_memory *m);     // lock held
extern struct uf_pager *uf_pagers;
extern pthread_mutex_t uf_registry_lock;

// --- fault.c
void uf_fault_drain(struct uf_pager *p, struct uf_memory *m);
bool uf_demand(struct uf_memory *m, uint64_t block, bool write, uint64_t t_ns, struct uf_staging *st);
bool uf_page_present(struct uf_pager *p, const void *address);
bool uf_fault_step(struct uf_memory *m, uint64_t block, char *page_address, bool wp, bool write, uint64_t t_ns,
		   struct uf_staging *st);
void uf_pending_retry(struct uf_pager *p);
bool uf_background_step(struct uf_pager *p); // true: more to do at once
bool uf_state_cas(struct uf_memory *m, uint64_t block, uint32_t from, uint32_t to);
bool uf_upgrade(struct uf_memory *m, uint64_t block); // without lock; false: look at the state again

// --- load.c
struct uf_op *uf_op_begin(struct uf_pager *p, struct uf_memory *m, enum uf_state owned); // lock held
void uf_op_end(struct uf_op *op);                                                        // lock held
uint64_t uf_claim(struct uf_memory *m, uint64_t first, uint64_t count, bool poisoned);    // lock held
int uf_install(struct uf_memory *m, uint64_t first, uint64_t count, const void *src, struct uf_staging *st, bool *huge,
	       bool *woken);
void uf_reserve(struct uf_memory *m, uint64_t first, uint64_t blocks, uint8_t kind);   // lock held, may drop it
void uf_unreserve(struct uf_memory *m, uint64_t first, uint64_t blocks, uint8_t kind); // lock held
// Lock held. `demanded`: the block that a fault waits for, UF_NIL. True: a fault was dropped meanwhile, the caller must wake.
bool uf_loaded(struct uf_memory *m, uint64_t first, uint64_t count, bool huge, uint8_t kind, uint64_t demanded, uint64_t took_ns);
void uf_unclaim(struct uf_memory *m, uint64_t first, uint64_t count); // lock held; the caller wakes
void uf_poison(struct uf_memory *m, uint64_t block, unsigned attempts, int err, const char *message);
void uf_wake(struct uf_memory *m, uint64_t first, uint64_t count);
uint64_t uf_run_bytes(const struct uf_memory *m, uint64_t first, uint64_t count);
int uf_load_inline(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, struct uf_staging *st,
		   struct uf_op *op, uint64_t fault_ns, bool may_block, struct uf_failure *why);
int uf_copy_run(struct uf_memory *m, char *dst, const char *src, size_t len, bool protect, bool *woken);
int uf_staging_init(struct uf_staging *st);
void uf_staging_deinit(struct uf_staging *st);
void uf_record_error(struct uf_memory *m, uint64_t block, uint64_t count, unsigned attempts, int err,
		     const char *message, bool poisoned); // lock held
void uf_trace(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t kind, uint64_t demanded, uint64_t took_ns); // lock held

// --- watch.c; lock held
void uf_seen(struct uf_memory *m, uint64_t block, bool write); // before the thread that touches it goes on
void uf_seen_coming(struct uf_memory *m, uint64_t first, uint64_t count, bool demanded); // they are about to be installed
void uf_seen_done(struct uf_memory *m, uint64_t first, uint64_t count); // they no longer trap
void uf_seen_blind(struct uf_memory *m, uint64_t block);
void uf_watch_free(struct uf_memory *m); // nobody else knows the memory any more

// --- replay.c; lock held
void uf_replay_feed(struct uf_memory *m);
void uf_replay_demanded(struct uf_memory *m, uint64_t block);
void uf_replay_end(struct uf_memory *m);

// --- slots.c: dirty blocks out of memory, and back
int uf_stash_init(struct uf_pager *p);               // lock held; idempotent
int uf_stash_register(struct uf_pager *p);           // again, in a forked child
void uf_stash_deinit(struct uf_pager *p);
char *uf_slot_bytes(const struct uf_pager *p, const struct uf_slot *s);
// Lock held; NULL: none, for now. `staged`: for a copy of spilled blocks.
struct uf_slot *uf_slot_take(struct uf_memory *m, uint64_t first, uint64_t count, bool staged);
bool uf_in_slot(const struct uf_memory *m, uint64_t block); // lock held: its write-back is under way
void uf_slot_free(struct uf_slot *s);                // lock held; may drop it
int uf_slot_fill(struct uf_slot *s);                 // without lock: the blocks are EVICTING, their pages go
int uf_slot_copy(struct uf_slot *s);                 // without lock: the blocks' bytes as they are, pages stay
void uf_slot_hold(struct uf_slot *s);                // lock held: its bytes are counted as on their way out
void uf_slot_unhold(struct uf_slot *s);              // lock held: no more, whatever became of them
void uf_slot_queue(struct uf_slot *s);               // lock held
void uf_slot_done(struct uf_slot *s, int err, const char *message); // lock held, may drop it
void uf_slot_release(struct uf_slot *s);             // lock held, may drop it: one that `restoring` counted is through
bool uf_restore(struct uf_memory *m, uint64_t block, bool write); // without lock; false: look at the state again
void uf_dirty_set(struct uf_memory *m, uint64_t block);   // lock held
void uf_dirty_clear(struct uf_memory *m, uint64_t block); // lock held
void uf_unprotect(struct uf_memory *m, uint64_t first, uint64_t count); // without lock; wakes
void uf_slots_leave(struct uf_memory *m);            // lock held, may drop it: the memory closes
void uf_make_own(struct uf_memory *m, uint64_t first, uint64_t count); // without lock: shared pages become ours
void uf_repair_add(struct uf_memory *m, uint64_t block); // lock held
void uf_repair_one(struct uf_pager *p);              // lock held, drops it

// --- writeback.c
void uf_write_native(struct uf_slot *s, struct uf_staging *st); // I/O thread, without lock
void uf_writes_post(struct uf_pager *p);             // lock held: hands queued slots to workers while there are jobs
void uf_write_answered(struct uf_job *j, int err, const char *message); // lock held, may drop it
uint64_t uf_writes_due(struct uf_pager *p, uint64_t now); // lock held: queues what is due; next due time
struct uf_slot *uf_write_next(struct uf_pager *p);   // lock held: for an I/O thread
void uf_flush_failed(struct uf_flush *f, uint64_t block, int err, const char *message); // lock held
// Writes back what is dirty in a range, and waits for it. Without lock. Outcomes are in `f`.
void uf_flush_blocks(struct uf_memory *m, uint64_t first, uint64_t count, struct uf_flush *f);

// --- flush.c; without lock
bool uf_write_back(struct uf_memory *m, uint64_t first, uint64_t count); // as far as it goes, false: some failed; blocks for as long as the store does

// --- sync.c
void uf_unsynced_add(struct uf_memory *m, uint64_t first, uint64_t count); // lock held
int uf_resync(struct uf_memory *m, struct uf_flush *f);
int uf_sync(struct uf_memory *m, struct uf_failure *why);

// --- scratch.c
int uf_scratch_create(const struct uf_pager *p, int *ret);
// Without lock; then one of the two, with lock.
int uf_scratch_write(struct uf_slot *s, const char *bytes, struct uf_staging *st);
void uf_scratch_publish(struct uf_slot *s);
void uf_scratch_failed(struct uf_slot *s);
int uf_scratch_read(struct uf_memory *m, uint64_t first, uint64_t count, char *area, char *packed, bool nowait);
void uf_scratch_drop(struct uf_memory *m, uint64_t block); // lock held: the block is nowhere in scratch any more
void uf_scratch_before_fork(struct uf_pager *p);     // lock held, as the next
void uf_scratch_after_fork(struct uf_pager *p, bool child);
void uf_generations_close(struct uf_pager *p);
void uf_scratch_close(struct uf_memory *m);

// --- direct.c and sigbus.c
// Thread-local without allocation: what a handler may use.
#define UF_HANDLER_LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))
bool uf_direct_serve(const siginfo_t *info, const void *context);
void uf_direct_wake(struct uf_memory *m, uint64_t first, uint64_t count);
int uf_direct_init(struct uf_pager *p); // lock held; idempotent
void uf_direct_deinit(struct uf_pager *p);    // lock held; may drop it
int uf_direct_add(struct uf_memory *m);       // lock held: from now on its faults are served
void uf_direct_remove(struct uf_memory *m);   // before its creator lets go of it
void uf_direct_forked(void);                  // fork's child: other threads were the parent's

// --- pins.c; lock held
bool uf_pinned(const struct uf_memory *m, uint64_t block);

// --- pool.c
void uf_room(struct uf_memory *m, uint64_t bytes); // lock held, may drop it
// False: there is no room, and write-backs are under way that will make some. `urgent`: somebody waits, so blocks go that can go
// at once, though others are on their way out. Lock held, may drop it.
bool uf_room_now(struct uf_memory *m, uint64_t bytes, bool urgent);
bool uf_fits(const struct uf_memory *m, uint64_t bytes); // lock held
void uf_account(struct uf_memory *m, uint64_t bytes); // lock held: resident from now on, without making room
void uf_unroom(struct uf_memory *m, uint64_t bytes); // lock held
void uf_enqueue(struct uf_memory *m, uint64_t block); // lock held; a ghost goes to the main queue
void uf_enqueue_main(struct uf_memory *m, uint64_t block); // lock held
void uf_dequeue(struct uf_memory *m, uint64_t block); // lock held
bool uf_evict_low(struct uf_pager *p);
// Without lock. `forced`: pinned ones, too; of one whose pages other code dropped.
uint64_t uf_evict_blocks(struct uf_memory *m, uint64_t first, uint64_t count, bool forced);
uint32_t uf_stamp(struct uf_memory *m); // lock held: the next eviction's
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
void uf_job_dispatch(struct uf_pager *p, struct uf_job *j); // lock held: hands it to who reads or writes it
bool uf_job_post_write(struct uf_slot *s); // false: none is free
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
int uf_source_flush(struct uf_pager *p, uint32_t id, struct uf_failure *why); // without lock; blocks
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
static inline bool uf_is_dirty(const struct uf_memory *m, uint64_t block)
{
	// Relaxed: changed under the lock, and read under it or by the owner of the block.
	return m->dirty && atomic_load_explicit(&m->dirty[block / 64], memory_order_relaxed) >> block % 64 & 1;
}
// Where the bytes of an absent block are: enum uf_source_kind, or UF_SOURCE_SCRATCH. Changes only while the block is written.
static inline int uf_kind_at(const struct uf_memory *m, uint64_t block)
{
	return m->spilled && atomic_load_explicit(&m->spilled[block], memory_order_relaxed) ? UF_SOURCE_SCRATCH : (int)m->kind;
}
// A try without waiting is known to be in vain here.
static inline bool uf_waits_for_disk(const struct uf_memory *m, uint64_t block)
{
	int kind = uf_kind_at(m, block);
	return (kind == UF_SOURCE_FILE && atomic_load_explicit(&m->no_nowait, memory_order_relaxed)) ||
	       (kind == UF_SOURCE_SCRATCH && atomic_load_explicit(&m->no_nowait_scratch, memory_order_relaxed));
}
// Reading it may wait for a disk, in an I/O thread.
static inline bool uf_is_file_kind(int kind)
{
	return kind == UF_SOURCE_FILE || kind == UF_SOURCE_SCRATCH;
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
