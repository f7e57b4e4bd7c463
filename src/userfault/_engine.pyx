# cython: language_level=3, freethreading_compatible=True, binding=False, embedsignature=False, autotestdict=False
"""The binding: checks arguments, releases the GIL, makes one engine call, maps the error. No policy.

The stub beside this file is its documentation.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_READ, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBUF_WRITE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EBADF, EINVAL, EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from userfault._uf cimport *

EXTENT = UF_EXTENT
MAX_WORKERS = UF_MAX_WORKERS
TRACE_RECORD_SIZE = sizeof(uf_trace_record)
STORE_NONE, STORE_SOURCE, STORE_SCRATCH, STORE_STAGED = UF_STORE_NONE, UF_STORE_SOURCE, UF_STORE_SCRATCH, UF_STORE_STAGED
DELIVERY_THREAD, DELIVERY_DIRECT = UF_DELIVERY_THREAD, UF_DELIVERY_DIRECT
# Failed blocks that one flush describes; of a failing disk all dirty blocks fail.
MAX_FAILURES = 1 << 16


class EngineError(Exception):
    def __init__(self, errno, message="", block=0):
        super().__init__(errno, message, block)
        self.errno = errno
        self.message = message
        self.block = block


cdef int check(int err) except -1:
    if err < 0:
        raise EngineError(-err)
    return 0


cdef object failure(int err, uf_failure *why):
    return EngineError(-err, why.message.decode("utf-8", "replace"), why.block)


def host():
    cdef const uf_host *h
    with nogil:
        h = uf_host_probe()
    return {
        "features": h.features, "open_via": h.open_via, "open_errno": h.open_errno, "move": bool(h.move),
        "poison": bool(h.poison), "wp": bool(h.wp), "thp": bool(h.thp), "process_madvise": bool(h.process_madvise),
    }


def direct_armed():
    return bool(uf_direct_armed())


def direct_arm():
    check(uf_direct_arm())


cdef const char **strings(list items) except NULL:
    cdef const char **out = <const char **>calloc(len(items) + 1, sizeof(char *))
    if out == NULL:
        raise MemoryError()
    cdef bytes item
    for i in range(len(items)):
        item = items[i]
        out[i] = item  # the list keeps it alive
    return out


cdef class Pager:
    cdef uf_pager *p
    cdef bytes scratch

    def __cinit__(self, *, uint64_t limit, unsigned workers, list argv, list env, uint64_t linger_ns,
                  uint64_t deadline_ns, unsigned attempts, uint64_t backoff_ns, bint user_mode_only=False,
                  bint no_extents=False, bytes scratch_dir=None, bint no_move=False):
        cdef uf_pager_options o
        memset(&o, 0, sizeof(o))
        o.limit, o.workers, o.linger_ns, o.deadline_ns = limit, workers, linger_ns, deadline_ns
        o.attempts, o.backoff_ns, o.user_mode_only, o.no_extents = attempts, backoff_ns, user_mode_only, no_extents
        o.no_move = no_move
        if scratch_dir is not None:
            self.scratch = scratch_dir
            o.scratch_dir = self.scratch
        cdef int err
        try:
            o.worker_argv = strings(argv)
            o.worker_env = strings(env)
            with nogil:
                err = uf_pager_create(&o, &self.p)
        finally:
            free(o.worker_argv)
            free(o.worker_env)
        check(err)

    def __dealloc__(self):
        if self.p != NULL:
            with nogil:
                uf_pager_destroy(self.p)  # memories hold a reference: none is open

    def shutdown(self):
        cdef int err
        with nogil:
            err = uf_pager_shutdown(self.p)
        check(err)

    def set_limit(self, uint64_t limit):
        with nogil:
            uf_pager_set_limit(self.p, limit)

    def tune(self, int cpu, uint64_t spin_ns):
        cdef int err
        with nogil:
            err = uf_pager_tune(self.p, cpu, spin_ns)
        check(err)

    def stats(self):
        cdef uf_pager_stats s
        with nogil:
            uf_pager_get_stats(self.p, &s)
        return s

    def add_source(self, const uint8_t[::1] blob not None):
        cdef uint32_t source = 0
        cdef int err
        cdef size_t n = blob.shape[0]
        with nogil:
            err = uf_source_add(self.p, &blob[0] if n else NULL, n, &source)
        check(err)
        return source

    def load_source(self, uint32_t source, uint64_t timeout_ns):
        cdef void *reply = NULL
        cdef size_t n = 0
        cdef bint failed = False
        cdef uf_failure why
        cdef int err
        with nogil:
            err = uf_source_load(self.p, source, timeout_ns, &reply, &n, &failed, &why)
        if err:
            raise failure(err, &why)
        try:
            return PyBytes_FromStringAndSize(<char *>reply, <Py_ssize_t>n), bool(failed), why.message.decode("utf-8", "replace")
        finally:
            free(reply)

    def configure_source(self, uint32_t source, bint affinity, uint64_t cache):
        cdef int err
        with nogil:
            err = uf_source_configure(self.p, source, affinity, cache)
        check(err)

    def drop_source(self, uint32_t source):
        cdef int err
        with nogil:
            err = uf_source_drop(self.p, source)
        check(err)


# The collector must not take the pager away before __dealloc__ has given the memory back to it.
@cython.no_gc_clear
cdef class Memory:
    cdef uf_memory *m
    cdef readonly Pager pager
    cdef readonly uint64_t nbytes, block, nblocks, address
    cdef readonly bint closed, writable
    cdef Py_ssize_t exports
    cdef int64_t source_id
    cdef Py_buffer origin
    cdef bint has_origin
    cdef object __weakref__

    def __cinit__(self, *args, **kwargs):
        self.source_id = -1

    def __init__(self, Pager pager not None, *, bytes name not None, uint64_t nbytes, uint64_t block, int kind,
                 object origin=None, int fd=-1, uint64_t offset=0, int64_t source_id=-1, uint64_t budget=0,
                 uint64_t reserved=0, bint readahead=True, int store=0, uint64_t write_unit=0, int delivery=0):
        cdef uf_memory_options o
        cdef uf_memory *m = NULL
        cdef int err
        if self.m != NULL:
            raise EngineError(EINVAL, "initialised twice")
        memset(&o, 0, sizeof(o))
        o.name, o.nbytes, o.block, o.source = name, nbytes, block, <uf_source_kind>kind
        o.fd, o.offset, o.budget, o.reserved, o.no_readahead = fd, offset, budget, reserved, not readahead
        o.store, o.write_unit, o.delivery = <uf_store_kind>store, write_unit, <uf_delivery>delivery
        if kind == UF_SOURCE_MEMORY:
            PyObject_GetBuffer(origin, &self.origin, PyBUF_SIMPLE)
            self.has_origin = True
            if offset + nbytes > <uint64_t>self.origin.len:
                raise EngineError(EINVAL, "the buffer is shorter than offset + nbytes")
            o.address = <char *>self.origin.buf + offset
        elif kind == UF_SOURCE_WORKER:
            o.source_id = <uint32_t>source_id
        with nogil:
            err = uf_memory_create(pager.p, &o, &m)
        check(err)
        self.m = m
        self.pager = pager
        self.nbytes, self.block, self.nblocks = nbytes, block, (nbytes + block - 1) // block
        self.address = <uintptr_t>uf_memory_address(m)
        self.source_id = source_id if kind == UF_SOURCE_WORKER else -1
        self.writable = store != UF_STORE_NONE

    def __dealloc__(self):
        if self.m != NULL:
            with nogil:
                uf_memory_destroy(self.m)
        self.drop()
        if self.has_origin:
            PyBuffer_Release(&self.origin)

    cdef void drop(self) noexcept:
        # The worker's source goes with its memory.
        if self.source_id >= 0:
            uf_source_drop(self.pager.p, <uint32_t>self.source_id)
            self.source_id = -1

    def __getbuffer__(self, Py_buffer *view, int flags):
        with cython.critical_section(self):
            if self.m == NULL or self.closed:
                raise BufferError("the memory is closed")
            if flags & PyBUF_WRITABLE and not self.writable:
                raise BufferError("the memory is read-only")
            PyBuffer_FillInfo(
                view, self, <void *><uintptr_t>self.address, <Py_ssize_t>self.nbytes, not self.writable, flags
            )
            self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        with cython.critical_section(self):
            self.exports -= 1

    cdef int ready(self) except -1:
        if self.m == NULL or self.closed:
            raise EngineError(EBADF, "the memory is closed")
        return 0

    def _close(self, bint quiet=False):
        with cython.critical_section(self):
            if self.m == NULL or self.closed:
                return
            self.closed = True
        cdef unsigned long long buffers = self.exports
        with nogil:
            if buffers and not quiet:
                uf_memory_close_under(self.m, buffers)
            else:
                uf_memory_close(self.m)
        self.drop()

    @property
    def _exports(self):
        return self.exports

    @property
    def extents(self):
        return bool(uf_memory_uses_extents(self.m)) if self.m != NULL else False

    def _advise(self, int advice):
        self.ready()
        with nogil:
            uf_memory_advise(self.m, <uf_advice>advice)

    def _prefetch(self, uint64_t first, uint64_t count, bint wait):
        cdef uf_failure why
        cdef int err
        self.ready()
        with nogil:
            err = uf_memory_prefetch(self.m, first, count, wait, &why)
        if err:
            raise failure(err, &why)

    def _evict(self, uint64_t first, uint64_t count):
        cdef uint64_t freed
        self.ready()
        with nogil:
            freed = uf_memory_evict(self.m, first, count)
        return freed

    def _flush(self, uint64_t first, uint64_t count):
        cdef uint32_t n = 0, most
        cdef int err
        self.ready()
        most = <uint32_t>max(1, min(count, <uint64_t>MAX_FAILURES))
        cdef uf_failure *failures = <uf_failure *>calloc(most, sizeof(uf_failure))
        if failures == NULL:
            raise MemoryError()
        try:
            with nogil:
                err = uf_memory_flush(self.m, first, count, failures, most, &n)
            if err == 0:
                return []
            if err != -EIO or n == 0:
                raise failure(err, &failures[0])
            return [
                (failures[i].block, abs(failures[i].err), failures[i].message.decode("utf-8", "replace"))
                for i in range(min(n, most))
            ]
        finally:
            free(failures)

    def _pin(self, uint64_t first, uint64_t count):
        cdef uf_failure why
        cdef int err
        self.ready()
        memset(&why, 0, sizeof(why))
        with nogil:
            err = uf_memory_pin(self.m, first, count, &why)
        if err:
            raise failure(err, &why)

    def _unpin(self, uint64_t first, uint64_t count):
        cdef int err
        self.ready()
        with nogil:
            err = uf_memory_unpin(self.m, first, count)
        check(err)

    def _replay(self, const uint64_t[:, ::1] extents not None):
        cdef int err
        cdef uint64_t n = extents.shape[0]
        self.ready()
        if extents.shape[1] != 2:
            raise EngineError(EINVAL, "extents are pairs")
        if n:
            with nogil:
                err = uf_memory_replay(self.m, &extents[0, 0], n)
            check(err)

    def _watch(self, bint accesses):
        cdef int err
        self.ready()
        with nogil:
            err = uf_memory_watch(self.m, accesses)
        check(err)

    def _unwatch(self, bint accesses):
        if self.m != NULL:
            with nogil:
                uf_memory_unwatch(self.m, accesses)

    def _watched(self, uint64_t[:, ::1] out not None, bint rearm):
        cdef int err
        self.ready()
        if out.shape[0] != 3 or <uint64_t>out.shape[1] != (self.nblocks + 63) // 64:
            raise EngineError(EINVAL, "three rows of a bit for each block")
        with nogil:
            err = uf_memory_watched(self.m, &out[0, 0], &out[1, 0], &out[2, 0], rearm)
        check(err)

    @property
    def _forked(self):
        return bool(uf_memory_forked(self.m)) if self.m != NULL else False

    def _states(self, uint64_t first, uint8_t[::1] out not None):
        cdef uint64_t n = out.shape[0]
        if first > self.nblocks or n > self.nblocks - first:
            raise EngineError(EINVAL, "blocks out of range")
        if n and self.m != NULL:
            with nogil:
                uf_memory_states(self.m, first, n, &out[0])

    def _stats(self):
        cdef uf_stats s
        with nogil:
            uf_memory_stats(self.m, &s)
        return s

    def _trace(self, uint32_t capacity):
        cdef int err
        with nogil:
            err = uf_memory_trace(self.m, capacity)
        check(err)

    def _trace_read(self, uint8_t[::1] out not None):
        cdef uint64_t lost = 0
        cdef uint32_t n = 0, most = <uint32_t>(<size_t>out.shape[0] // sizeof(uf_trace_record))
        if most:
            with nogil:
                n = uf_memory_trace_read(self.m, <uf_trace_record *>&out[0], most, &lost)
        return n, lost


cdef class Request:
    cdef uf_request r
    cdef uf_ring_client *c

    @property
    def kind(self):
        return self.r.kind

    @property
    def source(self):
        return self.r.source_id, self.r.generation

    @property
    def offset(self):
        return self.r.offset

    @property
    def buffer(self):
        cdef bint sized = self.r.kind == UF_REQUEST_READ or self.r.kind == UF_REQUEST_WRITE
        cdef uint64_t n = self.r.length if sized else self.r.capacity
        cdef int access = PyBUF_READ if self.r.kind == UF_REQUEST_WRITE else PyBUF_WRITE
        return PyMemoryView_FromMemory(<char *>self.r.buffer, <Py_ssize_t>n, access)

    def done(self, uint64_t reply_length=0):
        cdef bint ok
        with nogil:
            ok = uf_client_done(self.c, &self.r, reply_length)
        return bool(ok)

    def fail(self, bytes message not None, uint64_t reply_length=0):
        cdef bint ok
        cdef const char *text = message
        with nogil:
            ok = uf_client_fail(self.c, &self.r, text, reply_length)
        return bool(ok)


cdef class Client:
    cdef uf_ring_client *c

    def __cinit__(self, int ring_fd, int blob_fd, int bell_fd, unsigned worker):
        check(uf_client_attach(ring_fd, blob_fd, bell_fd, worker, &self.c))

    def take(self):
        cdef Request r = Request.__new__(Request)
        r.c = self.c
        with nogil:
            uf_client_take(self.c, &r.r)
        return r

    def blob(self, uint32_t source):
        cdef int64_t n = uf_client_blob(self.c, source, NULL, 0)
        if n < 0:
            raise EngineError(<int>-n, "the source was dropped")
        out = PyBytes_FromStringAndSize(NULL, n)
        cdef char *at = out
        n = uf_client_blob(self.c, source, at, <size_t>n)
        if n < 0:
            raise EngineError(<int>-n, "the source cannot be read")
        return out

    def cache(self, uint32_t source):
        return uf_client_cache(self.c, source)

    def generation(self, uint32_t source):
        return uf_client_generation(self.c, source)


READ, LOAD, DROP, STOP = UF_REQUEST_READ, UF_REQUEST_LOAD, UF_REQUEST_DROP, UF_REQUEST_STOP
WRITE, FLUSH = UF_REQUEST_WRITE, UF_REQUEST_FLUSH
