"""Our numbers against the kernel's own headers: this machine's, and the newest that can be had, which decides.

Both ways: whatever we have must be as C has it, and whatever the header has we must have, so that the additions of a
newer kernel are seen. The newest header also has the other architectures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import kernel_headers
from support.kernel_headers import TARGETS, Headers
from support.request_words import encoded
from userfault.kernel import _architecture, _ioc, abi

MACROS = dict(abi.C_NAMES)
# They grow with each release: an older header has a part of them.
SETS = {name for name in MACROS if name.startswith("UFFD_API_")}
# Members that say nothing yet. If one gets a meaning, the header gives it another name.
RESERVED = {
    *(f"uffd_msg.reserved{number}" for number in (1, 2, 3)),
    *(f"uffd_msg.arg.reserved.reserved{number}" for number in (1, 2, 3)),
}


def _member(field: str) -> str:
    return field.replace("range_", "range.", 1)


def _in_message(event: abi.Event, field: str) -> str:
    part = {abi.Event.UNMAP: "remove"}.get(event, event.name.lower())
    inner = {"ptid": "feat.ptid", "from_": "from"}.get(field, field)
    return "event" if field == "event" else f"arg.{part}.{inner}"


# Path of each member, "uffdio_copy.dst" -> where we have it.
OFFSETS = {
    f"{name}.{_member(field)}": offset
    for name, layout in abi.LAYOUTS.items()
    for field, offset in layout.offsets.items()
} | {
    f"uffd_msg.{_in_message(event, field)}": offset
    for event, layout in abi.MESSAGES.items()
    for field, offset in layout.offsets.items()
}
SIZES = {name: layout.size for name, layout in abi.LAYOUTS.items()} | {"uffd_msg": abi.MESSAGE_SIZE}


@pytest.fixture(scope="module", params=["machine", "newest"])
def headers(request: pytest.FixtureRequest) -> Headers:
    return kernel_headers.machine() if request.param == "machine" else kernel_headers.newest()


@pytest.fixture(scope="module")
def said(headers: Headers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What C says of the macros, members and structures that this header and we have in common."""
    members = headers.member_paths()
    structs = {path.partition(".")[0] for path in members}
    expressions = {f"sizeof {name}": f"sizeof(struct {name})" for name in structs & set(SIZES)}
    for path in members & set(OFFSETS):
        name, _, member = path.partition(".")
        expressions[path] = f"__builtin_offsetof(struct {name}, {member})"
    target = TARGETS.get(_architecture.architecture())
    return kernel_headers.evaluate(headers, target, set(MACROS), expressions, tmp_path_factory.mktemp("abi"))


def test_macros_are_the_headers(headers: Headers, said: dict[str, int]) -> None:
    known = set(MACROS) & set(said)
    assert known - {"__NR_userfaultfd"} == set(MACROS) & headers.macro_names()
    assert "UFFDIO_COPY" in known
    assert {name: said[name] for name in known - SETS} == {name: int(MACROS[name]) for name in known - SETS}


def test_sets_of_bits_are_the_headers(said: dict[str, int]) -> None:
    complete = set(MACROS) <= set(said)
    for name in SETS & set(said):
        bits = int(MACROS[name])
        assert said[name] == (bits if complete else bits & said[name]), name


def test_structures_are_the_headers(said: dict[str, int]) -> None:
    sizes = {f"sizeof {name}": size for name, size in SIZES.items()}
    known = {name: value for name, value in {**OFFSETS, **sizes}.items() if name in said}
    assert {"uffdio_copy.copy", "sizeof uffd_msg", "uffd_msg.arg.pagefault.feat.ptid"} <= set(known)
    assert {name: said[name] for name in known} == known


def test_we_have_every_macro_of_the_header(headers: Headers) -> None:
    assert sorted(headers.macro_names() - set(MACROS)) == []


def test_we_have_every_member_of_the_header(headers: Headers) -> None:
    assert sorted(headers.member_paths() - set(OFFSETS) - RESERVED) == []


def test_nothing_is_left_uncompared() -> None:
    kernel_headers.compiler()
    newest = kernel_headers.find_newest()
    headers = kernel_headers.machine() if isinstance(newest, str) else newest
    missing = sorted(set(MACROS) - headers.macro_names() - {"__NR_userfaultfd"})
    missing += sorted(set(OFFSETS) - headers.member_paths())
    if missing and headers.release < (7, 3):
        why = f"no newer ones could be had: {newest}" if isinstance(newest, str) else "newer ones are not out"
        pytest.skip(f"not compared, since {headers.name} are older ({why}): {', '.join(missing)}")
    assert missing == []


