"""The requests of a `Userfaultfd`: register, fill, protect, wake."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from fcntl import ioctl as _ioctl
from typing import Any, Final, NamedTuple

from userfault.kernel import abi
from userfault.kernel._address import PAGE_MASK, is_address, range_of, source_of
from userfault.kernel._descriptor import Descriptor
from userfault.kernel._handshake import NO_FEATURES
from userfault.kernel.errors import NotSupportedError, UsageError, error_from_errno

__all__ = ["Outcome", "Registration", "Requests"]

_MODES: Final = int(
    abi.RegisterMode.MISSING | abi.RegisterMode.WP | abi.RegisterMode.MINOR | abi.RegisterMode.RWP
)

# What the methods below issue: request word, layout, name of the request.
_COPY: Final = (int(abi.Request.COPY), abi.COPY, "UFFDIO_COPY")
_MOVE: Final = (int(abi.Request.MOVE), abi.MOVE, "UFFDIO_MOVE")
_ZEROPAGE: Final = (int(abi.Request.ZEROPAGE), abi.ZEROPAGE, "UFFDIO_ZEROPAGE")
_CONTINUE: Final = (int(abi.Request.CONTINUE), abi.CONTINUE, "UFFDIO_CONTINUE")
_POISON: Final = (int(abi.Request.POISON), abi.POISON, "UFFDIO_POISON")
_RESULT: Final = abi.Layout("result", value="q").unpack_from

_COPY_WORD: Final = int(abi.Request.COPY)
_pack_copy: Final = abi.COPY.pack
_HALF: Final = 1 << 62  # with two numbers below it no sum leaves the address space
_Fill = tuple[int, abi.Layout, str]


class Outcome(NamedTuple):
    """What a fill request did, with its partial progress.

    Attributes:
        done: Bytes done. Their waiters were woken (unless `wake=False`), those of the rest were not.
        errno: 0 if all was done; EAGAIN after partial progress (`done > 0`: go on at the rest, the next call
            tells the true reason) and while the address space changes (`done == 0`: read events first);
            otherwise the kernel's error number.
    """

    done: int
    errno: int

    @property
    def complete(self) -> bool:
        """Whether everything was done."""
        return self.errno == 0


@dataclass(frozen=True, slots=True)
class Registration:
    """A registered range, as REGISTER answered.

    Attributes:
        start: First byte.
        length: In bytes.
        mode: What is trapped.
        operations: Requests that the kernel offers for it. It promises too much: MOVE on shared memory, COPY on
            files; only trying tells.
    """

    start: int
    length: int
    mode: abi.RegisterMode
    operations: abi.Operation

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + self.length


class Requests(Descriptor):
    """What can be asked of an initialised userfaultfd."""

    def register(
        self,
        where: Any,
        length: int | None = None,
        *,
        mode: abi.RegisterMode = abi.RegisterMode.MISSING,
    ) -> Registration:
        """Trap accesses to a range (UFFDIO_REGISTER). Nothing is registered if it fails.

        Pages that are there already are not missing, and holes between mappings are skipped silently. Registering
        again with a new mode *replaces* the old (pass the union), unless the old has all of it.

        Raises:
            UsageError: No mode, WP with RWP, RWP without its feature, or a range that no kernel would take.
            RangeBusyError: Another userfaultfd has a part of it (or Linux 7.3: WP or RWP would be dropped).
            InvalidRequestError: Nothing is mapped there, or the memory cannot have this mode.
            UffdPermissionError: The mapping may never become writable.
        """
        if not self._ready:
            raise self._refuse()
        start, length = range_of(where, length)
        bits = int(mode)
        if not bits & _MODES:
            raise UsageError(
                f"register: mode {bits:#x} traps nothing: give at least one of {abi.RegisterMode(_MODES)!r}"
            )
        if bits & abi.RegisterMode.WP and bits & abi.RegisterMode.RWP:
            raise UsageError("register: WP and RWP exclude each other on one mapping: choose one of them")
        if bits & abi.RegisterMode.RWP and not self.features & abi.Feature.RWP:
            raise UsageError("register: RWP needs the feature: Userfaultfd(Feature.RWP), Linux 7.3")
        argument = bytearray(abi.REGISTER.pack(start, length, bits, 0))
        self._call(abi.Request.REGISTER, argument, "UFFDIO_REGISTER", start, length)
        operations = abi.Operation(abi.REGISTER.unpack(argument)[3])
        return Registration(start, length, abi.RegisterMode(bits), operations)

    def unregister(self, where: Any, length: int | None = None) -> None:
        """End trapping in a range (UFFDIO_UNREGISTER), and wake all who wait there.

        Missing pages become ordinary memory: zeros, or the file's. Protection ends; poison stays.

        Raises:
            InvalidRequestError: Nothing is mapped there, or another userfaultfd has it.
            NoMemoryError: The owner of the memory has exited.
        """
        if not self._ready:
            raise self._refuse()
        start, length = range_of(where, length)
        argument = bytearray(abi.RANGE.pack(start, length))
        self._call(abi.Request.UNREGISTER, argument, "UFFDIO_UNREGISTER", start, length)
        # The kernel wakes those who wait in ranges registered for MISSING; in others they would wait for ever.
        self._call(abi.Request.WAKE, argument, "UFFDIO_WAKE", start, length)

    def wake(self, where: Any, length: int | None = None) -> None:
        """Wake all who wait in a range (UFFDIO_WAKE); it need not be registered or even mapped any more.

        Who finds nothing resolved faults again, and a new message comes: that is how messages that a dead handler
        had read are had once more.
        """
        if not self._ready:
            raise self._refuse()
        start, length = range_of(where, length)
        self._call(abi.Request.WAKE, bytearray(abi.RANGE.pack(start, length)), "UFFDIO_WAKE", start, length)

    def _call(self, request: int, argument: bytearray, name: str, start: int, length: int) -> None:
        try:
            _ioctl(self._fd, request, argument)
        except OSError as failure:
            raise error_from_errno(
                failure.errno or errno.EIO, call=name, address=start, length=length
            ) from None

    # --- filling ----------------------------------------------------------------------------------------------

    def copy(
        self,
        dst: Any,
        src: Any,
        length: int | None = None,
        *,
        wake: bool = True,
        write_protect: bool = False,
    ) -> int:
        """Fill missing pages with a copy of `src` (UFFDIO_COPY); a page appears whole or not at all.

        Args:
            dst: Where to; an address takes its length from `length`, or from `src`.
            src: The bytes: a bytes-like object, or an address in *this* process, unaligned if need be.
            length: In bytes, whole pages.
            wake: Wake those who wait for it.
            write_protect: Install it write-protected (the range must be registered for WP).

        Returns:
            `length`.

        Raises:
            PageExistsError: There is a page already: `wake` it.
            AgainError: Only a part was done (`done`), or the address space is changing (`done == 0`).
            NotRegisteredError: Not registered, unmapped, or more than one mapping.
            TargetExitedError: The owner has exited.
            UffdError: Others, as `errors` tells.
        """
        # The one request of which a handler makes millions: whole and valid addresses go straight through.
        if (
            self._ready
            and type(dst) is int
            and type(src) is int
            and length is not None
            and 0 < length < _HALF
            and not (dst | length) & PAGE_MASK
            and 0 < dst < _HALF
            and 0 < src < _HALF
        ):
            argument = bytearray(
                _pack_copy(dst, src, length, (0 if wake else 1) | (2 if write_protect else 0), 0)
            )
            try:
                _ioctl(self._fd, _COPY_WORD, argument)
            except OSError as failure:
                return self._failed(_COPY, argument, failure, dst, length)
            return length
        outcome, dst, length = self._copy(
            _COPY, dst, src, length, (0 if wake else 1) | (2 if write_protect else 0)
        )
        return self._checked(_COPY, outcome, dst, length)

    def try_copy(
        self,
        dst: Any,
        src: Any,
        length: int | None = None,
        *,
        wake: bool = True,
        write_protect: bool = False,
    ) -> Outcome:
        """Do as `copy`, with the kernel's errors as values."""
        return self._copy(_COPY, dst, src, length, (0 if wake else 1) | (2 if write_protect else 0))[0]

    def zeropage(self, dst: Any, length: int | None = None, *, wake: bool = True) -> int:
        """Fill missing pages with zeros (UFFDIO_ZEROPAGE); not on huge pages.

        Raises:
            PageExistsError: There is a page, or a write-protection mark (then `copy` zeros).
            InvalidRequestError: Huge pages: `copy` zeros.
            UffdError: As `copy`.
        """
        return self._filled(_ZEROPAGE, dst, length, 0 if wake else 1)

    def try_zeropage(self, dst: Any, length: int | None = None, *, wake: bool = True) -> Outcome:
        """Do as `zeropage`, with the kernel's errors as values."""
        return self._fill(_ZEROPAGE, dst, length, 0 if wake else 1)[0]

    def move(
        self, dst: Any, src: Any, length: int | None = None, *, wake: bool = True, allow_holes: bool = False
    ) -> int:
        """Move pages from elsewhere in this process to missing ones (UFFDIO_MOVE, Linux 6.8), without copying.

        Both must be private anonymous memory of the calling process with the same protection; `dst` registered
        with this userfaultfd. The source is empty afterwards.

        Args:
            dst: Where to.
            src: Where from, page-aligned.
            length: In bytes, whole pages.
            wake: Wake those who wait for it.
            allow_holes: Empty source pages are no error.

        Raises:
            RangeBusyError: A page is pinned, or shared with a forked child or by KSM: copy it.
            UffdError: As `copy`.
        """
        outcome, dst, length = self._move(dst, src, length, (0 if wake else 1) | (2 if allow_holes else 0))
        return self._checked(_MOVE, outcome, dst, length)

    def try_move(
        self, dst: Any, src: Any, length: int | None = None, *, wake: bool = True, allow_holes: bool = False
    ) -> Outcome:
        """Do as `move`, with the kernel's errors as values."""
        return self._move(dst, src, length, (0 if wake else 1) | (2 if allow_holes else 0))[0]

    def continue_(
        self, dst: Any, length: int | None = None, *, wake: bool = True, write_protect: bool = False
    ) -> int:
        """Map pages that are in the page cache already (UFFDIO_CONTINUE, Linux 5.13): the answer to a minor fault.

        Raises:
            BadAddressError: The file has a hole there (or, Linux 7.3, ends before).
            UffdError: As `copy`.
        """
        return self._filled(_CONTINUE, dst, length, (0 if wake else 1) | (2 if write_protect else 0))

    def try_continue(
        self, dst: Any, length: int | None = None, *, wake: bool = True, write_protect: bool = False
    ) -> Outcome:
        """Do as `continue_`, with the kernel's errors as values."""
        return self._fill(_CONTINUE, dst, length, (0 if wake else 1) | (2 if write_protect else 0))[0]

    def poison(self, dst: Any, length: int | None = None, *, wake: bool = True) -> int:
        """Make missing pages fail loudly (UFFDIO_POISON, Linux 6.6): SIGBUS, and EFAULT for system calls.

        It outlives `unregister` and `close`; `copy` and MADV_DONTNEED take it away.

        Raises:
            PageExistsError: There is a page, or poison already.
            UffdError: As `copy`.
        """
        return self._filled(_POISON, dst, length, 0 if wake else 1)

    def try_poison(self, dst: Any, length: int | None = None, *, wake: bool = True) -> Outcome:
        """Do as `poison`, with the kernel's errors as values."""
        return self._fill(_POISON, dst, length, 0 if wake else 1)[0]

    def _filled(self, fill: _Fill, dst: Any, length: int | None, mode: int) -> int:
        outcome, start, length = self._fill(fill, dst, length, mode)
        return self._checked(fill, outcome, start, length)

    def _fill(self, fill: _Fill, dst: Any, length: int | None, mode: int) -> tuple[Outcome, int, int]:
        if not self._ready:
            raise self._refuse()
        start, length = range_of(dst, length, "target")
        return self._issue(fill, bytearray(fill[1].pack(start, length, mode, 0)), start, length)

    def _copy(
        self, fill: _Fill, dst: Any, src: Any, length: int | None, mode: int
    ) -> tuple[Outcome, int, int]:
        if not self._ready:
            raise self._refuse()
        if length is None and not is_address(dst):
            dst, length = range_of(dst, None, "target")
        address, length, keep = source_of(src, length)
        start, length = range_of(dst, length, "target")
        result = self._issue(fill, bytearray(fill[1].pack(start, address, length, mode, 0)), start, length)
        del keep
        return result

    def _move(self, dst: Any, src: Any, length: int | None, mode: int) -> tuple[Outcome, int, int]:
        if not self._ready:
            raise self._refuse()
        if length is None and not is_address(dst):
            dst, length = range_of(dst, None, "target")
        address, length = range_of(src, length, "source")
        start, length = range_of(dst, length, "target")
        return self._issue(_MOVE, bytearray(abi.MOVE.pack(start, address, length, mode, 0)), start, length)

    def _issue(self, fill: _Fill, argument: bytearray, start: int, length: int) -> tuple[Outcome, int, int]:
        try:
            _ioctl(self._fd, fill[0], argument)
        except OSError as failure:
            return _outcome(argument, failure), start, length
        return Outcome(length, 0), start, length

    def _failed(self, fill: _Fill, argument: bytearray, failure: OSError, start: int, length: int) -> int:
        return self._checked(fill, _outcome(argument, failure), start, length)

    def _checked(self, fill: _Fill, outcome: Outcome, start: int, length: int) -> int:
        if outcome.errno:
            raise error_from_errno(
                outcome.errno, call=fill[2], address=start, length=length, done=outcome.done
            )
        return outcome.done

    # --- protection -------------------------------------------------------------------------------------------

    def writeprotect(
        self, where: Any, length: int | None = None, *, protect: bool = True, wake: bool = True
    ) -> None:
        """Trap writes to a range that is registered for WP, or let them pass (UFFDIO_WRITEPROTECT, Linux 5.7).

        Empty pages of anonymous memory are marked only with `WP_UNPOPULATED`; without it, writes there go
        unnoticed. Setting and taking away are idempotent. Before Linux 6.12 at the latest, take the protection of huge
        pages (hugetlb) away before `close`: on 6.1 a later write there spins in the kernel.

        Args:
            where: The range.
            length: In bytes.
            protect: True traps writes; False lets them pass.
            wake: With `protect=False`, wake those who wait (protecting never wakes).

        Raises:
            NotRegisteredError: A mapping in the range has no WP mode; **those before it are already changed**.
            AgainError: The address space is changing: read events first.
        """
        self._protect(
            abi.Request.WRITEPROTECT, "UFFDIO_WRITEPROTECT", where, length, protect=protect, wake=wake
        )

    def rwprotect(
        self, where: Any, length: int | None = None, *, protect: bool = True, wake: bool = True
    ) -> None:
        """Trap reads and writes of a range registered for RWP, or let them pass (UFFDIO_RWPROTECT, Linux 7.3).

        Only pages that are there are protected; empty ones are not marked. Linux 7.3's first releases: on huge
        pages (hugetlb), take the protection away (`protect=False`) right after MADV_DONTNEED or a hole punched
        into a protected page, or the next write to it spins in the kernel (until the page is protected or
        unprotected anew).

        Raises:
            NotRegisteredError: A mapping in the range has no RWP mode; nothing was changed.
            AgainError: The address space is changing: read events first.
        """
        self._protect(abi.Request.RWPROTECT, "UFFDIO_RWPROTECT", where, length, protect=protect, wake=wake)

    def _protect(
        self, request: int, name: str, where: Any, length: int | None, *, protect: bool, wake: bool
    ) -> None:
        if not self._ready:
            raise self._refuse()
        start, length = range_of(where, length)
        mode = 1 if protect else 0 if wake else 2
        argument = bytearray(abi.WRITEPROTECT.pack(start, length, mode))
        self._call(request, argument, name, start, length)

    def set_mode(self, *, enable: abi.Feature = NO_FEATURES, disable: abi.Feature = NO_FEATURES) -> None:
        """Switch `RWP_ASYNC` on or off (UFFDIO_SET_MODE, Linux 7.3).

        Switching on wakes all who wait on this userfaultfd, for missing pages too; those fault again, so expect
        messages twice.

        Raises:
            UsageError: Both at once, or anything but RWP_ASYNC, or without RWP negotiated.
            NotSupportedError: The kernel is older.
            TargetExitedError: The owner has exited.
        """
        if not self._ready:
            raise self._refuse()
        if (enable | disable) & ~abi.Feature.RWP_ASYNC:
            raise UsageError(f"set_mode: only RWP_ASYNC can be switched, not {enable | disable!r}")
        if enable & disable:
            raise UsageError("set_mode: RWP_ASYNC cannot be switched on and off in one call")
        if enable and not self.features & abi.Feature.RWP:
            raise UsageError("set_mode: RWP_ASYNC needs the feature RWP: Userfaultfd(Feature.RWP), Linux 7.3")
        try:
            _ioctl(self._fd, abi.Request.SET_MODE, bytearray(abi.SET_MODE.pack(int(enable), int(disable))))
        except OSError as failure:
            number = failure.errno or errno.EIO
            if number == errno.EINVAL:  # the arguments are right, so the request is not known
                raise NotSupportedError(
                    "UFFDIO_SET_MODE came with Linux 7.3", errno=number, call="UFFDIO_SET_MODE"
                ) from None
            raise error_from_errno(number, call="UFFDIO_SET_MODE") from None
        before = self._negotiated
        self._negotiated = before._replace(features=(before.features | enable) & ~disable)


def _outcome(argument: bytearray, failure: OSError) -> Outcome:
    """Read the result field, which is the last of all fill structures, and holds bytes done or a negative errno."""
    field: int = _RESULT(argument, len(argument) - 8)[0]
    return Outcome(max(field, 0), failure.errno or errno.EIO)
