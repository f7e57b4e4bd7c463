"""Messages as the kernel packs them, and error numbers as exceptions."""

from __future__ import annotations

import errno
import pickle
import struct
from typing import Any, cast

import pytest

from userfault.errors import UserfaultError
from userfault.kernel import FaultKind, Feature, PageFault, Remap, Remove, Unmap, errors
from userfault.kernel.abi import FaultFlag
from userfault.kernel.errors import UffdError, error_from_errno
from userfault.kernel.events import Fork, UnknownEvent, decode


def _message(event: int, body: bytes) -> bytes:
    return struct.pack("=B7x", event) + body.ljust(24, b"\0")


def _no_child(fd: int) -> Any:
    raise AssertionError(f"no fork event came, yet descriptor {fd}")


def test_every_event() -> None:
    data = b"".join([
        _message(0x12, struct.pack("=QQI", 1, 0x7000, 42)),
        _message(0x13, struct.pack("=I", 9)),
        _message(0x14, struct.pack("=QQQ", 0x1000, 0x2000, 0x3000)),
        _message(0x15, struct.pack("=QQ", 0x4000, 0x5000)),
        _message(0x16, struct.pack("=QQ", 0x6000, 0x8000)),
        _message(0x17, b"new"),
    ])  # fmt: skip
    child = cast("Any", object())
    adopted: list[int] = []
    found = decode(data, lambda fd: adopted.append(fd) or child)
    assert found == [
        PageFault(0x7000, FaultFlag.WRITE, 42),
        Fork(child),
        Remap(0x1000, 0x2000, 0x3000),
        Remove(0x4000, 0x5000),
        Unmap(0x6000, 0x8000),
        UnknownEvent(0x17, data[-32:]),
    ]
    assert adopted == [9]
    assert decode(b"", _no_child) == []


@pytest.mark.parametrize(
    ("flags", "kind", "write"),
    [
        (0, FaultKind.MISSING, False),
        (1, FaultKind.MISSING, True),
        (2 | 1, FaultKind.WRITE_PROTECT, True),
        (4, FaultKind.MINOR, False),
        (4 | 1, FaultKind.MINOR, True),
        (8, FaultKind.READ_WRITE_PROTECT, False),
        (8 | 1, FaultKind.READ_WRITE_PROTECT, True),
        (16, FaultKind.MISSING, False),
        (1 << 40 | 4 | 1, FaultKind.MINOR, True),
    ],
)
def test_kinds_of_page_faults_with_bits_of_kernels_to_come(flags: int, kind: FaultKind, write: bool) -> None:
    (fault,) = decode(_message(0x12, struct.pack("=QQI", flags, 0x7000, 0)), _no_child)
    assert isinstance(fault, PageFault)
    assert (fault.kind, fault.write) == (kind, write)
    assert int(fault.flags) == flags


CLASSES = {
    errno.EPERM: (errors.UffdPermissionError, PermissionError),
    errno.EACCES: (errors.UffdPermissionError, PermissionError),
    errno.ENOENT: (errors.NotRegisteredError, LookupError),
    errno.EBUSY: (errors.RangeBusyError, OSError),
    errno.EEXIST: (errors.PageExistsError, FileExistsError),
    errno.EAGAIN: (errors.AgainError, BlockingIOError),
    errno.EINVAL: (errors.InvalidRequestError, ValueError),
    errno.EFAULT: (errors.BadAddressError, OSError),
    errno.ENOMEM: (errors.NoMemoryError, MemoryError),
    errno.ESRCH: (errors.TargetExitedError, ProcessLookupError),
    errno.ENOSYS: (errors.NotSupportedError, NotImplementedError),
    errno.ENOTTY: (errors.NotSupportedError, NotImplementedError),
    errno.EIO: (errors.HardwareError, OSError),
    133: (errors.HardwareError, OSError),
    errno.EMFILE: (errors.TooManyFilesError, OSError),
    errno.ENFILE: (errors.TooManyFilesError, OSError),
    errno.ENOSPC: (errors.NoSpaceError, OSError),
    errno.EINTR: (errors.InterruptedCallError, InterruptedError),
    errno.EPROTO: (UffdError, OSError),
}
CALLS = [
    "UFFDIO_API", "UFFDIO_REGISTER", "UFFDIO_UNREGISTER", "UFFDIO_WAKE", "UFFDIO_COPY", "UFFDIO_ZEROPAGE",
    "UFFDIO_MOVE", "UFFDIO_WRITEPROTECT", "UFFDIO_CONTINUE", "UFFDIO_POISON", "UFFDIO_RWPROTECT",
    "UFFDIO_SET_MODE", "PAGEMAP_SCAN", "read", "userfaultfd",
]  # fmt: skip


