"""Our numbers by themselves: what needs no header of the kernel to be checked (see test_headers.py for that)."""

from __future__ import annotations

import doctest
import importlib
import struct

import pytest

from support.request_words import WORDS, encoded
from userfault.kernel import _architecture, _ioc, abi

SAME_CODING = {
    "x86_64": ("x32", "i386", "arm", "aarch64", "riscv64", "riscv32", "loongarch64", "s390x", "m68k", "sh", "arc",
               "xtensa", "microblaze", "csky", "openrisc", "hexagon", "nios2", "ia64"),
    "ppc64le": ("ppc64", "ppc", "ppcle", "mips", "mipsn32", "mips64", "sparc", "sparc64", "alpha"),
    "parisc": ("parisc64",),
}  # fmt: skip
FLAGS = [
    abi.OpenFlag, abi.Feature, abi.RegisterMode, abi.CopyMode, abi.ZeropageMode, abi.ContinueMode, abi.PoisonMode,
    abi.MoveMode, abi.WriteprotectMode, abi.RwprotectMode, abi.Operation, abi.FaultFlag, abi.ScanFlag,
    abi.PageCategory, abi.PagemapBit,
]  # fmt: skip


def elf(wide: bool, machine: int, flags: int = 0, order: str = "<") -> bytes:
    """Return the beginning of a program."""
    identification = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    addresses = "QQQ" if wide else "III"
    return identification + struct.pack(f"{order}HHI{addresses}I", 3, machine, 1, 0, 0, 0, flags) + bytes(12)


@pytest.mark.parametrize(
    ("machine", "bits", "program", "expected"),
    [
        ("x86_64", 64, b"", "x86_64"),
        ("i686", 64, b"", "x86_64"),  # setarch i686
        ("i686", 32, b"", "i386"),
        ("i386", 32, elf(False, 3), "i386"),
        ("x86_64", 32, elf(False, 3), "i386"),
        ("x86_64", 32, elf(False, 62), "x32"),
        ("x86_64", 32, b"", "i386"),  # no /proc
        ("aarch64", 64, b"", "aarch64"),
        ("armv8l", 64, b"", "aarch64"),  # setarch armv8l
        ("aarch64", 32, elf(False, 40), "arm"),
        ("armv7l", 32, b"", "arm"),
        ("armv6l", 32, b"", "arm"),
        ("riscv64", 64, b"", "riscv64"),
        ("riscv64", 32, b"", "riscv32"),
        ("loongarch64", 64, b"", "loongarch64"),
        ("ppc64le", 64, b"", "ppc64le"),
        ("ppcle", 64, b"", "ppc64le"),
        ("ppc64", 64, b"", "ppc64"),
        ("ppc64", 32, b"", "ppc"),
        ("s390x", 64, b"", "s390x"),
        ("s390x", 32, b"", "s390"),
        ("mips64", 64, b"", "mips64"),
        ("mips", 64, b"", "mips64"),
        ("mips64", 32, elf(False, 8, 0x20), "mipsn32"),
        ("mips64", 32, elf(False, 8, 0x20, ">"), "mipsn32"),
        ("mips64", 32, elf(False, 8, 0x1000, ">"), "mips"),
        ("mips", 32, b"", "mips"),
        ("sparc64", 64, b"", "sparc64"),
        ("sparc64", 32, b"", "sparc"),
        ("parisc64", 32, b"", "parisc"),
        ("sh4a", 32, b"", "sh"),
        ("m68k", 32, b"", "m68k"),
        ("alpha", 64, b"", "alpha"),
        ("ia64", 64, b"", "ia64"),
        ("newcomer", 64, b"", "newcomer"),
    ],
)
def test_the_architecture_is_the_programs(machine: str, bits: int, program: bytes, expected: str) -> None:
    assert _architecture.architecture_of(machine, bits, program) == expected
    assert expected in abi.SYSCALL_NUMBERS or expected == "newcomer"


