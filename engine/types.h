// SPDX-License-Identifier: Apache-2.0
// The engine's structures. Locking:
//
// One mutex per pager, `lock`, guards everything that says so below. It is held for bookkeeping only, never across a
// system call that may fault on a registered page or wait for a source, so a thread that waits in a fault never holds it
// and a thread that forks can take it. State words are changed by compare-and-swap or by the owner of an owned state, so
// that a later delivery inside the faulting thread can join without the lock.
//
// A block in an owned state always has a record that says so (struct uf_op or struct uf_job), written under `lock`
// before the state and removed after it: fork's child handler finds what has lost its owner there.
#ifndef UF_TYPES_H
#define UF_TYPES_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "ring.h"
#include "uapi.h"
#include "uf.h"

enum {
	UF_JOBS = UF_RING_ENTRIES, // reads under way outside the fault thread; job i uses ring entry i and slot i
	UF_JOBS_AHEAD = 48,        // of these, at most so many for readahead and prefetch: demand always finds one
	UF_PENDING = 4096,         // faults that wait for a free job
	UF_OPS = 128,              // threads that own blocks at the same time
	UF_OPS_FAULT = 4,          // of these, kept for the fault thread
	UF_FILLERS = 16,           // threads that prefetch at the same time; each may need a second op to make room
	UF_LEAST_BLOCKS = 8,       // a budget holds so many: one instruction may need several, and each thread its own
	UF_BATCH = 64,             // blocks per eviction batch
	UF_STREAMS = 4,
	UF_BACKGROUND = 8,         // background fills per memory
	UF_IO_THREADS = 4,
	UF_SLOTS = 32,             // write-backs under way; each holds up to an extent
	UF_SLOTS_SPARE = 4,        // of these, kept for budgets that have none
	UF_WRITE_JOBS = 16,        // of the jobs, at most so many for write-backs
	UF_SKIP = 1024,            // blocks that may not leave now: how many an eviction passes over
	UF_REPAIRS = 256,          // blocks whose pages must be made the process's own again (see slots.c)
	UF_SCRATCHES = 64,         // scratch files of a memory: a fork freezes the current one, for as long as the child lives
	UF_GENERATIONS = 64,       // forks whose children are alive, as far as they are told apart (scratch.c)
	UF_DIRECT_STAGINGS = 16,   // threads that serve themselves at the same time; others wait
	UF_SOURCE_SCRATCH = 4,     // beside enum uf_source_kind: the block was spilled
};

// A state word: bits 0-3 enum uf_state; bit 4 the block is on its pool's main queue (not resident: it left that); bit 5 it
// came as part of a 2 MiB extent (and is evicted with it); bits 8-31 the eviction stamp while ABSENT (a ghost: see pool.c), the slot while WRITING,
// REINSTALLED or RESTORED, and while it is on its way between these.
#define UF_STATE(w) ((enum uf_state)((w)&15u))
#define UF_WORD_MAIN 16u
#define UF_WORD_HUGE 32u
#define UF_WORD_MARKED 64u   // LOADING, and its pages still carry poison
#define UF_WORD_DROPPED 128u // LOADING, and a fault was dropped: the owner must wake (see uf_copy_run)
#define UF_STAMP_SHIFT 8
#define UF_SLOT_SHIFT 8
#define UF_SLOT_BITS 0xffffff00u

#define UF_NIL UINT64_MAX
#define UF_ALL (1ULL << 32)
#define UF_LONGEST_NS (1ULL << 60) // times are added to the clock

// Queue links of a resident block. A reference names a block of any memory: id << 32 | block.
struct uf_link {
	uint64_t prev, next;
	uint64_t came; // the pager's count when it was queued: older blocks have smaller ones
};

struct uf_queue {
	uint64_t head, tail; // in at the head, out at the tail
	uint64_t bytes;
};

// A budget and what is resident in it. Guarded by lock.
struct uf_pool {
	uint64_t limit;    // 0: only the pager's limit counts
	uint64_t least;    // bytes below which the limit does not go
	uint64_t reserved; // kept elsewhere by sources, taken off the limit
	uint64_t resident, peak;
	uint64_t leaving;  // of resident: bytes in slots, which go when they are written
	uint64_t stamp;    // evicted bytes so far, in pages: the clock of the ghosts
	struct uf_queue probation, main;
	uint64_t share;     // probation gives way while it holds more bytes (see pool.c)
	uint64_t from_main; // of the late evictions, those from main; UF_ALL = all
	bool low;          // the fault thread should make room before the next fault needs it
	_Atomic bool full; // nearly: what comes in displaces something
};