@pytest.mark.parametrize("number", CLASSES)
def test_each_number_has_its_class(number: int) -> None:
    kind, builtin = CLASSES[number]
    for call in CALLS:
        error = error_from_errno(number, call=call, address=0x7000, length=8192, done=4096)
        assert type(error) is kind
        assert isinstance(error, builtin)
        assert isinstance(error, UserfaultError)
        assert (error.errno, error.call, error.address, error.length, error.done) == (
            number, call, 0x7000, 8192, 4096,
        )  # fmt: skip
        text = str(error)
        assert text.startswith(f"{call} [0x7000, +0x2000): ")
        assert errno.errorcode.get(number, "EHWPOISON") in text
        assert "after 4096 bytes" in text
        assert error.remedy in text


# What a program meets in its life, and what the message must say of it.
REMEDIES = [
    ("UFFDIO_REGISTER", errno.EBUSY, "another userfaultfd"),
    ("UFFDIO_REGISTER", errno.EPERM, "opened for"),
    ("UFFDIO_REGISTER", errno.EINVAL, "WP_ASYNC"),
    ("UFFDIO_API", errno.EPERM, "CAP_SYS_PTRACE"),
    ("userfaultfd", errno.EPERM, "vm.unprivileged_userfaultfd=1"),
    ("userfaultfd", errno.ENOSYS, "CONFIG_USERFAULTFD"),
    ("UFFDIO_COPY", errno.ENOENT, "crosses from one mapping"),
    ("UFFDIO_COPY", errno.EAGAIN, "read the waiting events"),
    ("UFFDIO_COPY", errno.EEXIST, "wake its waiters"),
    ("UFFDIO_COPY", errno.ESRCH, "has exited"),
    ("UFFDIO_MOVE", errno.EBUSY, "MADV_DONTNEED"),
    ("UFFDIO_MOVE", errno.EINVAL, r"Linux 6\.8"),
    ("UFFDIO_POISON", errno.EINVAL, r"Linux 6\.6"),
    ("UFFDIO_RWPROTECT", errno.EINVAL, r"Linux 7\.3"),
    ("PAGEMAP_SCAN", errno.ENOTTY, r"Linux 6\.7"),
    ("read", errno.EMFILE, "the event waits"),
]


def test_cause_and_remedy() -> None:
    for call, number, says in REMEDIES:
        with pytest.raises(UffdError, match=says):
            raise error_from_errno(number, call=call)


def test_errors_can_be_sent_to_another_process() -> None:
    error = error_from_errno(errno.EAGAIN, call="UFFDIO_COPY", address=1 << 20, length=8192, done=4096)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (again.errno, again.done, again.address, again.remedy) == (
        error.errno, error.done, error.address, error.remedy,
    )  # fmt: skip
    missing = errors.FeatureError("no", missing=Feature.RWP, available=Feature.MOVE, remedy="newer")
    again = pickle.loads(pickle.dumps(missing))
    assert (str(again), again.missing, again.available, again.remedy) == (
        "no", Feature.RWP, Feature.MOVE, "newer",
    )  # fmt: skip


def test_the_tree_at_the_top_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        if name != "error_from_errno":
            assert name in errors.__doc__, f"{name} is not in the tree at the top of errors.py"