def test_this_architecture_is_known() -> None:
    assert _architecture.architecture() in abi.SYSCALL_NUMBERS
    assert _architecture.syscall_number() == abi.SYSCALL_NUMBERS[_architecture.architecture()]


def test_an_architecture_that_is_not_listed_has_the_common_numbers() -> None:
    assert _architecture.syscall_number("newcomer") == 282
    assert _architecture.later_syscall_number(440, "newcomer") == 440


def test_early_system_calls_have_no_common_number() -> None:
    with pytest.raises(ValueError, match="system call 323"):
        _architecture.later_syscall_number(323)


def test_every_architecture_is_in_the_table_of_codings() -> None:
    assert {*SAME_CODING, *(name for names in SAME_CODING.values() for name in names)} >= {
        name for name in abi.SYSCALL_NUMBERS if name not in ("s390", "loongarch32")
    }


@pytest.mark.parametrize("model", SAME_CODING)
def test_architectures_that_share_a_coding(model: str) -> None:
    coding = _ioc.coding_of(model)
    assert {name: _ioc.coding_of(name) for name in SAME_CODING[model]} == dict.fromkeys(
        SAME_CODING[model], coding
    )


@pytest.mark.parametrize("name", WORDS)
def test_the_request_words_in_each_coding(name: str) -> None:
    assert encoded(_ioc.coding_of(name)) == WORDS[name]


def test_the_request_words_here() -> None:
    here = _ioc.coding_of(_architecture.architecture())
    assert {request.name: int(request) for request in abi.Request} == encoded(here)


@pytest.mark.parametrize(("magic", "number", "size"), [(0xAA, 0, 1 << 14), (0x100, 0, 8), (0xAA, 0x100, 8)])
def test_parts_of_a_request_that_do_not_fit_are_refused(magic: int, number: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"magic {magic:#x}, number {number:#x}, size {size}"):
        _ioc.iowr(magic, number, size, _ioc.coding_of("x86_64"))


def test_every_feature_mode_and_request_has_its_release() -> None:
    assert set(abi.FEATURE_SINCE) == set(abi.Feature)
    assert set(abi.REGISTER_MODE_SINCE) == set(abi.RegisterMode)
    assert set(abi.REQUEST_SINCE) == set(abi.Request)


@pytest.mark.parametrize("family", FLAGS)
def test_bits_that_are_not_known_are_kept(family: type[abi.Feature]) -> None:
    known = list(family)[-1]
    unknown = next(1 << bit for bit in range(64) if not any(1 << bit & member for member in family))
    answer = family(unknown | known)
    assert int(answer) == unknown | known
    assert known in answer
    assert list(answer) == [known]
    # Taking a known bit away must not take the others.
    assert int(answer & ~known) == unknown
    assert int(~answer) == (1 << 64) - 1 - unknown - known
    assert ~~answer == answer


def test_an_event_that_is_not_known_is_no_event() -> None:
    with pytest.raises(ValueError, match="23 is not a valid Event"):
        abi.Event(0x17)


def test_every_event_has_a_message_of_32_bytes() -> None:
    assert set(abi.MESSAGES) == set(abi.Event)
    assert {layout.size for layout in abi.MESSAGES.values()} == {abi.MESSAGE_SIZE}
    assert {layout.c_name for layout in abi.MESSAGES.values()} == {"uffd_msg"}


def test_a_layout_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="size of uffdio_copy"):
        abi.COPY.size = 48
    with pytest.raises(AttributeError, match="pack of uffdio_copy"):
        del abi.COPY.pack
    with pytest.raises(TypeError):
        abi.COPY.offsets["dst"] = 8  # type: ignore[index]
    assert abi.COPY.size == 40
    assert abi.COPY.offsets["dst"] == 0


