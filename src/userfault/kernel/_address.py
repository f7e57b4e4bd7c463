"""Ranges of memory, given as addresses or as objects, checked before the kernel sees them."""

from __future__ import annotations

import ctypes
import mmap
import operator
import struct
from typing import Any, Final

from userfault.errors import ClosedError
from userfault.kernel.errors import UsageError

__all__ = ["PAGE_MASK", "PAGE_SIZE", "check_range", "is_address", "range_of", "source_of", "span_of"]

PAGE_SIZE: Final = mmap.PAGESIZE
PAGE_MASK: Final = PAGE_SIZE - 1
# One past the highest address that any architecture gives a program (57 bits with five-level tables; s390x all).
# The kernel knows its own limit better and says EINVAL; this catches addresses that are no addresses at all.
ADDRESS_LIMIT: Final = 1 << (64 if struct.calcsize("P") == 8 else 32)


class _PyBuffer(ctypes.Structure):
    # Py_buffer of Include/pybuffer.h, part of the stable ABI since Python 3.11.
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer: Final = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer: Final = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None
_ANY_CONTIGUOUS: Final = 0x80 | 0x10 | 0x08  # PyBUF_ANY_CONTIGUOUS; writable or not


def is_address(where: Any) -> bool:
    """Tell an address from an object; one that NumPy calculated would pass for a buffer of eight bytes."""
    return isinstance(where, int) or (hasattr(where, "__index__") and not hasattr(where, "__len__"))


def span_of(where: Any) -> tuple[int, int, object]:
    """Return address, length, and what must stay alive (a view keeps a bytearray from being resized).

    Raises:
        UsageError: It has no contiguous bytes.
        ClosedError: It is closed.
    """
    if hasattr(where, "address") and hasattr(where, "nbytes"):  # like a `Mapping`
        if getattr(where, "closed", False):
            raise ClosedError(f"{where!r} is closed")
        return where.address, where.nbytes, where
    try:
        view = memoryview(where)
    except TypeError:
        raise UsageError(
            f"{type(where).__name__} is no range: pass an address (int), or an object with the buffer protocol"
        ) from None
    if not view.contiguous:
        raise UsageError("the buffer is not contiguous: pass contiguous memory, for example a copy of it")
    buffer = _PyBuffer()
    _get_buffer(view, ctypes.byref(buffer), _ANY_CONTIGUOUS)
    try:
        return buffer.buf or 0, buffer.len, view
    finally:
        _release_buffer(ctypes.byref(buffer))


def check_range(start: int, length: int, what: str = "range") -> None:
    """Refuse what the kernel would refuse with a bare EINVAL, naming the value.

    Raises:
        UsageError: Not page-aligned, empty, or outside of the address space.
    """
    if start & PAGE_MASK:
        raise UsageError(
            f"{what}: address {start:#x} is not a multiple of the page size {PAGE_SIZE}: it begins"
            f" {start & PAGE_MASK} bytes into the page at {start & ~PAGE_MASK:#x}"
        )
    if length <= 0:
        raise UsageError(f"{what}: length {length} is not positive")
    if length & PAGE_MASK:
        raise UsageError(f"{what}: length {length} is not a multiple of the page size {PAGE_SIZE}")
    if start < 0 or start + length > ADDRESS_LIMIT:
        raise UsageError(f"{what}: {start:#x} + {length:#x} lies outside of the address space")


def range_of(where: Any, length: int | None, what: str = "range") -> tuple[int, int]:
    """Return the checked `(start, length)` of an address with a length, or of an object.

    With an object, `length` bytes from its beginning are meant, all of it if `length` is None.

    Raises:
        UsageError: No range, not page-aligned, empty, longer than the object, or outside of the address space.
    """
    if is_address(where):
        start = operator.index(where)
        if length is None:
            raise UsageError(f"{what}: address {start:#x} needs a length in bytes")
        check_range(start, length, what)
        return start, length
    start, available, _ = span_of(where)
    if length is None:
        length = available
    elif length > available:
        raise UsageError(f"{what}: length {length} is more than the object's {available} bytes")
    check_range(start, length, what)
    return start, length


def source_of(where: Any, length: int | None) -> tuple[int, int, object]:
    """Return `(address, length, keep)` of bytes to copy from; `keep` must live until they were copied.

    The address may be unaligned, the length may not (`UFFDIO_COPY`).

    Raises:
        UsageError: No bytes, or fewer than `length`, or a length that is not whole pages.
    """
    if is_address(where):
        address, keep = operator.index(where), None
        if length is None:
            raise UsageError(f"source: address {address:#x} needs a length in bytes")
    else:
        address, available, keep = span_of(where)
        if length is None:
            length = available
        elif length > available:
            raise UsageError(f"source: length {length} is more than the {available} bytes that are there")
    if length <= 0 or length & PAGE_MASK:
        raise UsageError(
            f"source: length {length} is not a positive multiple of the page size {PAGE_SIZE}: pad the last page"
        )
    if address < 0 or address + length > ADDRESS_LIMIT:
        raise UsageError(f"source: {address:#x} + {length:#x} lies outside of the address space")
    return address, length, keep
