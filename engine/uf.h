// SPDX-License-Identifier: Apache-2.0
// userfault engine: the public interface.
//
// A *pager* serves the page faults of its *memories*. It owns one fault thread, a memory budget and, when a source
// needs them, worker processes and I/O threads. A *memory* is a reserved address range cut in *blocks* (a power of two
// of bytes, at least a page) whose bytes come from a *source*.
//
// The engine knows nothing of Python and never calls back into its user: a thread that waits in a page fault may hold
// any lock of the embedding program (Python's GIL for one), so nothing that resolves faults may need one.
//
// A handler of an asynchronous signal (SIGALRM, SIGPROF), written in C, must not touch the memories: the thread that it interrupts
// may be inside the engine, and then would wait for itself. (Python's handlers run between bytecodes.)
//
// Unless a comment says otherwise a function may be called from any thread, takes the pager's lock for a short time
// only, and must not be called from a signal handler. Functions return 0 or a negative errno.
#ifndef UF_H
#define UF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct uf_pager;
struct uf_memory;

enum {
	UF_NAME_MAX = 192,       // bytes of a memory's name that error lines show
	UF_MESSAGE_MAX = 448,    // bytes of a source's error message that are kept
	UF_ERRORS_KEPT = 16,     // newest errors kept per memory
	UF_BUCKETS = 160,        // latency histogram: four buckets an octave of nanoseconds
	UF_MAX_WORKERS = 16,
	UF_EXTENT = 2 << 20,     // bytes filled at once by prefetch, and the largest block
};

// The low four bits of a block's state word. LOADING, UPGRADING and EVICTING are owned: entered by compare-and-swap,
// left only by their owner, who stores the new state and then wakes the whole block.
enum uf_state {
	UF_ABSENT = 0,
	UF_LOADING = 1,
	UF_CLEAN = 2,
	UF_UPGRADING = 3,
	UF_DIRTY = 4,
	UF_EVICTING = 5,
	UF_WRITING = 6,
	UF_POISONED = 7,
	UF_REINSTALLED = 8, // resident, dirty, and an older write-back is under way
	UF_RESTORED = 9,    // resident, write-protected, and its write-back is under way
};

enum uf_source_kind { UF_SOURCE_ZERO, UF_SOURCE_MEMORY, UF_SOURCE_FILE, UF_SOURCE_WORKER };

// Where dirty blocks go. SOURCE: where they came from (FILE: its descriptor is writable; WORKER: the source's write). SCRATCH:
// changes stay private, and leave memory for a scratch file, compressed. STAGED (WORKER only): to scratch, and a flush
// writes all that changed to the source and commits.
enum uf_store_kind { UF_STORE_NONE, UF_STORE_SOURCE, UF_STORE_SCRATCH, UF_STORE_STAGED };

// Who resolves a fault: the fault thread, or the faulting thread itself inside a handler of SIGBUS (UFFD_FEATURE_SIGBUS).
enum uf_delivery { UF_DELIVERY_THREAD, UF_DELIVERY_DIRECT };

enum uf_advice { UF_NORMAL, UF_RANDOM, UF_SEQUENTIAL };

enum uf_trace_kind { UF_TRACE_DEMAND = 1, UF_TRACE_READAHEAD, UF_TRACE_PREFETCH, UF_TRACE_EVICT, UF_TRACE_POISON,
		     UF_TRACE_WRITE, UF_TRACE_DIRTY, UF_TRACE_REPLAY };

enum uf_stage { UF_STAGE_QUEUE, UF_STAGE_SOURCE, UF_STAGE_INSTALL, UF_STAGE_FAULT, UF_STAGE_WRITE, UF_STAGES };

// What this kernel and user can do, found by trying. `open_via`: 0 no userfaultfd at all, 1 /dev/userfaultfd, 2 the
// system call, 3 the system call with UFFD_USER_MODE_ONLY (system calls on missing pages get EFAULT).
struct uf_host {
	uint64_t features;
	int open_via;
	int open_errno; // why the strongest way failed, 0 if it did not
	bool move;      // UFFDIO_MOVE (6.8)
	bool poison;    // UFFDIO_POISON (6.6)
	bool wp;        // write protection of anonymous memory (5.7)
	bool thp;       // huge pages by madvise are allowed
	bool process_madvise; // MADV_DONTNEED of many ranges at once on the own process
};

