"""What a memory counts: a snapshot of the engine's counters, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ErrorRecord", "Histogram", "MemoryStats"]

STAGES = ("queue", "source", "install", "fault", "write")


def _bucket_bounds(bucket: int) -> tuple[int, int]:
    # engine/util.c: four buckets an octave of nanoseconds, one per value below four.
    if bucket < 4:
        return bucket, bucket + 1
    octave, quarter = bucket // 4 + 1, bucket % 4
    width: int = 1 << (octave - 2)
    low = (4 + quarter) * width
    return low, low + width


@dataclass(frozen=True)
class Histogram:
    """Latencies in buckets of nanoseconds, four an octave: percentiles are good to 25 %.

    Attributes:
        count: How many latencies.
        sum_ns: Their sum, in nanoseconds.
        buckets: How many in each bucket.
    """

    count: int
    sum_ns: int
    buckets: tuple[int, ...] = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean in nanoseconds, 0 if there is none."""
        return self.sum_ns / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Return the latency in nanoseconds that `percent` (0 to 100) of all do not pass, 0 if there is none."""
        if not self.count:
            return 0.0
        wanted, seen = self.count * percent / 100, 0
        for bucket, n in enumerate(self.buckets):
            if n and seen + n >= wanted:
                low, high = _bucket_bounds(bucket)
                return low + (high - low) * max(0.0, wanted - seen) / n
            seen += n
        return float(_bucket_bounds(len(self.buckets))[0])

    def as_dict(self) -> dict[str, float]:
        """Return count, mean and the usual percentiles, in nanoseconds."""
        return {
            "count": self.count,
            "mean_ns": self.mean,
            **{f"p{percent}_ns": self.percentile(percent) for percent in (50, 90, 99)},
        }


@dataclass(frozen=True)
class ErrorRecord:
    """A read of the source, or a write to it, that failed for good.

    Attributes:
        block: Number of the block.
        offset: Its first byte in the memory.
        length: Its length in bytes.
        attempts: How often it was tried.
        detail: What the source said.
        poisoned: Whether the block is poisoned (a fault waited for it); else it is just absent, or still dirty.
        time_ns: When, in nanoseconds since the epoch.
        write: Whether it was a write: the block stays dirty and resident, and the next flush tries again.
    """

    block: int
    offset: int
    length: int
    attempts: int
    detail: str
    poisoned: bool
    time_ns: int
    write: bool = False


@dataclass(frozen=True)
class MemoryStats:
    """Counters of one memory. Blocks are counted before their waiters are woken.

    Attributes:
        faults: Faults on blocks that were absent.
        duplicate_faults: Faults on blocks that were being loaded, or there already.
        blocks_demand: Blocks loaded because a fault waited.
        blocks_readahead: Blocks loaded ahead of a sequential or strided scan.
        blocks_prefetch: Blocks loaded by `prefetch` or `populate`.
        blocks_replay: Blocks loaded because an earlier run needed them (`open(replay=...)`).
        replays_dropped: Such plans that were given up, because the program did not follow them.
        bytes_read: Bytes read from the source.
        bytes_extent: Of these, bytes that came as 2 MiB extents (huge pages).
        resident_bytes: Bytes resident now.
        resident_peak: The most bytes that were.
        budget: Most bytes that may be, in blocks.
        evictions: Blocks evicted.
        retries: Reads that failed and were tried again.
        error_count: Reads that failed for good.
        poisoned_blocks: Blocks that are poisoned now.
        write_errors: Writes to the source, or to scratch, that failed for good.
        errors: The newest of these failures, oldest first.
        upgrades: First writes to clean blocks: each is one fault more.
        dirty_bytes: Bytes that were written to, and are not yet where they belong.
        blocks_written: Blocks written back, to the source or to scratch.
        bytes_written: Their bytes, before compression.
        scratch_bytes: Bytes of scratch in use now, after compression.
        reinstalled: Blocks that were touched again while they were being written back.
        latency: Histograms by stage: `queue` (fault read to source asked), `source`, `install`, `fault` (read to
            woken) and `write` (one write to the source or to scratch).
    """

    faults: int
    duplicate_faults: int
    blocks_demand: int
    blocks_readahead: int
    blocks_prefetch: int
    blocks_replay: int
    replays_dropped: int
    bytes_read: int
    bytes_extent: int
    resident_bytes: int
    resident_peak: int
    budget: int
    evictions: int
    retries: int
    error_count: int
    poisoned_blocks: int
    write_errors: int
    errors: tuple[ErrorRecord, ...]
    upgrades: int
    dirty_bytes: int
    blocks_written: int
    bytes_written: int
    scratch_bytes: int
    reinstalled: int
    latency: dict[str, Histogram]

    @property
    def blocks_read(self) -> int:
        """Blocks loaded, for whatever reason."""
        return self.blocks_demand + self.blocks_readahead + self.blocks_prefetch + self.blocks_replay

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as types that JSON has."""
        plain = {name: value for name, value in self.__dict__.items() if isinstance(value, int)}
        return {
            **plain,
            "blocks_read": self.blocks_read,
            "errors": [asdict(error) for error in self.errors],
            "latency": {stage: histogram.as_dict() for stage, histogram in self.latency.items()},
        }


def from_engine(raw: dict[str, Any]) -> MemoryStats:
    """Return the counters as the binding gives them (`struct uf_stats`)."""
    errors = tuple(
        ErrorRecord(
            block=error["block"],
            offset=error["offset"],
            length=error["length"],
            attempts=error["attempts"],
            detail=_text(error["message"]),
            poisoned=bool(error["poisoned"]),
            time_ns=error["time_ns"],
            write=bool(error["write"]),
        )
        for error in raw["errlog"][: raw["nerrors"]]
    )
    return MemoryStats(
        faults=raw["faults"],
        duplicate_faults=raw["duplicates"],
        blocks_demand=raw["blocks_demand"],
        blocks_readahead=raw["blocks_readahead"],
        blocks_prefetch=raw["blocks_prefetch"],
        blocks_replay=raw["blocks_replay"],
        replays_dropped=raw["replays_dropped"],
        bytes_read=raw["bytes_read"],
        bytes_extent=raw["bytes_extent"],
        resident_bytes=raw["resident"],
        resident_peak=raw["resident_peak"],
        budget=raw["budget"],
        evictions=raw["evictions"],
        retries=raw["retries"],
        error_count=raw["errors"],
        poisoned_blocks=raw["poisoned"],
        write_errors=raw["write_errors"],
        errors=errors,
        upgrades=raw["upgrades"],
        dirty_bytes=raw["dirty"],
        blocks_written=raw["writebacks"],
        bytes_written=raw["bytes_written"],
        scratch_bytes=raw["bytes_scratch"],
        reinstalled=raw["reinstalled"],
        latency={
            stage: Histogram(h["count"], h["sum_ns"], tuple(h["buckets"]))
            for stage, h in zip(STAGES, raw["latency"], strict=True)
        },
    )


def _text(message: bytes) -> str:
    return bytes(message).split(b"\0", 1)[0].decode("utf-8", "replace")