struct uf_stream {
	uint64_t expect, last, next; // the block that continues it; the last demanded one; first block not yet asked for
	int64_t stride;              // blocks; 1 = sequential
	int64_t candidate;           // a distance seen once
	uint64_t window;             // blocks to ask for ahead
	uint64_t used;               // clock of last use
	bool live;
};

struct uf_range {
	uint64_t first, count;
};

// Blocks first, first + step, ... that the fault thread fills when no fault waits.
struct uf_background {
	uint64_t first, count;
	int64_t step;
	uint64_t trigger; // the job that reads this block is held as a tripwire; UF_NIL = none
	uint8_t kind;
	bool single; // block by block: the run failed as a whole
};

// What is noted of blocks that are touched (watch.c).
enum uf_seen { UF_SEEN_ACCESSED, UF_SEEN_WRITTEN, UF_SEEN_BLIND, UF_SEEN_LATE, UF_SEEN };

struct uf_replay;

struct uf_memory {
	// Set at creation, constant afterwards.
	struct uf_pager *pager;
	uint32_t id;
	char *base;
	size_t length; // bytes mapped: nblocks << shift
	void *reserve;
	size_t reserve_length;
	uint64_t nbytes, nblocks;
	unsigned shift;
	enum uf_source_kind kind;
	const char *address;
	int fd;
	uint64_t offset;
	uint32_t source_id;
	bool inline_file; // pread never waits long here (tmpfs)
	bool inline_scratch;
	char name[UF_NAME_MAX];
	_Atomic uint32_t *state;
	struct uf_link *links;
	struct uf_pool own;
	struct uf_pool *pool;
	uint64_t reserved;

	// Set at creation, and again by fork's child handler while it is the only thread.
	int uffd;
	bool wp;      // registered for write protection: pages are mapped writable but installed protected
	bool extents; // 2 MiB extents may be moved in
	enum uf_delivery delivery;

	_Atomic uint32_t waiters; // threads that wait for a state word (direct.c)
	_Atomic uint64_t refs; // the creator, jobs and operations under way
	_Atomic bool closed;
	bool destroyed; // the creator's reference is gone; guarded by lock
	atomic_bool told_of_drops;
	atomic_bool no_nowait; // preadv2(RWF_NOWAIT) is not supported by this file
	atomic_bool no_nowait_scratch; // nor by its scratch files

	// Guarded by the pager's lock.
	enum uf_advice advice;
	struct uf_stream streams[UF_STREAMS];
	uint64_t stream_clock;
	struct uf_background background[UF_BACKGROUND];
	unsigned nbackground;
	int held[UF_STREAMS]; // jobs whose bytes wait in their slots as tripwires (readahead.c), -1 = none
	uint64_t quiet_until; // readahead is off until this many faults: a run of blocks failed
	struct uf_stats stats;
	unsigned errlog_next;
	struct uf_trace_record *trace;
	uint32_t trace_capacity;
	uint64_t trace_in, trace_out;
	uint64_t installs_begun, installs_done; // runs of blocks, since the memory was made
	struct uf_replay *replay; // a plan that is under way (replay.c)
	unsigned watchers, access_watchers; // of these (watch.c)
	uint64_t *seen[UF_SEEN]; // a bit per block; NULL until it is watched

	// Writable memories (store is not UF_STORE_NONE). `store` changes in a forked child only.
	enum uf_store_kind store;
	bool forked;          // inherited: changes stay private
	unsigned unit_shift;  // dirty blocks of one aligned unit are written together
	_Atomic uint64_t *dirty; // a bit per block: it is, or is being made, dirty; or its bytes are on their way to the store
	_Atomic uint32_t *spilled; // per block: where it is in a scratch file, 0 = nowhere (scratch.c)
	uint64_t refilling;   // a DIRTY block of which foreign code dropped pages is LOADING; UF_NIL = none
	bool flushing;        // one flush at a time
	bool flush_waits;     // for a slot: evictions of dirty blocks leave it to the flush
	uint64_t *unsynced;   // a bit per block: written to the file since the last fdatasync; NULL for other stores (sync.c)
	uint64_t unsynced_first, unsynced_end; // words of it that may have bits
	bool resync;          // the last fdatasync failed
	bool complained;      // of write-backs that fail; until one succeeds
	uint64_t write_not_before_ns; // evictions of dirty blocks wait until then: a write-back failed
	struct {
		uint64_t first, count;
	} *pins;
	unsigned npins, pins_capacity;
	struct uf_scratch {
		int fd;
		unsigned writers; // write-backs under way into it
		uint64_t blocks;  // that are in it
		uint64_t readers; // forks whose children may read it, a bit each: while there are some nothing in it may change
		bool inherited;   // or other processes that we know nothing of
	} scratch[UF_SCRATCHES];
	uint64_t scratch_failures; // write-backs into scratch that failed
	int scratch_now; // the one that is written, -1 = none yet
	bool scratch_opening;
	unsigned scratch_readers; // of blocks that they do not own (flush.c)
};