struct uf_pager_options {
	uint64_t limit;              // bytes that all memories may keep resident together
	unsigned workers;            // most worker processes, 1..UF_MAX_WORKERS
	const char *const *worker_argv; // NULL-terminated; the ring's fds are 3 (ring), 4 (blobs), 5 (bell)
	const char *const *worker_env;  // NULL-terminated, or NULL to inherit
	uint64_t linger_ns;          // idle threads and workers end this long after the last memory was closed
	uint64_t deadline_ns;        // a worker that keeps one read longer than this is killed
	unsigned attempts;           // tries of a failing read before its block is poisoned, at least 1
	uint64_t backoff_ns;         // pause before the second try; doubles
	bool user_mode_only;         // do not ask for more than UFFD_USER_MODE_ONLY (for tests)
	bool no_extents;             // never use 2 MiB extents (for tests and comparison)
	bool no_move;                // never use UFFDIO_MOVE (for tests: what Linux before 6.8 does)
	const char *scratch_dir;     // where scratch files are made, without a name; NULL: /var/tmp
};

struct uf_memory_options {
	const char *name;
	uint64_t nbytes;      // > 0
	uint64_t block;       // power of two, page size..UF_EXTENT
	enum uf_source_kind source;
	const void *address;  // UF_SOURCE_MEMORY: must stay valid until the memory is destroyed
	int fd;               // UF_SOURCE_FILE: duplicated
	uint64_t offset;      // UF_SOURCE_FILE: where byte 0 of the memory is
	uint32_t source_id;   // UF_SOURCE_WORKER: from uf_source_add
	uint64_t budget;      // bytes of a budget of its own, 0: shares the pager's
	uint64_t reserved;    // bytes that the source keeps elsewhere for this memory (decoded chunks); taken off the budget
	bool no_readahead;
	enum uf_store_kind store;
	uint64_t write_unit;  // power of two from block to UF_EXTENT, 0 = block: dirty blocks of one unit are written together
	enum uf_delivery delivery;
};

struct uf_error_record {
	uint64_t block, offset, length, time_ns; // time: CLOCK_REALTIME
	uint32_t attempts;
	int err;
	bool poisoned;
	bool write; // it could not be written back, and stays dirty
	char message[UF_MESSAGE_MAX];
};

struct uf_histogram {
	uint64_t count, sum_ns, buckets[UF_BUCKETS];
};

struct uf_stats {
	uint64_t faults;           // messages for blocks that were absent
	uint64_t duplicates;       // messages for blocks that were loading or there already
	uint64_t blocks_demand, blocks_readahead, blocks_prefetch, blocks_replay;
	uint64_t replays_dropped;  // plans that the program did not follow
	uint64_t bytes_read;       // read from the source
	uint64_t bytes_extent;     // of these, installed as 2 MiB extents
	uint64_t evictions;        // blocks
	uint64_t retries, errors, poisoned;
	uint64_t resident, resident_peak, budget;
	uint64_t upgrades;         // first writes to clean blocks
	uint64_t dirty;            // bytes that are not yet where they belong
	uint64_t writebacks;       // blocks written back
	uint64_t bytes_written;    // to the source or to scratch, before compression
	uint64_t bytes_scratch;    // of scratch in use, after compression
	uint64_t reinstalled;      // blocks that came back from a write-back under way
	uint64_t write_errors;     // write-backs that failed
	struct uf_histogram latency[UF_STAGES];
	uint32_t nerrors;
	struct uf_error_record errlog[UF_ERRORS_KEPT]; // oldest first
};

struct uf_pager_stats {
	uint64_t limit, resident, resident_peak, reserved, memories;
	uint64_t workers_alive, workers_started, workers_lost, requests, requests_reissued;
	bool running;
};

