"""Writes by userfaultfd's asynchronous write protection: the kernel notes them itself, no handler is needed.

Armed pages are write-protected; the first write of a page takes the protection away, in the kernel, and a scan finds
the pages that have none. The scan protects what it reports in the same step (Linux 6.7: WP_ASYNC and PAGEMAP_SCAN).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from userfault.kernel.abi import Feature, RegisterMode
from userfault.kernel.pagemap import PageCategory, give_back
from userfault.track import _runs
from userfault.track._ledger import Collected
from userfault.track._registering import Registering

if TYPE_CHECKING:
    from userfault.kernel.pagemap import Regions
    from userfault.kernel.userfaultfd import Userfaultfd
    from userfault.track._runs import Runs

__all__ = ["WriteProtection", "write_protection"]


class WriteProtection(Registering):
    """The method "wp-async". Of transparent huge pages it tells each small page apart."""

    name = "wp-async"
    tells_reads = False
    tells_writes = True
    _features = Feature.WP_ASYNC
    _mode = RegisterMode.WP
    _needs = "Linux 6.7 or newer (userfaultfd's WP_ASYNC and PAGEMAP_SCAN)"

    def _arm(self, uffd: Userfaultfd, start: int, end: int) -> None:
        assert self._scanner is not None
        # Pages that are not there yet are marked too: the zero page that a read maps shall not pass for a write.
        self._scanner.write_protect(start, end - start, check_wpasync=False)

    def collect(self, runs: Runs, rearm: bool) -> Collected:
        """Return the pages without protection; with `rearm` each is protected when it is looked at."""
        found, blind = self._looked(runs, lambda start, end: self._scan(start, end, rearm))
        regions = found[0] if len(found) == 1 else np.concatenate(found) if found else None
        written = _runs.EMPTY if regions is None else _runs.joined(regions["start"], regions["end"])
        del regions
        while found:
            give_back(found.pop())
        return Collected(None, written, blind)

    def _scan(self, start: int, end: int, rearm: bool) -> Regions:
        assert self._scanner is not None
        written = PageCategory.WRITTEN
        found = self._scanner.scan(start, end - start, mask=written, protect=rearm, check_wpasync=True)
        return found.regions


write_protection = WriteProtection()
