# The engine as the binding sees it: engine/uf.h.
# cython: language_level=3
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "uf.h" nogil:
    enum: UF_MAX_WORKERS, UF_EXTENT, UF_BUCKETS, UF_ERRORS_KEPT
    enum: UF_STAGES
    enum: UF_REQUEST_READ, UF_REQUEST_LOAD, UF_REQUEST_DROP, UF_REQUEST_STOP, UF_REQUEST_WRITE, UF_REQUEST_FLUSH
    enum uf_source_kind:
        UF_SOURCE_ZERO, UF_SOURCE_MEMORY, UF_SOURCE_FILE, UF_SOURCE_WORKER
    enum uf_store_kind:
        UF_STORE_NONE, UF_STORE_SOURCE, UF_STORE_SCRATCH, UF_STORE_STAGED
    enum uf_delivery:
        UF_DELIVERY_THREAD, UF_DELIVERY_DIRECT
    enum uf_advice:
        pass
    struct uf_pager:
        pass
    struct uf_memory:
        pass
    struct uf_ring_client:
        pass
    struct uf_host:
        uint64_t features
        int open_via, open_errno
        bint move, poison, wp, thp, process_madvise
    struct uf_pager_options:
        uint64_t limit
        unsigned workers
        const char **worker_argv
        const char **worker_env
        uint64_t linger_ns, deadline_ns, backoff_ns
        unsigned attempts
        bint user_mode_only, no_extents, no_move
        const char *scratch_dir
    struct uf_memory_options:
        const char *name
        uint64_t nbytes, block
        uf_source_kind source
        const void *address
        int fd
        uint64_t offset
        uint32_t source_id
        uint64_t budget, reserved
        bint no_readahead
        uf_store_kind store
        uint64_t write_unit
        uf_delivery delivery
    struct uf_failure:
        uint64_t block
        int err
        char message[448]
    struct uf_error_record:
        uint64_t block, offset, length, time_ns
        uint32_t attempts
        int err
        bint poisoned, write
        char message[448]
    struct uf_histogram:
        uint64_t count, sum_ns
        uint64_t buckets[160]
    struct uf_stats:
        uint64_t faults, duplicates, blocks_demand, blocks_readahead, blocks_prefetch, blocks_replay, replays_dropped
        uint64_t bytes_read, bytes_extent, evictions, retries, errors, poisoned
        uint64_t resident, resident_peak, budget
        uint64_t upgrades, dirty, writebacks, bytes_written, bytes_scratch, reinstalled, write_errors
        uf_histogram latency[5]
        uint32_t nerrors
        uf_error_record errlog[16]
    struct uf_pager_stats:
        uint64_t limit, resident, resident_peak, reserved, memories
        uint64_t workers_alive, workers_started, workers_lost, requests, requests_reissued
        bint running
    struct uf_trace_record:
        pass
    struct uf_request:
        int kind
        uint32_t index, source_id, generation
        uint64_t offset, length
        void *buffer
        uint64_t capacity, word
    const uf_host *uf_host_probe()
    bint uf_direct_armed()
    int uf_direct_arm()
    int uf_pager_tune(uf_pager *, int, uint64_t)
    int uf_pager_create(const uf_pager_options *, uf_pager **)
    int uf_pager_shutdown(uf_pager *)
    int uf_pager_destroy(uf_pager *)
    void uf_pager_set_limit(uf_pager *, uint64_t)
    void uf_pager_get_stats "uf_pager_stats"(uf_pager *, uf_pager_stats *)
    int uf_source_add(uf_pager *, const void *, size_t, uint32_t *)
    int uf_source_load(uf_pager *, uint32_t, uint64_t, void **, size_t *, bint *, uf_failure *)
    int uf_source_configure(uf_pager *, uint32_t, bint, uint64_t)
    int uf_source_drop(uf_pager *, uint32_t)
    int uf_memory_create(uf_pager *, const uf_memory_options *, uf_memory **)
    void uf_memory_close(uf_memory *)
    void uf_memory_close_under(uf_memory *, uint64_t)
    void uf_memory_destroy(uf_memory *)
    void *uf_memory_address(const uf_memory *)
    bint uf_memory_uses_extents(const uf_memory *)
    void uf_memory_advise(uf_memory *, uf_advice)
    int uf_memory_prefetch(uf_memory *, uint64_t, uint64_t, bint, uf_failure *)
    uint64_t uf_memory_evict(uf_memory *, uint64_t, uint64_t)
    int uf_memory_replay(uf_memory *, const uint64_t *, uint64_t)
    int uf_memory_watch(uf_memory *, bint)
    void uf_memory_unwatch(uf_memory *, bint)
    int uf_memory_watched(uf_memory *, uint64_t *, uint64_t *, uint64_t *, bint)
    int uf_memory_flush(uf_memory *, uint64_t, uint64_t, uf_failure *, uint32_t, uint32_t *)
    int uf_memory_pin(uf_memory *, uint64_t, uint64_t, uf_failure *)
    int uf_memory_unpin(uf_memory *, uint64_t, uint64_t)
    bint uf_memory_forked(const uf_memory *)
    void uf_memory_states(uf_memory *, uint64_t, uint64_t, uint8_t *)
    void uf_memory_stats(uf_memory *, uf_stats *)
    int uf_memory_trace(uf_memory *, uint32_t)
    uint32_t uf_memory_trace_read(uf_memory *, uf_trace_record *, uint32_t, uint64_t *)
    int uf_client_attach(int, int, int, unsigned, uf_ring_client **)
    void uf_client_take(uf_ring_client *, uf_request *)
    int64_t uf_client_blob(uf_ring_client *, uint32_t, void *, size_t)
    uint64_t uf_client_cache(uf_ring_client *, uint32_t)
    uint32_t uf_client_generation(uf_ring_client *, uint32_t)
    bint uf_client_done(uf_ring_client *, const uf_request *, uint64_t)
    bint uf_client_fail(uf_ring_client *, const uf_request *, const char *, uint64_t)