struct uf_trace_record {
	uint64_t t_ns; // CLOCK_MONOTONIC
	uint32_t block;
	uint32_t took_ns; // DEMAND: from the fault's message to its block in place, 0 = not known; UINT32_MAX = that or longer
	uint8_t kind;
	uint8_t pad[7];
};

// How a wait or a prefetch failed.
struct uf_failure {
	uint64_t block;
	int err;
	char message[UF_MESSAGE_MAX];
};

// Probes once and keeps the answer. May block for some milliseconds the first time.
const struct uf_host *uf_host_probe(void);

// --- pager
int uf_pager_create(const struct uf_pager_options *o, struct uf_pager **ret);
// Direct delivery needs our handler of SIGBUS. True: it stands there. False after another library has put its own in its place:
// then the next fault would kill the process; uf_direct_arm puts ours back, before the other, which it passes real bus
// errors on to.
bool uf_direct_armed(void);
int uf_direct_arm(void);
// Where the fault thread runs (a CPU, -1: anywhere) and how long it looks for the next fault before it sleeps.
int uf_pager_tune(struct uf_pager *p, int cpu, uint64_t spin_ns);
// Ends threads and workers now if no memory is open; -EBUSY otherwise. May block until the workers are gone (1 s at most).
int uf_pager_shutdown(struct uf_pager *p);
// Shutdown and free. No memory may be open.
int uf_pager_destroy(struct uf_pager *p);
void uf_pager_set_limit(struct uf_pager *p, uint64_t limit);
void uf_pager_stats(struct uf_pager *p, struct uf_pager_stats *ret);

// --- sources in workers
// Keeps a copy of `blob`, which the workers read when they first need the source. Starts a worker if none runs.
int uf_source_add(struct uf_pager *p, const void *blob, size_t len, uint32_t *ret);
// Has a worker load the source and waits for its answer; may block. On success or on a failure that the worker
// described, `*reply` (malloc) holds what it sent and `*failed` says which of the two it is. Other failures: negative
// errno with `why` filled in.
int uf_source_load(struct uf_pager *p, uint32_t id, uint64_t timeout_ns, void **reply, size_t *len, bool *failed,
		   struct uf_failure *why);
// `affinity`: one worker serves all reads. `cache`: bytes that the source may keep in each worker.
int uf_source_configure(struct uf_pager *p, uint32_t id, bool affinity, uint64_t cache);
int uf_source_drop(struct uf_pager *p, uint32_t id);

// --- memory
int uf_memory_create(struct uf_pager *p, const struct uf_memory_options *o, struct uf_memory **ret);
// Ends service: later accesses die with SIGSEGV, waiting ones too; never zeros, never a hang. Idempotent, never blocks on
// a fault. The addresses stay reserved until uf_memory_destroy.
void uf_memory_close(struct uf_memory *m);
// The same with a line on stderr, for a memory of which `buffers` are still in use.
void uf_memory_close_under(struct uf_memory *m, uint64_t buffers);
// Closes, gives the addresses back. Nobody may use `m` or its addresses afterwards.
void uf_memory_destroy(struct uf_memory *m);
void *uf_memory_address(const struct uf_memory *m);
bool uf_memory_uses_extents(const struct uf_memory *m);
void uf_memory_advise(struct uf_memory *m, enum uf_advice advice);
// Loads blocks [first, first + count). With `wait` the calling thread works and waits (-EIO and friends with `why`),
// without it the pager does it in the background as far as it can.
int uf_memory_prefetch(struct uf_memory *m, uint64_t first, uint64_t count, bool wait, struct uf_failure *why);
// Takes resident blocks of the range out, dirty ones after they were written back; returns how many bytes went.
uint64_t uf_memory_evict(struct uf_memory *m, uint64_t first, uint64_t count);
// Returns when everything that was written to the range before the call is durable. -EIO: `*n` blocks could not be written;
// they stay dirty and resident, and the first `most` of them are described. Other errors: -EBADF it was closed, -EPERM it was
// inherited by fork. May block for as long as the store does.
int uf_memory_flush(struct uf_memory *m, uint64_t first, uint64_t count, struct uf_failure *failures, uint32_t most,
		    uint32_t *n);
