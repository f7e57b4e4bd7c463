"""The geometry of chunks in linear memory, against NumPy's own indexing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.sources._chunk_grid import ChunkGrid


@st.composite
def grids(draw: st.DrawFn) -> ChunkGrid:
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(ndim))
    chunks = tuple(draw(st.integers(1, n + 2)) for n in shape)
    return ChunkGrid(shape, chunks)


@given(grids(), st.data())
def test_boxes_are_the_range_in_order(grid: ChunkGrid, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, grid.nbytes))
    stop = data.draw(st.integers(start, grid.nbytes))
    numbers = np.arange(grid.nbytes).reshape(grid.shape)
    got: list[int] = []
    boxes = list(grid.boxes(start, stop))
    for box in boxes:
        assert box.offset == len(got)
        part = numbers[tuple(slice(at, at + n) for at, n in zip(box.start, box.shape, strict=True))]
        assert part.shape == box.shape
        got += part.ravel().tolist()
    assert got == list(range(start, stop))
    assert len(boxes) <= 2 * len(grid.shape) - 1 or not boxes


@given(grids(), st.data())
def test_pieces_put_every_byte_of_a_box_where_its_chunk_has_it(grid: ChunkGrid, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, grid.nbytes - 1))
    stop = data.draw(st.integers(start + 1, grid.nbytes))
    numbers = np.arange(grid.nbytes).reshape(grid.shape)
    padded = np.pad(
        numbers,
        [(0, -n % c) for n, c in zip(grid.shape, grid.chunks, strict=True)],
        constant_values=-1,
    )
    out = np.full(stop - start, -2)
    for box in grid.boxes(start, stop):
        view = out[box.offset : box.offset + math.prod(box.shape)].reshape(box.shape)
        for piece in grid.pieces(box):
            place = grid.coordinates(piece.number)
            chunk = padded[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, grid.chunks, strict=True))]
            part = chunk[piece.chunk]
            view[piece.inside] = part
            flat = np.arange(chunk.size).reshape(chunk.shape)[piece.chunk]
            assert grid.last_byte(piece) == flat.max() + 1
    assert out.tolist() == list(range(start, stop))


@given(grids())
def test_direct_means_that_a_chunk_is_its_memory(grid: ChunkGrid) -> None:
    numbers = np.arange(grid.nbytes).reshape(grid.shape)
    for number in range(math.prod(grid.counts)):
        place = grid.coordinates(number)
        chunk = numbers[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, grid.chunks, strict=True))]
        if chunk.shape != grid.chunks:
            continue
        together = np.array_equal(chunk.ravel(), chunk.ravel()[0] + np.arange(chunk.size))
        if grid.direct:
            assert together


@given(grids())
def test_a_pass_with_a_band_kept_decodes_each_chunk_once(grid: ChunkGrid) -> None:
    """Least recently used chunks leave a cache of one band: none may be needed again."""
    kept: list[int] = []
    decoded: list[int] = []
    for position in range(grid.nbytes):
        (box,) = grid.boxes(position, position + 1)
        (piece,) = grid.pieces(box)
        if piece.number in kept:
            kept.remove(piece.number)
        else:
            decoded.append(piece.number)
        kept.append(piece.number)
        del kept[: -grid.band]
    assert len(decoded) == len(set(decoded))


@pytest.mark.parametrize(
    ("shape", "chunks", "band", "direct", "block"),
    [
        # Whole rows of the first axis: one chunk is one stretch of memory.
        ((256, 512, 2048), (1, 512, 2048), 1, True, 128 << 10),
        ((256, 512, 2048), (2, 512, 2048), 1, True, 128 << 10),
        ((256, 512, 2048), (8, 512, 2048), 1, True, 128 << 10),
        ((100, 100), (1, 100), 1, True, 64 << 10),
        # 1.5 MiB: the largest block that does not straddle.
        ((256, 1 << 19), (3, 1 << 19), 1, True, 128 << 10),
        # 3.96 MiB, no multiple of a page: less than a quarter of it, so that few blocks straddle.
        ((100, 720, 5760), (1, 720, 5760), 1, True, 128 << 10),
        # Cubes of 64^3 float32: a page touches 8 chunks, and so do 64 KiB.
        ((256, 512, 2048), (64, 64, 256), 64, False, 64 << 10),
        # Tiles of 100 x 100 float64 in rows of 10 000: 64 KiB would touch 82 chunks, a page touches 6.
        ((10_000, 80_000), (100, 800), 100, False, 4 << 10),
        # Chunks that are longer than the array on an inner axis: contiguous, but not as they are.
        ((1000, 512), (10, 600), 1, False, 64 << 10),
    ],
)
def test_shapes_of_real_arrays(
    shape: tuple[int, ...], chunks: tuple[int, ...], band: int, direct: bool, block: int
) -> None:
    grid = ChunkGrid(shape, chunks)
    assert grid.band == band
    assert grid.direct is direct
    assert grid.block(4096) == block
