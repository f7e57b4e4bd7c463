"""What the methods share that register memory with a userfaultfd of their own and find out by scanning."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar

from userfault.errors import PrivilegeError, UntrackableError
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel.abi import Feature, RegisterMode
from userfault.kernel.errors import (
    FeatureError,
    InvalidRequestError,
    NoMemoryError,
    NotSupportedError,
    RangeBusyError,
    UffdError,
    UffdPermissionError,
)
from userfault.kernel.pagemap import Scanner, vm_flags
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.track import _runs
from userfault.track._vmas import vmas

if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.kernel.pagemap import Regions
    from userfault.track._runs import Runs

__all__ = ["Registering"]


class Registering:
    """The base of such methods. Their descriptors are open only while something is tracked."""

    _features: ClassVar[Feature]
    _mode: ClassVar[RegisterMode]
    _needs: ClassVar[str]
    """What the kernel must have, for messages."""

    def __init__(self) -> None:
        self._uffd: Userfaultfd | None = None
        self._scanner: Scanner | None = None
        self._tracked: Runs = _runs.EMPTY

    def granularity(self, start: int) -> int:
        """Return the size of the pages there."""
        found = vmas(start, start + 1)
        return found[0].page_size if found else PAGE_SIZE

    def begin(self, runs: Runs) -> None:
        """Register and arm, all or nothing."""
        uffd, _ = self._opened()
        done: list[tuple[int, int]] = []
        try:
            for start, end in runs.tolist():
                self._register(uffd, start, end - start)
                done.append((start, end))
                self._arm(uffd, start, end)
        except BaseException:
            self._unregister(done)
            self._close_unused()
            raise
        self._tracked = _runs.union(self._tracked, runs)

    def _arm(self, uffd: Userfaultfd, start: int, end: int) -> None:
        raise NotImplementedError

    def end(self, runs: Runs) -> None:
        """Unregister, which also takes all protection away."""
        self._tracked = _runs.subtract(self._tracked, runs)
        self._unregister(runs.tolist())
        self._close_unused()

    def forked(self, runs: Runs) -> None:
        """Register anew: the child's memory is not registered, and the parent's descriptors act on the parent."""
        self.abandon()
        self.begin(runs)

    def abandon(self) -> None:
        """Close what was the parent's, without a request."""
        self._tracked = _runs.EMPTY
        self._close_unused()

    def _opened(self) -> tuple[Userfaultfd, Scanner]:
        if self._uffd is None or self._scanner is None:
            uffd = self._open()
            try:
                self._scanner = Scanner()
            except BaseException:
                uffd.close()
                raise
            self._uffd = uffd
        return self._uffd, self._scanner

    def _open(self) -> Userfaultfd:
        try:
            return Userfaultfd(self._features)
        except FeatureError:
            raise UntrackableError(f"this needs {self._needs}, and this kernel has none") from None
        except NotSupportedError as error:
            raise UntrackableError(f"this needs userfaultfd: {error}") from None
        except UffdPermissionError as error:
            raise PrivilegeError(
                f"tracking accesses needs a userfaultfd: {error}", call="userfaultfd", errno=error.errno
            ) from None

    def _close_unused(self) -> None:
        if not len(self._tracked):
            uffd, scanner, self._uffd, self._scanner = self._uffd, self._scanner, None, None
            if uffd is not None:
                uffd.close()
            if scanner is not None:
                scanner.close()

    def _register(self, uffd: Userfaultfd, start: int, length: int) -> None:
        try:
            uffd.register(start, length, mode=self._mode)
        except RangeBusyError:
            raise UntrackableError(
                "another userfaultfd has registered this memory (userfault.kernel, or another library): unregister it"
                " there first"
            ) from None
        except UffdPermissionError:
            raise UntrackableError(
                "its file is open for reading only, and the kernel registers no such mapping: open it for writing too"
            ) from None
        except InvalidRequestError as error:
            if not vmas(start, start + length):
                raise UntrackableError("its memory is not mapped any more") from None
            raise UntrackableError(
                "the kernel tracks no accesses to such memory (a device's, a secret or a droppable one):"
                f" copy it to ordinary memory ({error})"
            ) from None
        except NoMemoryError as error:
            raise UntrackableError(
                f"no memory for it, or too many mappings: raise vm.max_map_count ({error})"
            ) from None

    def _unregister(self, ranges: list[tuple[int, int]]) -> None:
        assert self._uffd is not None
        for start, end in ranges:
            with contextlib.suppress(UffdError):  # it is gone, or another's by now
                self._uffd.unregister(start, end - start)

    def _looked(self, runs: Runs, scan: Callable[[int, int], Regions]) -> tuple[list[Regions], Runs]:
        """Return what scans of the runs found, and where they could not look."""
        found: list[Regions] = []
        blind = _runs.EMPTY
        for start, end in runs.tolist():
            try:
                found.append(scan(start, end))
            except NoMemoryError:  # for page tables; what was protected until then is not told
                blind = _runs.union(blind, _runs.runs_of([(start, end)]))
            except UffdPermissionError:
                # Somebody mapped, moved or registered anew a part of it: what is there now is not what we armed.
                run = _runs.runs_of([(start, end)])
                lost = self._lost(run)
                for low, high in _runs.subtract(run, lost).tolist():
                    try:
                        found.append(scan(low, high))
                    except (NoMemoryError, UffdPermissionError):
                        lost = _runs.union(lost, _runs.runs_of([(low, high)]))
                blind = _runs.union(blind, lost)
        return found, blind

    def _lost(self, runs: Runs) -> Runs:
        """Return what is not registered any more: it was mapped anew, moved, or given to another userfaultfd."""
        flag = "ur" if self._mode == RegisterMode.RWP else "uw"
        ours = [
            (v.start, v.end)
            for start, end in runs.tolist()
            for v in vm_flags(start, end - start)
            if flag in v.flags
        ]
        return _runs.subtract(runs, _runs.runs_of(ours))