def test_structures_by_name() -> None:
    packed = abi.COPY.encode(src=2, dst=1, copy=-11)
    assert packed == abi.COPY.pack(1, 2, 0, 0, -11)
    assert abi.COPY.decode(packed) == {"dst": 1, "src": 2, "len": 0, "mode": 0, "copy": -11}
    assert abi.MESSAGE_REMAP.decode(abi.MESSAGE_REMAP.encode(event=abi.Event.REMAP, from_=7)) == {
        "event": 0x14, "from_": 7, "to": 0, "len": 0,
    }  # fmt: skip
    with pytest.raises(TypeError, match="uffdio_range has no length, mode; it has start, len"):
        abi.RANGE.encode(length=1, mode=2)
    with pytest.raises(struct.error):
        abi.RANGE.decode(bytes(15))


def test_a_layout_shows_its_fields() -> None:
    assert repr(abi.RANGE) == "<Layout of struct uffdio_range: start, len; 16 bytes>"


def test_structures_are_found_by_the_headers_names() -> None:
    assert abi.LAYOUTS["uffdio_copy"] is abi.COPY
    assert abi.LAYOUTS["pm_scan_arg"] is abi.SCAN_ARGUMENT
    assert all(layout.c_name == name for name, layout in abi.LAYOUTS.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UFFDIO_COPY_MODE_WP", abi.CopyMode.WP),
        ("UFFD_FEATURE_RWP_ASYNC", abi.Feature.RWP_ASYNC),
        ("UFFDIO_COPY", abi.Request.COPY),
        ("USERFAULTFD_IOC_NEW", abi.Request.NEW),
        ("PAGEMAP_SCAN", abi.Request.PAGEMAP_SCAN),
        ("UFFD_EVENT_FORK", abi.Event.FORK),
        ("PAGE_IS_WRITTEN", abi.PageCategory.WRITTEN),
        ("PM_SCAN_WP_MATCHING", abi.ScanFlag.WP_MATCHING),
        ("UFFD_USER_MODE_ONLY", abi.OpenFlag.USER_MODE_ONLY),
    ],
)
def test_names_lead_there_and_back(name: str, value: abi.Feature) -> None:
    assert abi.C_NAMES[name] is value
    assert abi.c_name(value) == name


def test_the_headers_numbers_of_operations_are_bit_numbers() -> None:
    assert abi.C_NAMES["_UFFDIO_POISON"] == 8
    assert abi.c_name(abi.Operation.WAKE | abi.Operation.POISON) == "1 << _UFFDIO_WAKE | 1 << _UFFDIO_POISON"


def test_names_of_several_and_of_unknown_bits() -> None:
    assert abi.c_name(abi.CopyMode(0)) == "0"
    assert abi.c_name(abi.CopyMode(4)) == "0x4"
    assert abi.c_name(abi.FaultFlag(0x13)) == "UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP | 0x10"


def test_what_no_header_names_has_no_name() -> None:
    with pytest.raises(TypeError, match=r"PagemapBit\.PRESENT"):
        abi.c_name(abi.PagemapBit.PRESENT)
    with pytest.raises(TypeError, match="170"):
        abi.c_name(170)  # type: ignore[arg-type]


def test_the_sets_of_the_header_are_of_their_kind() -> None:
    assert set(abi.API_FEATURES) == set(abi.Feature)
    assert set(abi.API_REGISTER_MODES) == set(abi.RegisterMode)
    # Every operation is one of the descriptor or one of a range.
    assert set(abi.API_IOCTLS) | set(abi.API_RANGE_IOCTLS) == set(abi.Operation)
    assert not abi.API_IOCTLS & abi.API_RANGE_IOCTLS
    assert abi.API_RANGE_IOCTLS & ~abi.API_RANGE_IOCTLS_BASIC == abi.Operation.ZEROPAGE | abi.Operation.MOVE


@pytest.mark.parametrize("module", ["", "._names", "._layouts"])
def test_the_examples_of_the_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"userfault.kernel.abi{module}"))
    assert result.attempted > 0
    assert result.failed == 0