enum uf_slot_state {
	UF_SLOT_FREE,
	UF_SLOT_FILLING,
	UF_SLOT_QUEUED,
	UF_SLOT_ACTIVE,  // being written
	UF_SLOT_DELAYED, // will be tried again at `due_ns`
	UF_SLOT_DONE,    // written, or given up; finished when nobody copies out of it
	UF_SLOT_ENDING,  // its pages are being dropped
};

// Collects the outcome of write-backs that a flush waits for. Lives on its stack; guarded by lock.
struct uf_flush {
	unsigned pending;
	struct uf_failure *failures;
	uint32_t most, n;
};

// Bytes of dirty blocks on their way to the store, at stash + index * UF_EXTENT. Guarded by lock.
struct uf_slot {
	enum uf_slot_state state;
	struct uf_memory *memory; // a reference
	uint64_t first, count;
	bool staged;        // a copy of spilled blocks on its way to the source: block states do not know it
	bool resident;      // counted in its pool
	bool settled;       // its blocks know it no more
	unsigned restoring; // threads that copy out of it, or change the state of its blocks
	unsigned tries;
	int result;         // of the last try
	uint64_t seq, queued_ns, due_ns;
	struct uf_flush *flush;
	char message[UF_MESSAGE_MAX];
	int file;          // the scratch file that it is written into, -1
	uint64_t begun;    // blocks that may have been written there
	uint32_t entries[UF_EXTENT / 4096]; // what the scratch file has of it
};

enum uf_job_state {
	UF_JOB_FREE,
	UF_JOB_RING,    // in the ring, to be taken or taken by a worker
	UF_JOB_IO,      // waits for an I/O thread
	UF_JOB_RUNNING, // an I/O thread reads, or bytes are being installed
	UF_JOB_DELAYED, // will be tried again at `due_ns`
	UF_JOB_HELD,    // read, kept in its slot until a fault asks for it
};

// A ticket collects the outcome of jobs that somebody waits for. Lives on the waiter's stack; guarded by lock.
struct uf_ticket {
	unsigned pending;
	bool split; // a run of blocks failed: ask again, block by block
	struct uf_failure failure; // the first one; err 0 = none
};

struct uf_job {
	enum uf_job_state state;
	struct uf_memory *memory; // a reference; NULL for LOAD
	uint64_t first, count;    // blocks, all LOADING
	uint8_t kind;             // enum uf_trace_kind
	bool demanded;            // a fault waits
	uint64_t asked_for;       // for this block
	bool hold;                // becomes HELD when read
	bool abandoned;           // LOAD: nobody waits any more
	bool late;                // its worker was killed because of it
	unsigned tries;
	unsigned lost;            // workers that died with it
	uint32_t source;          // the ring is not asked: workers write there
	unsigned target;          // worker, or UF_ANY_WORKER
	uint64_t seq, posted_ns, due_ns, fault_ns;
	struct uf_ticket *ticket;
	struct uf_slot *slot; // a write-back of these bytes; NULL for reads
	enum uf_request_kind asked; // LOAD or FLUSH, of a job without memory
	// LOAD and FLUSH only
	void *reply;
	size_t reply_length;
	int result; // 0 replied, 1 failed with a reply, negative errno
	char message[UF_MESSAGE_MAX];
};

// A thread that owns blocks outside a job: an inline load, or a batch of evictions.
struct uf_op {
	bool used;
	bool restores; // a block whose bytes are in a slot, too
	enum uf_state owned; // LOADING or EVICTING
	unsigned n;
	struct {
		struct uf_memory *memory; // a reference
		uint64_t first, count;
	} part[UF_BATCH];
};