@pytest.mark.parametrize("name", TARGETS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    newest = kernel_headers.newest()
    macros = {macro for macro, value in MACROS.items() if isinstance(value, abi.Request)}
    calls = {"__NR_userfaultfd", "__NR_process_madvise", "__NR_pidfd_send_signal"}
    said = kernel_headers.evaluate(newest, TARGETS[name], macros | calls, {}, tmp_path)
    assert said.pop("__NR_userfaultfd") == abi.SYSCALL_NUMBERS[name]
    assert said.pop("__NR_process_madvise") == _architecture.later_syscall_number(440, name)
    assert said.pop("__NR_pidfd_send_signal") == _architecture.later_syscall_number(424, name)
    words = encoded(_ioc.coding_of(name))
    assert len(said) > 5
    assert said == {macro: words[MACROS[macro].name] for macro in said}  # type: ignore[attr-defined]


def test_what_a_newer_header_adds_is_seen(tmp_path: Path) -> None:
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/userfaultfd.h").write_text("""
        #ifndef _LINUX_USERFAULTFD_H
        #define _LINUX_USERFAULTFD_H
        /* #define UFFD_OLD 1 */
        #define UFFD_API_FEATURES (UFFD_A | \\
                                   UFFD_B)
        #  define UFFDIO_NEW _IOWR(UFFDIO, 0x0B, struct uffdio_new)
        enum uffd_kind { UFFD_KIND_A = 1, /* first */ UFFD_KIND_B };
        struct uffdio_range { __u64 start; __u64 len; };
        struct uffdio_new {
            struct uffdio_range range; // where
        #define UFFDIO_NEW_MODE_FAST ((__u64)1<<0)
            __u64 mode;
            union { struct { __u32 low; __u32 high[2]; } halves; __u64 whole; };
        } __attribute__((packed));
        #endif
    """)
    (tmp_path / "linux/fs.h").write_text("""
        #define BLKROSET _IO(0x12,93)
        #define PAGE_IS_NEW (1 << 10)
        #define PM_SCAN_NEW (1 << 2)
        struct fstrim_range { __u64 start; };
        struct page_region { __u64 start; __u64 new; };
    """)
    headers = Headers("made up", tmp_path)
    assert headers.macro_names() == {
        "UFFD_API_FEATURES", "UFFDIO_NEW", "UFFD_KIND_A", "UFFD_KIND_B", "UFFDIO_NEW_MODE_FAST", "PAGE_IS_NEW",
        "PM_SCAN_NEW",
    }  # fmt: skip
    assert headers.member_paths() == {
        "uffdio_range.start", "uffdio_range.len", "uffdio_new.range.start", "uffdio_new.range.len", "uffdio_new.mode",
        "uffdio_new.halves.low", "uffdio_new.halves.high", "uffdio_new.whole", "page_region.start", "page_region.new",
    }  # fmt: skip


def _find(cache: Path) -> subprocess.CompletedProcess[str]:
    """Look for headers where there is no mirror."""
    kernel_headers.compiler()
    return subprocess.run(
        [sys.executable, kernel_headers.SCRIPT],
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "USERFAULT_DEBIAN_MIRROR": "http://127.0.0.1:9/debian",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_without_a_mirror_there_is_a_reason_and_no_second_try(tmp_path: Path) -> None:
    first, second = _find(tmp_path), _find(tmp_path)
    assert first.returncode == second.returncode == 1
    assert "apt-get" in first.stderr
    assert "keeps us from trying again" not in first.stderr
    assert second.stderr.startswith(first.stderr.rstrip())
    assert "keeps us from trying again" in second.stderr


def test_without_a_mirror_the_cache_is_used_with_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "userfault/headers/7.4~rc1-1"
    folder.mkdir(parents=True)
    (folder.parent / "current.json").write_text('{"version": "7.4~rc1-1"}')
    found = json.loads(_find(tmp_path).stdout)
    assert found["folder"] == str(folder)
    assert "the mirror could not be asked" in found["warning"]
    (folder.parent / "asked").touch()
    assert json.loads(_find(tmp_path).stdout) == {"version": "7.4~rc1-1", "folder": str(folder)}
