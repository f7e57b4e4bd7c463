"""Blocks that a device may write to: pinned, they stay where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.page_sources import PatternSource
from support.pagers import own_pager
from support.written import (
    BLOCK,
    CLEAN,
    DIRTY,
    NBYTES,
    changed,
    invert,
    matrix,
    new_file,
    of_file,
)
from userfault.errors import (
    BudgetError,
    ClosedError,
    SourceError,
)
from userfault.memory import PagedMemory
from userfault.sources._own import SourceRecipe
from userfault.sources._worker_data import WorkerData


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return new_file(tmp_path)


def test_a_pinned_block_stays(file: Path) -> None:
    with of_file(file, memory=8 * BLOCK, readahead=False) as memory:
        array = matrix(memory)
        pin = memory.pin(array[3:5])
        assert pin.nbytes == 2 * BLOCK
        with memory.pin(array[4]):
            assert memory.evict(array[3:5]) == 0
            assert int(array.sum()) > 0  # passes through all of the budget
        invert(memory, 3)
        # A device's writes are not seen, so what is pinned counts as dirty; what is there is written all the same.
        assert memory.residency()[[3, 4]].tolist() == [DIRTY, DIRTY]
        memory.flush()
        assert file.read_bytes() == b"head" + changed(3) + b"tail"
        assert memory.residency()[[3, 4]].tolist() == [DIRTY, DIRTY]
        pin.release()
        pin.release()
        assert pin.nbytes == 0
        memory.flush()
        assert memory.residency()[[3, 4]].tolist() == [CLEAN, CLEAN]
        assert memory.evict(array[3:5]) == 2 * BLOCK
        with pytest.raises(BudgetError, match="pin of"):
            memory.pin()
        assert file.read_bytes() == b"head" + changed(3) + b"tail"
        del array
    pin.release()
    with pytest.raises(ClosedError):
        memory.pin()


def test_a_pin_that_fails_pins_nothing(tmp_path: Path) -> None:
    class Torn(PatternSource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset >= 4 * BLOCK:
                raise OSError("torn")
            super().read_into(offset, buffer)

    with (
        own_pager(attempts=1),
        PagedMemory(WorkerData(SourceRecipe(Torn(NBYTES))), name="torn", block=BLOCK) as memory,
    ):
        array = matrix(memory)
        with pytest.raises(SourceError, match="torn"):
            memory.pin(array[::6])
        assert memory.evict(array[0]) == BLOCK
        del array