// Two MiB that are filled and then moved or copied in. One per thread that installs.
struct uf_staging {
	char *area;
	bool huge;
	char *packed; // as large: compressed bytes; pages are there only once it is used
};

struct uf_source_entry {
	bool used, affinity;
	bool exclusive; // it is written: no other worker may read it, either, since each has a cache of its own
	unsigned memories; // open ones that read it
	void *blob;
	size_t length;
	uint64_t cache;
	unsigned target;   // the worker it goes to with `affinity`
	uint32_t generation;
};

struct uf_worker {
	pid_t pid; // 0: none
	int pidfd;
	bool wanted;
	bool answered; // since it was started
	unsigned quick_deaths; // in a row, before an answer
	uint64_t started_ns, not_before_ns, killed_ns; // killed_ns: for a read that took too long, 0 = not
	struct uf_failure failure; // why it does not start, err 0 = it may
};

enum uf_phase { UF_IDLE, UF_RUNNING, UF_STOPPING };

struct uf_pager {
	pthread_mutex_t lock;
	pthread_cond_t changed; // job done, job free, phase changed; broadcast under lock
	struct uf_pager *next;  // list of all pagers, guarded by registry_lock

	// Constant after creation.
	struct uf_pager_options options;
	char **worker_argv, **worker_env, *scratch_dir;
	size_t page;

	// Guarded by lock from here on.
	enum uf_phase phase;
	struct uf_memory **memories; // by id; NULL = free
	uint32_t memories_capacity, memories_open;
	uint32_t holders; // open memories and live sources: what keeps the threads running
	struct uf_pool shared;
	_Atomic bool attention; // set with each of rescan, low and pending: the fault thread looks without lock
	bool low;                // some pool is
	uint64_t came;           // blocks queued so far
	uint64_t limit, least, resident, resident_peak, reserved;
	unsigned fillers;
	struct uf_op ops[UF_OPS];
	struct uf_job jobs[UF_JOBS];
	unsigned jobs_used, jobs_ahead;
	uint64_t job_seq;
	struct {
		uint32_t memory;
		uint64_t block;
	} pending[UF_PENDING];
	unsigned pending_head, pending_count;
	bool rescan; // background work may go on

	// Write-backs. The stash exists from the first writable memory on.
	char *stash;
	int stash_uffd; // the stash is registered there: UFFDIO_MOVE asks that of its target; -1 = without MOVE
	struct uf_slot slots[UF_SLOTS];
	unsigned slots_used, write_jobs;
	uint64_t slot_seq;
	unsigned moving; // threads between EVICTING and WRITING of dirty blocks: fork waits for them
	unsigned forking; // threads that wait so: no other begins
	int generations[UF_GENERATIONS], generation_end; // pipes: read ends, and a write end between fork's handlers; -1
	uint64_t leaving;
	struct {
		uint32_t memory;
		uint64_t block;
	} repairs[UF_REPAIRS];
	unsigned repairs_head, repairs_count;
	bool repairing;   // an I/O thread is at it
	unsigned writing; // I/O threads that write

	// Fault thread. The descriptors live as long as the phase is not IDLE.
	pthread_t fault_thread, super_thread, io_threads[UF_IO_THREADS];
	bool fault_started, super_started, super_joinable;
	unsigned io_started;
	int epfd, bell, super_bell, pagemap_fd, mem_fd; // mem_fd: /proc/self/mem
	_Atomic int cpu;           // the fault thread runs there, -1 = anywhere
	_Atomic uint64_t spin_ns;
	bool stop_fault, stop_super, stop_io;
	pthread_cond_t io_work;
	struct uf_staging fault_staging;
	struct uf_staging direct_staging[UF_DIRECT_STAGINGS];
	_Atomic uint32_t direct_used; // a bit for each
	_Atomic bool kicked;          // the bell was rung, and the fault thread has not heard it yet

	// Ring and workers; exist from the first worker source on.
	struct uf_ring *ring;
	size_t ring_size;
	int ring_fd, blob_fd;
	uint64_t blob_end;
	struct uf_source_entry sources[UF_RING_SOURCES];
	uint32_t source_generation;
	struct uf_worker workers[UF_MAX_WORKERS];
	uint64_t idle_since_ns;
	uint64_t workers_started, workers_lost, requests, requests_reissued;
};

#endif
