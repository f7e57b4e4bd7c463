"""Our numbers against this machine's header, by a C program, and against a table of the newest one."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from userfault.kernel import _ioc, abi

if TYPE_CHECKING:
    from pathlib import Path

_LAYOUTS = [
    abi.API, abi.RANGE, abi.REGISTER, abi.COPY, abi.ZEROPAGE, abi.CONTINUE, abi.POISON, abi.MOVE,
    abi.WRITEPROTECT, abi.RWPROTECT, abi.SET_MODE, abi.PAGE_REGION, abi.SCAN_ARGUMENT,
]  # fmt: skip
_MESSAGES = {
    "pagefault": abi.MESSAGE_PAGEFAULT,
    "fork": abi.MESSAGE_FORK,
    "remap": abi.MESSAGE_REMAP,
    "remove": abi.MESSAGE_RANGE,
}
# The macro whose presence shows that the header knows a structure.
_INTRODUCED_BY = {
    "uffdio_continue": "UFFDIO_CONTINUE",
    "uffdio_poison": "UFFDIO_POISON",
    "uffdio_move": "UFFDIO_MOVE",
    "uffdio_rwprotect": "UFFDIO_RWPROTECT",
    "uffdio_set_mode": "UFFDIO_SET_MODE",
    "page_region": "PAGEMAP_SCAN",
    "pm_scan_arg": "PAGEMAP_SCAN",
}


def _macros() -> dict[str, int]:
    """Every macro that we claim to know, by its C name."""
    families: list[tuple[str, Any]] = [
        ("UFFD_FEATURE_", abi.Feature),
        ("UFFDIO_REGISTER_MODE_", abi.RegisterMode),
        ("UFFDIO_COPY_MODE_", abi.CopyMode),
        ("UFFDIO_ZEROPAGE_MODE_", abi.ZeropageMode),
        ("UFFDIO_CONTINUE_MODE_", abi.ContinueMode),
        ("UFFDIO_POISON_MODE_", abi.PoisonMode),
        ("UFFDIO_MOVE_MODE_", abi.MoveMode),
        ("UFFDIO_WRITEPROTECT_MODE_", abi.WriteprotectMode),
        ("UFFDIO_RWPROTECT_MODE_", abi.RwprotectMode),
        ("UFFD_EVENT_", abi.Event),
        ("UFFD_PAGEFAULT_FLAG_", abi.FaultFlag),
        ("UFFD_", abi.OpenFlag),
        ("PAGE_IS_", abi.PageCategory),
        ("PM_SCAN_", abi.ScanFlag),
    ]
    found = {f"{prefix}{member.name}": int(member) for prefix, family in families for member in family}
    for request in abi.Request:
        special = {"NEW": "USERFAULTFD_IOC_NEW", "PAGEMAP_SCAN": "PAGEMAP_SCAN"}
        found[special.get(request.name, f"UFFDIO_{request.name}")] = int(request)
    for operation in abi.Operation:
        found[f"_UFFDIO_{operation.name}"] = int(operation).bit_length() - 1
    found["UFFD_API"] = abi.UFFD_API
    found["__NR_userfaultfd"] = abi.SYSCALL_NUMBERS.get(_ioc.architecture(), 282)
    return found


def _layout_expressions() -> dict[str, tuple[str, str, int]]:
    """C expressions about structures: name -> (guard macro, expression, what we say)."""
    found = {}
    for layout in _LAYOUTS:
        guard = _INTRODUCED_BY.get(layout.c_name, "UFFD_API")
        struct = f"struct {layout.c_name}"
        found[f"sizeof {layout.c_name}"] = (guard, f"sizeof({struct})", layout.size)
        for field, offset in layout.offsets.items():
            member = field.replace("range_", "range.") if "range_" in field else field
            found[f"{layout.c_name}.{member}"] = (guard, f"offsetof({struct}, {member})", offset)
    for event, layout in _MESSAGES.items():
        found[f"sizeof uffd_msg ({event})"] = ("UFFD_API", "sizeof(struct uffd_msg)", layout.size)
        for field, offset in layout.offsets.items():
            inner = {"ptid": "feat.ptid", "from_": "from"}.get(field, field)
            member = "event" if field == "event" else f"arg.{event}.{inner}"
            found[f"uffd_msg.{member}"] = ("UFFD_API", f"offsetof(struct uffd_msg, {member})", offset)
    return found


_MACROS = _macros()
_EXPRESSIONS = _layout_expressions()


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says of this machine's headers; names that they lack are absent."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the kernel's numbers were not compared with linux/userfaultfd.h")
    folder: Path = tmp_path_factory.mktemp("abi")
    headers = ("stddef.h", "stdio.h", "sys/ioctl.h", "sys/syscall.h", "linux/fs.h", "linux/userfaultfd.h")
    lines = [*(f"#include <{name}>" for name in headers), "int main(void) {"]
    for macro in _MACROS:
        lines += [
            f"#ifdef {macro}",
            f'printf("%s=%llu\\n", "{macro}", (unsigned long long)({macro}));',
            "#endif",
        ]
    for name, (guard, expression, _) in _EXPRESSIONS.items():
        lines += [
            f"#ifdef {guard}",
            f'printf("%s=%llu\\n", "{name}", (unsigned long long){expression});',
            "#endif",
        ]
    source = folder / "abi.c"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    built = subprocess.run(
        [compiler, "-o", folder / "abi", source], capture_output=True, text=True, check=False
    )
    if "linux/userfaultfd.h" in built.stderr:
        pytest.skip("this machine has no linux/userfaultfd.h: the kernel's numbers were not compared")
    assert built.returncode == 0, built.stderr
    output = subprocess.run([folder / "abi"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, _, value in (line.rpartition("=") for line in output.splitlines())}


def test_macros_are_the_headers(header: dict[str, int]) -> None:
    known = {name: value for name, value in _MACROS.items() if name in header}
    assert "UFFDIO_COPY" in known
    assert known == {name: header[name] for name in known}


def test_layouts_are_the_headers(header: dict[str, int]) -> None:
    known = {name: value for name, (_, _, value) in _EXPRESSIONS.items() if name in header}
    assert "uffdio_copy.copy" in known
    assert known == {name: header[name] for name in known}


def test_the_header_knows_everything(header: dict[str, int]) -> None:
    unknown = sorted({*_MACROS, *_EXPRESSIONS} - set(header))
    if unknown:
        pytest.skip(
            f"not compared, because this machine's headers are too old for them: {', '.join(unknown)}"
        )


# The header of Linux 7.3 on x86-64, and on an architecture of the old coding; few machines have it yet.
_REQUESTS_7_3 = {
    "NEW": 0xAA00, "API": 0xC018AA3F, "REGISTER": 0xC020AA00, "UNREGISTER": 0x8010AA01, "WAKE": 0x8010AA02,
    "COPY": 0xC028AA03, "ZEROPAGE": 0xC020AA04, "MOVE": 0xC028AA05, "WRITEPROTECT": 0xC018AA06,
    "CONTINUE": 0xC020AA07, "POISON": 0xC020AA08, "RWPROTECT": 0xC018AA09, "SET_MODE": 0x4010AA0A,
    "PAGEMAP_SCAN": 0xC0606610,
}  # fmt: skip


def test_requests_are_those_of_linux_7_3() -> None:
    if _ioc.coding_of(_ioc.architecture()) != _ioc.coding_of("x86_64"):
        pytest.skip("this architecture encodes requests in another way than the table")
    assert {request.name: int(request) for request in abi.Request} == _REQUESTS_7_3


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("x86_64", 0xC018AA3F), ("aarch64", 0xC018AA3F), ("riscv64", 0xC018AA3F), ("s390x", 0xC018AA3F),
     ("ppc64le", 0xC018AA3F), ("mips64", 0xC018AA3F), ("sparc64", 0xC018AA3F), ("parisc64", 0xC018AA3F)],
)  # fmt: skip
def test_both_ways_is_the_same_word_everywhere(architecture: str, expected: int) -> None:
    # In the old coding read|write is 0b110, but the size has one bit less: the same bits are set.
    assert _ioc.iowr(0xAA, 0x3F, 24, _ioc.coding_of(architecture)) == expected


@pytest.mark.parametrize(
    ("architecture", "none", "read", "write"),
    [("x86_64", 0x0000AA00, 0x8010AA01, 0x4010AA0A), ("ppc64le", 0x2000AA00, 0x4010AA01, 0x8010AA0A),
     ("parisc64", 0x0000AA00, 0x4010AA01, 0x8010AA0A)],
)  # fmt: skip
def test_one_way_requests_differ(architecture: str, none: int, read: int, write: int) -> None:
    coding = _ioc.coding_of(architecture)
    assert _ioc.io(0xAA, 0x00, coding) == none
    assert _ioc.ior(0xAA, 0x01, 16, coding) == read
    assert _ioc.iow(0xAA, 0x0A, 16, coding) == write


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="size 16384"):
        _ioc.iowr(0xAA, 0, 1 << 14)


def test_every_feature_and_mode_has_its_release() -> None:
    assert set(abi.FEATURE_SINCE) == set(abi.Feature)
    assert set(abi.REGISTER_MODE_SINCE) == set(abi.RegisterMode)


def test_bits_that_are_not_known_survive() -> None:
    answer = 1 << 40 | abi.Feature.MOVE
    assert int(abi.Feature(answer)) == answer
    assert abi.Feature.MOVE in abi.Feature(answer)


def test_all_messages_are_32_bytes() -> None:
    assert {layout.size for layout in _MESSAGES.values()} == {abi.MESSAGE_SIZE}
