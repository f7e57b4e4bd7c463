# cython: language_level=3, freethreading_compatible=True, binding=False, embedsignature=False, autotestdict=False
"""The binding of engine/mirror.h and engine/cold.h. No policy; the stub beside this file is its documentation."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport ECHILD, EINVAL
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from posix.unistd cimport getpid

cdef extern from "mirror.h" nogil:
    enum: UF_FOUND_ACCESSED, UF_FOUND_WRITTEN, UF_FOUND_BLIND
    struct uf_span:
        uint64_t start, end
    struct uf_found:
        uint64_t start, end, what
    struct uf_mirror_counts "uf_mirror_stats":
        uint64_t reads, writes, upgrades, pages
    int uf_mirror_available()
    int uf_mirror_begin(const uf_span *runs, size_t n)
    int uf_mirror_collect(const uf_span *runs, size_t n, bint rearm, uf_found **ret, size_t *count)
    int uf_mirror_end(const uf_span *runs, size_t n)
    void uf_mirror_get_stats "uf_mirror_stats"(uf_mirror_counts *ret)

cdef extern from "cold.h" nogil:
    struct uf_cold:
        pass
    struct uf_cold_counts "uf_cold_stats":
        uint64_t out, evicted, loaded, kept
    int uf_cold_create(uint64_t start, uint64_t end, int store, uint64_t offset, uf_cold **ret)
    int uf_cold_detect(uf_cold *c)
    int uf_cold_evict(uf_cold *c, const uf_span *runs, size_t n, uf_span **ret, size_t *count)
    void uf_cold_get_stats "uf_cold_stats"(uf_cold *c, uf_cold_counts *ret)
    int uf_cold_close(uf_cold *c)

ACCESSED, WRITTEN, BLIND = UF_FOUND_ACCESSED, UF_FOUND_WRITTEN, UF_FOUND_BLIND


class MirrorError(Exception):
    def __init__(self, errno):
        super().__init__(errno)
        self.errno = errno


cdef size_t length(const uint64_t[:, ::1] runs) except? -1:
    if runs.shape[1] != 2:
        raise MirrorError(EINVAL)
    return runs.shape[0]


def available():
    cdef int err
    with nogil:
        err = uf_mirror_available()
    return -err


def begin(const uint64_t[:, ::1] runs not None):
    cdef size_t n = length(runs)
    cdef int err = 0
    if n:
        with nogil:
            err = uf_mirror_begin(<const uf_span *>&runs[0, 0], n)
    if err:
        raise MirrorError(-err)


def collect(const uint64_t[:, ::1] runs not None, bint rearm):
    cdef size_t n = length(runs), count = 0
    cdef uf_found *found = NULL
    cdef int err = 0
    if n:
        with nogil:
            err = uf_mirror_collect(<const uf_span *>&runs[0, 0], n, rearm, &found, &count)
    try:
        if err:
            raise MirrorError(-err)
        return PyBytes_FromStringAndSize(<const char *>found, <Py_ssize_t>(count * sizeof(uf_found)))
    finally:
        free(found)


def end(const uint64_t[:, ::1] runs not None):
    cdef size_t n = length(runs)
    if n:
        with nogil:
            uf_mirror_end(<const uf_span *>&runs[0, 0], n)


def stats():
    cdef uf_mirror_counts counts
    with nogil:
        uf_mirror_get_stats(&counts)
    return counts


cdef class Cold:
    cdef uf_cold *c
    cdef int pid

    def __cinit__(self, uint64_t start, uint64_t end, int store, uint64_t offset):
        cdef int err
        with nogil:
            err = uf_cold_create(start, end, store, offset, &self.c)
        if err:
            raise MirrorError(-err)
        self.pid = getpid()

    def __dealloc__(self):
        if self.c != NULL and self.pid == getpid():
            with nogil:
                uf_cold_close(self.c)

    cdef int open(self) except -1:
        # In a forked child the engine has freed it.
        if self.c == NULL or self.pid != getpid():
            raise MirrorError(EINVAL if self.c == NULL else ECHILD)
        return 0

    def detect(self):
        self.open()
        cdef int err
        with nogil:
            err = uf_cold_detect(self.c)
        if err:
            raise MirrorError(-err)

    def evict(self, const uint64_t[:, ::1] runs not None):
        self.open()
        cdef size_t n = length(runs), count = 0
        cdef uf_span *went = NULL
        cdef int err = 0
        if n:
            with nogil:
                err = uf_cold_evict(self.c, <const uf_span *>&runs[0, 0], n, &went, &count)
        try:
            return PyBytes_FromStringAndSize(<const char *>went, <Py_ssize_t>(count * sizeof(uf_span))), -err
        finally:
            free(went)

    def stats(self):
        self.open()
        cdef uf_cold_counts counts
        with nogil:
            uf_cold_get_stats(self.c, &counts)
        return counts

    def close(self):
        cdef uf_cold *c = self.c
        cdef int err
        if c == NULL:
            return
        self.c = NULL
        if self.pid != getpid():
            return
        with nogil:
            err = uf_cold_close(c)
        if err:
            raise MirrorError(-err)
