# cython: language_level=3, freethreading_compatible=True, binding=False, embedsignature=False, autotestdict=False
"""The binding to engine/arrays.h, and the two looks into the interpreter that a recording of a whole program needs.

The stub beside this file is its documentation.
"""

import importlib
import sys

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.dict cimport PyDict_Clear
from cpython.ref cimport Py_INCREF, PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset, strcmp

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *)
    void Py_XDECREF(PyObject *)

cdef extern from "arrays.h" nogil:
    enum uf_array_pages:
        UF_ARRAY_PAGES_DEFAULT, UF_ARRAY_PAGES_HUGE, UF_ARRAY_PAGES_SMALL
    enum: UF_ARRAY_BORN, UF_ARRAY_DIED
    struct uf_array_allocator:
        void *ctx
    struct uf_array_handler:
        char name[127]
        uint8_t version
        uf_array_allocator allocator
    struct uf_array_options:
        uint64_t threshold, most_dead
        uf_array_pages pages
        uf_array_allocator below
    struct uf_array_event:
        uint64_t address, nbytes, born_ns, died_ns
        uint32_t kind, dropped
    struct uf_array_stats:
        uint64_t live, live_bytes, dead, dead_bytes, brief, brief_bytes, brief_most, spare_bytes, failed
    uf_array_handler *uf_arrays_handler()
    int uf_arrays_start(const uf_array_options *o)
    void uf_arrays_stop()
    size_t uf_arrays_drain(uint64_t min_age_ns, uf_array_event *out, size_t most)
    bint uf_arrays_is_young(uint64_t address)
    bint uf_arrays_release(uint64_t address)
    void uf_arrays_get_stats(uf_array_stats *ret)

PAGES_DEFAULT, PAGES_HUGE, PAGES_SMALL = UF_ARRAY_PAGES_DEFAULT, UF_ARRAY_PAGES_HUGE, UF_ARRAY_PAGES_SMALL
BORN, DIED = UF_ARRAY_BORN, UF_ARRAY_DIED

# NumPy's table of C functions. Its slots are part of the ABI: these hold for both ABIs that there are, from NumPy 1.22
# (feature version 15) on.
cdef enum:
    SLOT_ABI_VERSION = 0
    SLOT_FEATURE_VERSION = 211
    SLOT_SET_HANDLER = 304
    SLOT_GET_HANDLER = 305
    SLOT_DEFAULT_HANDLER = 306
    FIRST_FEATURE_VERSION = 15
    CO_OPTIMIZED = 1

ctypedef unsigned (*version_function)()
ctypedef PyObject *(*set_function)(PyObject *) except NULL
ctypedef PyObject *(*get_function)() except NULL

cdef const char *CAPSULE = "mem_handler"
cdef set_function set_handler = NULL
cdef get_function get_handler = NULL
cdef PyObject *numpys = NULL  # the capsule of NumPy's own handler
cdef PyObject *ours = NULL    # kept for ever: arrays refer to it


class HandlerError(Exception):
    pass


cdef uf_array_handler *handler_of(PyObject *capsule) except NULL:
    return <uf_array_handler *>PyCapsule_GetPointer(<object>capsule, CAPSULE)


cdef int prepare() except -1:
    global set_handler, get_handler, numpys, ours
    cdef void **table
    if ours != NULL:
        return 0
    try:
        module = importlib.import_module("numpy._core._multiarray_umath")
    except ImportError:
        module = importlib.import_module("numpy.core._multiarray_umath")
    table = <void **>PyCapsule_GetPointer(module._ARRAY_API, NULL)
    cdef unsigned abi = (<version_function>table[SLOT_ABI_VERSION])()
    if abi != 0x01000009 and abi != 0x02000000:
        raise HandlerError(f"NumPy has an ABI that is not known here ({abi:#x})")
    if (<version_function>table[SLOT_FEATURE_VERSION])() < FIRST_FEATURE_VERSION:
        raise HandlerError("NumPy is older than 1.22 and has no allocator hook")
    numpys = (<PyObject **>table[SLOT_DEFAULT_HANDLER])[0]
    if numpys == NULL or not PyCapsule_IsValid(<object>numpys, CAPSULE) or handler_of(numpys).version != 1:
        raise HandlerError("NumPy's allocator hook is not the one of NEP 49, version 1")
    set_handler = <set_function>table[SLOT_SET_HANDLER]
    get_handler = <get_function>table[SLOT_GET_HANDLER]
    capsule = PyCapsule_New(uf_arrays_handler(), CAPSULE, NULL)
    Py_INCREF(capsule)
    ours = <PyObject *>capsule
    return 0


def start(uint64_t threshold, int pages, uint64_t most_dead):
    cdef uf_array_options o
    prepare()
    memset(&o, 0, sizeof(o))
    o.threshold, o.pages, o.most_dead = threshold, <uf_array_pages>pages, most_dead
    o.below = handler_of(numpys).allocator
    cdef int err = uf_arrays_start(&o)
    if err:
        raise OSError(-err, "arrays are recorded already" if err == -16 else "the threshold is below a page")


def stop():
    with nogil:
        uf_arrays_stop()


def install():
    prepare()
    cdef PyObject *old = get_handler()
    cdef bint numpys_own = strcmp(handler_of(old).name, handler_of(numpys).name) == 0
    cdef bint own = old == ours
    Py_XDECREF(old)
    if not numpys_own:
        return own
    Py_XDECREF(set_handler(ours))
    return True


def uninstall():
    prepare()
    cdef PyObject *old = get_handler()
    cdef bint own = old == ours
    Py_XDECREF(old)
    if own:
        Py_XDECREF(set_handler(NULL))


def drain(uint64_t min_age_ns):
    cdef uf_array_event events[256]
    cdef size_t n = 256
    found = []
    while n == 256:
        with nogil:
            n = uf_arrays_drain(min_age_ns, events, 256)
        for i in range(n):
            e = events[i]
            found.append((e.kind, e.address, e.nbytes, e.born_ns, e.died_ns, bool(e.dropped)))
    return found


def is_young(uint64_t address):
    # With the GIL, so that no other thread runs meanwhile: who asks has references to arrays, and `ndarray.resize` would
    # refuse. Nobody who has the engine's lock waits for the GIL.
    return bool(uf_arrays_is_young(address))


def release(uint64_t address):
    cdef bint found
    with nogil:
        found = uf_arrays_release(address)
    return bool(found)


def stats():
    cdef uf_array_stats s
    with nogil:
        uf_arrays_get_stats(&s)
    return s


# Before Python 3.13, reading `f_locals` of a function's frame copies its variables into a dict that stays with the frame: what
# it refers to would live on after `del`. So that dict is emptied again, unless the program has it too (one reference is the
# frame's, one ours). Under the GIL nobody sees it in between. Functions that call `locals` may be iterating over that very
# dict, and a debugger writes it back into the variables: such frames are left alone.
cdef bint SNAPSHOTS = sys.version_info < (3, 13)
cdef object has_gil = getattr(sys, "_is_gil_enabled", lambda: True)


def frame_locals(frame):
    code = frame.f_code
    if not code.co_flags & CO_OPTIMIZED:
        return dict(frame.f_locals)
    if not SNAPSHOTS:
        return dict(frame.f_locals) if has_gil() else {}
    if frame.f_trace is not None or "locals" in code.co_names or "vars" in code.co_names:
        return {}
    names = frame.f_locals
    copy = dict(names)
    if Py_REFCNT(<PyObject *>names) == 2:
        PyDict_Clear(names)
    return copy
