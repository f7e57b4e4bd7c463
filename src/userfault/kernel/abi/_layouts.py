"""Structures: what the requests take, what read(2) gives."""

from __future__ import annotations

import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, final

from userfault.kernel.abi._flags import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from _typeshed import ReadableBuffer

__all__ = [
    "API",
    "CONTINUE",
    "COPY",
    "LAYOUTS",
    "MESSAGES",
    "MESSAGE_FORK",
    "MESSAGE_PAGEFAULT",
    "MESSAGE_RANGE",
    "MESSAGE_REMAP",
    "MESSAGE_SIZE",
    "MOVE",
    "PAGE_REGION",
    "POISON",
    "RANGE",
    "REGISTER",
    "RWPROTECT",
    "SCAN_ARGUMENT",
    "SET_MODE",
    "WRITEPROTECT",
    "ZEROPAGE",
    "Layout",
]


@final
class Layout:
    """A C structure, packed and unpacked as by `struct.Struct`; it cannot be changed.

    `Layout("uffdio_range", start="Q", len="Q")` names the members in C's order with their `struct` codes; one whose
    code ends in "x" is a gap. All numbers are in this machine's byte order and without hidden padding: every gap is
    written out, and a test compares each offset with C's.

    Attributes:
        c_name: The header's name, "uffdio_copy".
        fields: Names of the fields in order; `range_start` and `range_len` stand for a nested `uffdio_range`.
        offsets: Byte offset of each field.
        format: As the `struct` module has it.
        size: Bytes.
        pack: `pack(*values) -> bytes`, one value for each field.
        pack_into: `pack_into(buffer, offset, *values)`.
        unpack: `unpack(buffer) -> tuple`.
        unpack_from: `unpack_from(buffer, offset=0) -> tuple`.
        iter_unpack: `iter_unpack(buffer)` yields one tuple for each structure in the buffer.
    """

    __slots__ = (
        "c_name",
        "fields",
        "format",
        "iter_unpack",
        "offsets",
        "pack",
        "pack_into",
        "size",
        "unpack",
        "unpack_from",
    )

    c_name: str
    fields: tuple[str, ...]
    offsets: Mapping[str, int]
    format: str
    size: int
    # The methods of the compiled format themselves: one more Python call in each would be felt in a fault handler.
    pack: Callable[..., bytes]
    pack_into: Callable[..., None]
    unpack: Callable[[ReadableBuffer], tuple[Any, ...]]
    unpack_from: Callable[..., tuple[Any, ...]]
    iter_unpack: Callable[[ReadableBuffer], Iterator[tuple[Any, ...]]]

    def __init__(self, c_name: str, /, **members: str) -> None:
        offsets: dict[str, int] = {}
        position = 0
        for name, code in members.items():
            if not code.endswith("x"):
                offsets[name] = position
            position += struct.calcsize("=" + code)
        packer = struct.Struct("=" + "".join(members.values()))
        values = {"c_name": c_name, "fields": tuple(offsets), "offsets": MappingProxyType(offsets)}
        for name in self.__slots__:
            object.__setattr__(self, name, values[name] if name in values else getattr(packer, name))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Layout cannot be changed ({name} of {self.c_name})")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Layout cannot be changed ({name} of {self.c_name})")

    def __repr__(self) -> str:
        return f"<Layout of struct {self.c_name}: {', '.join(self.fields)}; {self.size} bytes>"

    def encode(self, **values: int) -> bytes:
        """Pack by name; what is not given is 0.

        Raises:
            TypeError: The structure has no such field.

        >>> from userfault.kernel import abi
        >>> abi.RANGE.encode(start=0x10000, len=0x1000) == abi.RANGE.pack(0x10000, 0x1000)
        True
        """
        if unknown := values.keys() - set(self.fields):
            raise TypeError(
                f"{self.c_name} has no {', '.join(sorted(unknown))}; it has {', '.join(self.fields)}"
            )
        return self.pack(*(values.get(name, 0) for name in self.fields))

    def decode(self, buffer: ReadableBuffer) -> dict[str, int]:
        """Unpack by name.

        Raises:
            struct.error: `buffer` is not `size` bytes long.
        """
        return dict(zip(self.fields, self.unpack(buffer), strict=True))


API: Final = Layout("uffdio_api", api="Q", features="Q", ioctls="Q")
RANGE: Final = Layout("uffdio_range", start="Q", len="Q")
REGISTER: Final = Layout("uffdio_register", range_start="Q", range_len="Q", mode="Q", ioctls="Q")
COPY: Final = Layout("uffdio_copy", dst="Q", src="Q", len="Q", mode="Q", copy="q")
ZEROPAGE: Final = Layout("uffdio_zeropage", range_start="Q", range_len="Q", mode="Q", zeropage="q")
CONTINUE: Final = Layout("uffdio_continue", range_start="Q", range_len="Q", mode="Q", mapped="q")
POISON: Final = Layout("uffdio_poison", range_start="Q", range_len="Q", mode="Q", updated="q")
MOVE: Final = Layout("uffdio_move", dst="Q", src="Q", len="Q", mode="Q", move="q")
WRITEPROTECT: Final = Layout("uffdio_writeprotect", range_start="Q", range_len="Q", mode="Q")
RWPROTECT: Final = Layout("uffdio_rwprotect", range_start="Q", range_len="Q", mode="Q")
SET_MODE: Final = Layout("uffdio_set_mode", enable="Q", disable="Q")
PAGE_REGION: Final = Layout("page_region", start="Q", end="Q", categories="Q")
SCAN_ARGUMENT: Final = Layout(
    "pm_scan_arg",
    size="Q",
    flags="Q",
    start="Q",
    end="Q",
    walk_end="Q",
    vec="Q",
    vec_len="Q",
    max_pages="Q",
    category_inverted="Q",
    category_mask="Q",
    category_anyof_mask="Q",
    return_mask="Q",
)

# All by their C names, but for uffd_msg, of which every event has its own.
LAYOUTS: Final[Mapping[str, Layout]] = MappingProxyType(
    {
        layout.c_name: layout
        for layout in (
            API,
            RANGE,
            REGISTER,
            COPY,
            ZEROPAGE,
            CONTINUE,
            POISON,
            MOVE,
            WRITEPROTECT,
            RWPROTECT,
            SET_MODE,
            PAGE_REGION,
            SCAN_ARGUMENT,
        )
    }
)

# One message is 32 bytes whatever it says. The union begins at byte 8; `gap` is the reserved bytes 1 to 7.
MESSAGE_SIZE: Final = 32
MESSAGE_PAGEFAULT: Final = Layout(
    "uffd_msg", event="B", gap="7x", flags="Q", address="Q", ptid="I", rest="4x"
)
MESSAGE_FORK: Final = Layout("uffd_msg", event="B", gap="7x", ufd="I", rest="20x")
MESSAGE_REMAP: Final = Layout("uffd_msg", event="B", gap="7x", from_="Q", to="Q", len="Q")
# REMOVE and UNMAP
MESSAGE_RANGE: Final = Layout("uffd_msg", event="B", gap="7x", start="Q", end="Q", rest="8x")

MESSAGES: Final[Mapping[Event, Layout]] = MappingProxyType(
    {
        Event.PAGEFAULT: MESSAGE_PAGEFAULT,
        Event.FORK: MESSAGE_FORK,
        Event.REMAP: MESSAGE_REMAP,
        Event.REMOVE: MESSAGE_RANGE,
        Event.UNMAP: MESSAGE_RANGE,
    }
)
