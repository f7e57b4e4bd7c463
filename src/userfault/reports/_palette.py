"""Colours of all reports: told apart with any colour vision, on paper and on dark screens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from userfault._trace import EventKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["KINDS", "RESIDENT", "SERIES", "Hue", "Look", "blend", "level"]

Hue = Literal["read", "written", "both", "touched", "resident"]

# Okabe and Ito's palette. By rising priority: what a cell shows if several things happened in it; what somebody waited
# for is above what was there in time.
KINDS: Final = {
    EventKind.EVICT: ("evicted", "#9E9E9E"),
    EventKind.DIRTY: ("first write", "#CC79A7"),
    EventKind.WRITE: ("written back", "#E69F00"),
    EventKind.READAHEAD: ("readahead", "#0072B2"),
    EventKind.PREFETCH: ("prefetch", "#009E73"),
    EventKind.REPLAY: ("replay", "#00B8A9"),
    EventKind.DEMAND: ("on demand", "#D55E00"),
    EventKind.POISON: ("poisoned", "#F0E442"),
}
RESIDENT: Final = "#56B4E9"
# For lines and areas without a meaning of their own, in the order of use.
SERIES: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C00", "#7A7A7A")

# Sequential ramps whose lightness changes evenly: on a light ground from a tint to dark, on a dark ground from a shade
# to bright. The first colour is that of the least heat there is; untouched memory has the ground's colour.
_LIGHT: Final[dict[Hue, tuple[str, ...]]] = {
    "read": ("#CFE1F2", "#9CC8E8", "#5AA5D6", "#2679BE", "#0F559C"),
    "written": ("#FBDCBB", "#F9BF87", "#F3964A", "#E0701A", "#B94E06"),
    "both": ("#EAD1E1", "#D6A3C4", "#BD6FA3", "#9A4583", "#6E2660"),
    "touched": ("#C4E8DB", "#86CDB5", "#41AB89", "#15805F", "#01553F"),
    "resident": ("#E3F1FB", "#CBE6F8", "#AFD9F4"),
}
_DARK: Final[dict[Hue, tuple[str, ...]]] = {
    "read": ("#12395C", "#125F96", "#2389CC", "#5FB6EC", "#BFE3FB"),
    "written": ("#5A2A0A", "#924308", "#D0650C", "#F59A2E", "#FFDB8F"),
    "both": ("#4A1D3F", "#7A3568", "#AC5896", "#D78CC0", "#F8CDE9"),
    "touched": ("#0A4434", "#0D6B50", "#169A73", "#4FCBA3", "#B9F3DE"),
    "resident": ("#173140", "#1F4A63", "#2F6B8E"),
}
# What 16 colours are closest to.
_FEW: Final[dict[Hue, tuple[str, ...]]] = {
    "read": ("#0000AA", "#5555FF", "#55FFFF"),
    "written": ("#AA0000", "#FF5555", "#FFFF55"),
    "both": ("#AA00AA", "#FF55FF"),
    "touched": ("#00AA00", "#55FF55"),
    "resident": ("#555555", "#555555"),
}
_FEW_KINDS: Final = {
    EventKind.EVICT: "#AAAAAA",
    EventKind.DIRTY: "#FF55FF",
    EventKind.WRITE: "#FFFF55",
    EventKind.READAHEAD: "#5555FF",
    EventKind.PREFETCH: "#55FF55",
    EventKind.REPLAY: "#55FFFF",
    EventKind.DEMAND: "#FF5555",
    EventKind.POISON: "#FFFFFF",
}
_STEPS: Final = 256


class Look:
    """A ground to draw on, and the colours that are seen on it.

    Args:
        ground: "light", "dark", or "few": a dark terminal that has 16 colours.
    """

    def __init__(self, ground: Literal["light", "dark", "few"]) -> None:
        self._ramps = {"light": _LIGHT, "dark": _DARK, "few": _FEW}[ground]
        self._few = ground == "few"
        self.untouched = {"light": "#EDEDED", "dark": "#242424", "few": "#000000"}[ground]

    def ramp(self, hue: Hue) -> NDArray[np.uint8]:
        """Return 256 colours, from the least heat to the most, as `(256, 3)`."""
        stops = np.array([_rgb(colour) for colour in self._ramps[hue]], float)
        at = np.linspace(0, len(stops) - 1, _STEPS)
        channels = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
        return np.asarray(np.rint(np.stack(channels, axis=1)), np.uint8)

    def hue(self, hue: Hue, share: float = 0.65) -> str:
        """Return one colour of a ramp, for legends and lines."""
        red, green, blue = self.ramp(hue)[round(share * (_STEPS - 1))].tolist()
        return f"#{red:02X}{green:02X}{blue:02X}"

    def kind(self, kind: EventKind) -> str:
        """Return the colour of a kind of events."""
        return _FEW_KINDS[kind] if self._few else KINDS[kind][1]


def _rgb(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def blend(colour: str) -> NDArray[np.uint8]:
    """Return a colour as three bytes."""
    return np.array(_rgb(colour), np.uint8)


def level(heat: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return where on a ramp a heat from 0 to 1 is: little heat must be seen, too (0.1 % is at 0.06, 10 % at 0.4)."""
    clipped: NDArray[np.float64] = np.asarray(heat, np.float64).clip(0, 1)
    return np.power(clipped, 0.4, dtype=np.float64)
