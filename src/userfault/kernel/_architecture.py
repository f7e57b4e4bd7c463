"""Which architecture this process is of, and the system call numbers that depend on it.

Not which machine: an i386 program runs on an x86-64 kernel, with i386's numbers, and `setarch i686` makes uname(2)
say "i686" to a program of x86-64.
"""

from __future__ import annotations

import os
import re
import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SYSCALL_NUMBERS", "architecture", "architecture_of", "later_syscall_number", "syscall_number"]

# How uname(2) may begin, and the name of a program with pointers of 32 bits and of 64 bits. First match counts.
_FAMILIES: Final = tuple(
    (re.compile(machine), narrow, wide)
    for machine, narrow, wide in (
        ("x86_64|i[3-6]86", "i386", "x86_64"),
        ("aarch64|arm", "arm", "aarch64"),
        ("riscv", "riscv32", "riscv64"),
        ("loongarch", "loongarch32", "loongarch64"),
        ("ppc64le|ppcle", "ppcle", "ppc64le"),
        ("ppc", "ppc", "ppc64"),
        ("s390", "s390", "s390x"),
        ("mips", "mips", "mips64"),
        ("sparc", "sparc", "sparc64"),
        ("parisc", "parisc", "parisc64"),
        ("sh", "sh", "sh"),
    )
)
_EM_X86_64: Final = 62
_EF_MIPS_ABI2: Final = 0x20

# userfaultfd(2), which no C library wraps. Sources: arch/*/kernel/syscalls/syscall.tbl and, for those that share
# one table, scripts/syscall.tbl; a test compares with the newest header that can be had.
SYSCALL_NUMBERS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "x86_64": 323,
        "x32": 0x40000000 | 323,
        "i386": 374,
        "arm": 388,
        "ppc64le": 364,
        "ppc64": 364,
        "ppcle": 364,
        "ppc": 364,
        "s390x": 355,
        "s390": 355,
        "mips": 4000 + 357,
        "mipsn32": 6000 + 321,
        "mips64": 5000 + 317,
        "sparc64": 352,
        "sparc": 352,
        "alpha": 516,
        "parisc": 344,
        "parisc64": 344,
        "m68k": 373,
        "sh": 377,
        "xtensa": 342,
        "microblaze": 389,
        "ia64": 1024 + 319,
        # The table that all newer architectures share.
        **dict.fromkeys(
            ("aarch64", "riscv64", "riscv32", "loongarch64", "loongarch32", "arc", "csky", "hexagon", "nios2",
             "openrisc"),
            282,
        ),
    }
)  # fmt: skip
_GENERIC: Final = 282

# Where an architecture's own numbering of the later calls, which otherwise are the same everywhere, begins.
_LATER_FROM: Final = 424
_LATER_BASES: Final = {"mips": 4000, "mips64": 5000, "mipsn32": 6000, "x32": 0x40000000, "alpha": 110}


def architecture_of(machine: str, pointer_bits: int, program: bytes = b"") -> str:
    """Name the architecture of a program.

    Args:
        machine: What uname(2) says there.
        pointer_bits: 32 or 64.
        program: The first bytes of its ELF file. They tell x32 from i386, and of MIPS the n32 from the o32 calling
            convention; without them it is taken for the commoner one.

    Returns:
        A key of `SYSCALL_NUMBERS`, or `machine` if that is of no family known here.
    """
    for family, narrow, wide in _FAMILIES:
        if family.match(machine):
            name = narrow if pointer_bits == 32 else wide
            break
    else:
        return machine
    if name in ("i386", "mips") and program[:4] == b"\x7fELF" and len(program) >= 40:
        order = "<" if program[5] == 1 else ">"
        if name == "i386" and struct.unpack_from(order + "H", program, 18) == (_EM_X86_64,):
            return "x32"
        if name == "mips" and struct.unpack_from(order + "I", program, 36)[0] & _EF_MIPS_ABI2:
            return "mipsn32"
    return name


def architecture() -> str:
    """Name the architecture that this *process* is of, for example "x86_64", "aarch64" or "i386"."""
    machine, bits, program = os.uname().machine, struct.calcsize("P") * 8, b""
    if bits == 32:
        try:
            with open("/proc/self/exe", "rb") as file:
                program = file.read(64)
        except OSError:
            pass  # no /proc here
    return architecture_of(machine, bits, program)


def syscall_number(name: str | None = None) -> int:
    """Return the number of userfaultfd(2) on the architecture `name`, or on this one."""
    return SYSCALL_NUMBERS.get(name or architecture(), _GENERIC)


def later_syscall_number(number: int, name: str | None = None) -> int:
    """Return the true number of a system call that came after Linux 5.0, on the architecture `name` or on this one.

    From pidfd_send_signal (424) on all architectures have the same numbers, but some count from a base of their own.

    Args:
        number: Its number in the common table, for example 440 for process_madvise.
        name: As `architecture` spells it.

    Raises:
        ValueError: `number` is below 424, where each architecture has its own.
    """
    if number < _LATER_FROM:
        raise ValueError(
            f"system call {number} has another number on each architecture; the common ones begin at 424"
        )
    return _LATER_BASES.get(name or architecture(), 0) + number