// Loads extents (pairs of first block and count) in the background, in this order, as far ahead of demand as the budget
// allows; in the place of a plan that is under way. -EBADF: it is closed.
int uf_memory_replay(struct uf_memory *m, const uint64_t *extents, uint64_t n);
// From now on blocks that are touched are noted: with `accesses` all that are touched (what is resident is evicted, readahead is off),
// else only those that are written (what is dirty is written back). Counted: as many uf_memory_unwatch end it. May block
// for as long as the store does.
int uf_memory_watch(struct uf_memory *m, bool accesses);
void uf_memory_unwatch(struct uf_memory *m, bool accesses);
// What was noted: a bit per block, in (nblocks + 63) / 64 words each. `accessed` tells nothing of reads unless accesses are watched.
// `blind`: nobody can tell, so they count as touched. `rearm`: begins a new interval; nothing is lost between the two; may block for as
// long as the store does, and the source of a block that is being written to for the first time. The words must not lie in paged memory.
// -EINVAL: it is not watched.
int uf_memory_watched(struct uf_memory *m, uint64_t *accessed, uint64_t *written, uint64_t *blind, bool rearm);
// Keeps blocks resident, present and at their physical place as far as the engine moves them, until they are unpinned as
// often. For memory that devices write to.
int uf_memory_pin(struct uf_memory *m, uint64_t first, uint64_t count, struct uf_failure *why);
int uf_memory_unpin(struct uf_memory *m, uint64_t first, uint64_t count);
// True in a forked child for a writable memory that it inherited: its changes stay private, and flush refuses.
bool uf_memory_forked(const struct uf_memory *m);
// One byte per block: its enum uf_state.
void uf_memory_states(struct uf_memory *m, uint64_t first, uint64_t count, uint8_t *ret);
void uf_memory_stats(struct uf_memory *m, struct uf_stats *ret);
// `capacity`: records, rounded up to a power of two; 0 ends the trace.
int uf_memory_trace(struct uf_memory *m, uint32_t capacity);
// Copies up to `max` records and forgets them; `*lost` counts those that were overwritten before they were read.
uint32_t uf_memory_trace_read(struct uf_memory *m, struct uf_trace_record *ret, uint32_t max, uint64_t *lost);
// True where [address, address + len) touches memory that a pager serves.
bool uf_is_paged(const void *address, size_t len);

// --- the worker's side (worker.c), used in worker processes only
enum uf_request_kind { UF_REQUEST_READ = 1, UF_REQUEST_LOAD, UF_REQUEST_DROP, UF_REQUEST_STOP, UF_REQUEST_WRITE, UF_REQUEST_FLUSH };

struct uf_ring_client;

struct uf_request {
	enum uf_request_kind kind;
	uint32_t index, source_id, generation; // ids are used again; the pair is not
	uint64_t offset, length; // bytes of the source
	void *buffer;            // `length` bytes for READ (to fill) and WRITE (to store); the whole slot for LOAD
	uint64_t capacity;       // bytes of the slot
	uint64_t word;           // the claim
};

int uf_client_attach(int ring_fd, int blob_fd, int bell_fd, unsigned worker, struct uf_ring_client **ret);
void uf_client_detach(struct uf_ring_client *c);
// Waits for a request that this worker may serve. May block; wakes at least each second to look whether its owner is alive.
void uf_client_take(struct uf_ring_client *c, struct uf_request *ret);
// The source's blob: its length, and with `ret` a copy of it.
int64_t uf_client_blob(struct uf_ring_client *c, uint32_t source_id, void *ret, size_t len);
uint64_t uf_client_cache(struct uf_ring_client *c, uint32_t source_id);
uint32_t uf_client_generation(struct uf_ring_client *c, uint32_t source_id); // 0: dropped
// Answers. `len`: bytes of the reply in the slot (LOAD). False if the request had been taken away.
bool uf_client_done(struct uf_ring_client *c, const struct uf_request *r, uint64_t len);
bool uf_client_fail(struct uf_ring_client *c, const struct uf_request *r, const char *message, uint64_t reply_len);

#ifdef __cplusplus
}
#endif
#endif
