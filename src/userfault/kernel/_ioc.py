"""How Linux packs an ioctl request word, which is not the same on all architectures.

A request is one 32-bit word: direction, size of the argument, a magic letter of the driver and a number. Most
architectures give the direction two bits and the size fourteen; the older ones (PowerPC, MIPS, SPARC, Alpha)
three and thirteen, with other values, and PA-RISC exchanges read and write. See
`include/uapi/asm-generic/ioctl.h` and `arch/*/include/uapi/asm/ioctl.h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from userfault.kernel._architecture import architecture

__all__ = ["IocCoding", "architecture", "coding_of", "io", "ior", "iow", "iowr"]

_NUMBER_BITS: Final = 8
_MAGIC_BITS: Final = 8


@dataclass(frozen=True, slots=True)
class IocCoding:
    """The parts of the request word that differ between architectures.

    Attributes:
        size_bits: Width of the size field.
        none: Direction of a request without argument.
        write: Direction of a request whose argument the kernel reads.
        read: Direction of a request whose argument the kernel writes.
    """

    size_bits: int
    none: int
    write: int
    read: int

    def encode(self, direction: int, magic: int, number: int, size: int) -> int:
        """Pack one request word.

        Raises:
            ValueError: A part does not fit its field.
        """
        if number >> _NUMBER_BITS or magic >> _MAGIC_BITS or size >> self.size_bits:
            raise ValueError(f"ioctl parts out of range: magic {magic:#x}, number {number:#x}, size {size}")
        low = size << (_NUMBER_BITS + _MAGIC_BITS) | magic << _NUMBER_BITS | number
        return direction << (_NUMBER_BITS + _MAGIC_BITS + self.size_bits) | low


_GENERIC: Final = IocCoding(size_bits=14, none=0, write=1, read=2)
_OLD: Final = IocCoding(size_bits=13, none=1, write=4, read=2)
_PARISC: Final = IocCoding(size_bits=14, none=0, write=2, read=1)


def coding_of(name: str) -> IocCoding:
    """Return the coding of the architecture `name`, as `architecture` spells it."""
    if name.startswith(("ppc", "powerpc", "mips", "sparc", "alpha")):
        return _OLD
    if name.startswith("parisc"):
        return _PARISC
    return _GENERIC


_HERE: Final = coding_of(architecture())


def io(magic: int, number: int, coding: IocCoding = _HERE) -> int:
    """Encode `_IO(magic, number)`: no argument structure."""
    return coding.encode(coding.none, magic, number, 0)


def ior(magic: int, number: int, size: int, coding: IocCoding = _HERE) -> int:
    """Encode `_IOR`: the caller reads a structure of `size` bytes."""
    return coding.encode(coding.read, magic, number, size)


def iow(magic: int, number: int, size: int, coding: IocCoding = _HERE) -> int:
    """Encode `_IOW`: the caller writes a structure of `size` bytes."""
    return coding.encode(coding.write, magic, number, size)


def iowr(magic: int, number: int, size: int, coding: IocCoding = _HERE) -> int:
    """Encode `_IOWR`: a structure of `size` bytes goes both ways."""
    return coding.encode(coding.read | coding.write, magic, number, size)
