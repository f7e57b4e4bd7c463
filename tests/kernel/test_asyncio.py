"""`async for event in uffd`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.kernel import PAGE, Area, Touch, make_area, waiters
from userfault.kernel import PageFault, Userfaultfd
from userfault.kernel.errors import NotInitialisedError, UsageError
from userfault.kernel.mapping import MemoryKind


@pytest.fixture
def area() -> Any:
    with make_area(MemoryKind.ANONYMOUS, 8) as made:
        yield made


def test_faults_are_served_in_the_event_loop(area: Area) -> None:
    async def serve(uffd: Userfaultfd, count: int) -> list[int]:
        seen: list[int] = []
        async for event in uffd:
            assert isinstance(event, PageFault)
            uffd.copy(event.address, b"a" * PAGE)
            seen.append(event.address)
            if len(seen) == count:
                break
        return seen

    async def main(uffd: Userfaultfd) -> list[int]:
        handler = asyncio.create_task(serve(uffd, 8))
        await asyncio.sleep(0)  # it waits for its first event now
        # In threads: the event loop itself must never touch what it serves.
        heads = await asyncio.gather(*(asyncio.to_thread(area.head, index) for index in range(8)))
        assert heads == [b"a" * 32] * 8
        return await handler

    with Userfaultfd() as uffd:
        uffd.register(area.memory)
        seen = asyncio.run(asyncio.wait_for(main(uffd), 60))
    assert sorted(seen) == [area.page(index) for index in range(8)]


def test_closing_ends_the_iteration(area: Area) -> None:
    async def main() -> int:
        uffd = Userfaultfd()

        async def serve() -> int:
            return len([event async for event in uffd])

        handler = asyncio.create_task(serve())
        while not uffd._sleepers:
            await asyncio.sleep(0)
        uffd.close()
        return await asyncio.wait_for(handler, 60)

    assert asyncio.run(main()) == 0


def test_cancelling_it_leaves_the_descriptor_usable(area: Area) -> None:
    async def main(uffd: Userfaultfd) -> None:
        async def serve() -> None:
            async for _ in uffd:
                raise AssertionError("there was an event")

        handler = asyncio.create_task(serve())
        while not uffd._sleepers:
            await asyncio.sleep(0)
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler
        assert not uffd._sleepers

    with Userfaultfd() as uffd:
        asyncio.run(main(uffd))
        uffd.register(area.memory)
        with Touch(area):
            waiters(uffd, 1)
            assert len(uffd.read_events()) == 1
            uffd.zeropage(area.memory)


def test_what_was_drained_comes_first(area: Area) -> None:
    async def first(uffd: Userfaultfd) -> object:
        async for event in uffd:
            return event
        return None

    with Userfaultfd() as uffd:
        uffd.register(area.memory)
        with Touch(area, 2):
            waiters(uffd, 1)
            uffd.drain()
            event = asyncio.run(asyncio.wait_for(first(uffd), 60))
            assert isinstance(event, PageFault)
            assert event.address == area.page(2)
            uffd.zeropage(area.memory)


def test_wrong_use_is_refused() -> None:
    async def first(uffd: Userfaultfd) -> None:
        async for _ in uffd:
            pass

    with Userfaultfd(nonblocking=False) as uffd, pytest.raises(UsageError, match="nonblocking=True"):
        asyncio.run(first(uffd))
    with Userfaultfd(handshake=False) as uffd, pytest.raises(NotInitialisedError):
        asyncio.run(first(uffd))
