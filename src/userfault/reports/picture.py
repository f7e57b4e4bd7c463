"""The picture of a recording: which blocks were touched when, and how much of the budget was used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from userfault.errors import MissingExtraError
from userfault.reports._palette import KINDS, RESIDENT
from userfault.reports._recording import Kind, Recording
from userfault.reports._replay import occupancy, resident_over_time
from userfault.reports._text import format_duration
from userfault.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SUFFIXES", "draw", "figure"]

SUFFIXES: Final = (".png", ".svg", ".pdf")

# How large the dots are; evictions are drawn first, what somebody waited for is on top.
_SIZES: Final = {Kind.EVICT: 2.0, Kind.DEMAND: 4.0, Kind.POISON: 40.0}
_STYLE: Final = {
    # Yellow is for dark screens.
    kind: (label, "#000000" if kind is Kind.POISON else colour, _SIZES.get(kind, 3.0))
    for kind, (label, colour) in KINDS.items()
}
_INK: Final = "#333333"
# More points than this are beyond what can be seen, and make files large: every n-th is drawn.
_MOST_POINTS: Final = 120_000
# One letter of a phase's label, as a share of the width of the axes: roughly, and rather more than less.
_LETTER_WIDTH: Final = 0.0085
_UNITS: Final = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def draw(recording: Recording, path: str | Path) -> None:
    """Draw a recording into a file; its suffix chooses the format.

    Raises:
        MissingExtraError: Matplotlib is not installed.
        ValueError: The suffix is none of `SUFFIXES`.
        OSError: The file cannot be written.

    Example:
        >>> from userfault.reports.picture import draw
        >>> draw(recording, "blocks.svg")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a picture ends in {', '.join(SUFFIXES)}")
    figure(recording).savefig(path, dpi=150)


def figure(recording: Recording) -> Figure:
    """Make the Matplotlib figure, for programs that want to show or change it.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.for_module("matplotlib", "cli", "drawing a picture") from error
    # Not pyplot: it keeps figures alive, and looks for a display.
    drawing = Figure(figsize=(11.0, 7.0), layout="constrained", facecolor="white")
    FigureCanvasAgg(drawing)
    blocks, memory = drawing.subplots(2, 1, sharex=True, height_ratios=[3.6, 1.0])
    _draw_blocks(blocks, recording)
    _draw_memory(memory, recording)
    _draw_phases(blocks, memory, recording)
    drawing.suptitle(_title(recording), x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    return drawing


def _title(recording: Recording) -> str:
    size = format_size(recording.nbytes)
    within = f" within a budget of {format_size(recording.budget)}" if recording.budget is not None else ""
    return f"{recording.name}: {size} of array{within}"


def _unit(nbytes: float) -> tuple[int, str]:
    return next(((scale, name) for scale, name in _UNITS if nbytes >= scale), (1, "bytes"))


def _draw_blocks(axes: Axes, recording: Recording) -> None:
    scale, unit = _unit(recording.nbytes)
    top = recording.nbytes / scale
    seconds = max(recording.seconds, 1e-9)
    _shade_resident(axes, recording, (0.0, seconds, 0.0, top))
    events = recording.events
    when = (events["t_ns"].astype(np.int64) - recording.start_ns) / 1e9
    where = (events["block"].astype(np.float64) + 0.5) * recording.block / scale
    for kind, (label, colour, size) in _STYLE.items():
        chosen = np.flatnonzero(events["kind"] == kind)
        if not len(chosen):
            continue
        shown = chosen[:: -(-len(chosen) // _MOST_POINTS)]
        axes.scatter(
            when[shown], where[shown], s=size, c=colour, linewidths=0, rasterized=True,
            marker="X" if kind is Kind.POISON else "o", label=f"{label} ({len(chosen):,})",
        )  # fmt: skip
    axes.set_xlim(0, seconds)
    axes.set_ylim(0, top)
    axes.set_ylabel(f"offset in the array ({unit})", color=_INK)
    _plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    # The reader's order: first what somebody waited for.
    order = sorted(range(len(labels)), key=lambda i: list(_STYLE)[::-1].index(_kind_of(labels[i])))
    patch = _patch(RESIDENT, "resident")
    axes.legend(
        [*(handles[i] for i in order), patch], [*(labels[i] for i in order), "resident"],
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(labels) + 1, frameon=False, fontsize=9,
        markerscale=3.0, handletextpad=0.3, columnspacing=1.2, borderaxespad=0.1,
    )  # fmt: skip


def _kind_of(label: str) -> Kind:
    return next(kind for kind, (name, _, _) in _STYLE.items() if label.startswith(name))


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.45, label=label)


def _shade_resident(axes: Axes, recording: Recording, extent: tuple[float, float, float, float]) -> None:
    from matplotlib.colors import to_rgb

    share = occupancy(recording, columns=900, rows=480)
    image = np.empty((*share.shape, 4), np.float32)
    image[..., :3] = to_rgb(RESIDENT)
    # A cell with few of its blocks resident must still be seen: look-ups leave one block here, one there.
    image[..., 3] = np.where(share > 0, 0.15 + 0.35 * np.clip(share, 0, 1), 0)
    axes.imshow(image, origin="lower", aspect="auto", extent=extent, interpolation="nearest", zorder=0)


def _draw_memory(axes: Axes, recording: Recording) -> None:
    times, level = resident_over_time(recording)
    highest = max(int(level.max()), recording.budget or 0, recording.block)
    scale, unit = _unit(highest)
    thin = slice(None, None, -(-len(times) // 20_000))
    axes.fill_between(times[thin], level[thin] / scale, step="post", color=RESIDENT, alpha=0.45, linewidth=0)
    axes.step(times[thin], level[thin] / scale, where="post", color="#0072B2", linewidth=1.0)
    peak = f"peak {format_size(int(level.max()))}"
    if recording.budget is not None:
        axes.axhline(recording.budget / scale, color="#D55E00", linestyle="--", linewidth=1.3)
        peak += f" of {format_size(recording.budget)}"
    axes.set_ylim(0, highest / scale * 1.25)
    axes.annotate(
        peak, (1.0, 1.0), xycoords="axes fraction", xytext=(-4, -4), textcoords="offset points", ha="right",
        va="top", fontsize=9, color="#D55E00",
    )  # fmt: skip
    axes.set_xlabel("time (s)", color=_INK)
    axes.set_ylabel(f"resident ({unit})", color=_INK)
    _plain(axes)


def _draw_phases(blocks: Axes, memory: Axes, recording: Recording) -> None:
    total = max(recording.seconds, 1e-9)
    taken = 0.0  # how far the labels of the upper line reach, as a share of the width
    for phase in recording.phases:
        start = (phase.start_ns - recording.start_ns) / 1e9
        duration = (phase.end_ns - phase.start_ns) / 1e9
        for axes in (blocks, memory):
            axes.axvline(start, color=_INK, linewidth=0.6, alpha=0.5)
        label = f"{phase.name}, {format_duration(duration * 1e9)}"
        # A label that would run into the one before it goes one line down.
        crowded = start / total < taken
        if not crowded:
            taken = start / total + len(label) * _LETTER_WIDTH
        blocks.annotate(
            label, (start, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -20 if crowded else -4),
            textcoords="offset points", ha="left", va="top", fontsize=9.5, color=_INK,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
