"""A synthetic field of daily rain that looks and compresses like the real thing.

A belt of rain at the equator follows the sun, storms run along 48° north and south, deserts lie between, and
weather lasts for days. A quarter of the cells are wet, and the Earth gets 2.6 mm a day: both about as
observed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DAY_NBYTES", "LATITUDES", "LONGITUDES", "Rain"]

LATITUDES: Final = 360
LONGITUDES: Final = 720
DAY_NBYTES: Final = LATITUDES * LONGITUDES * 4

_PATTERNS: Final = 16
_PERSISTENCE: Final = 0.75  # how much of a day's weather is the day before's
_STEP: Final = np.float32(0.25)  # mm per day, what many rain gauges resolve
_SEED: Final = 20010101


class Rain:
    """The rain of `days` days: a sum of maps, weighted anew each day, and cut off below zero.

    Any day can be computed without the others, and always comes out the same.
    """

    def __init__(self, days: int) -> None:
        self.days = days
        random = np.random.default_rng(_SEED)
        self._maps = _maps(random)
        self._weights = _weights(random, days)

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the days from `start` to `stop`, in mm per day."""
        rain: NDArray[np.float32] = self._weights[start:stop] @ self._maps
        np.maximum(rain, 0, out=rain)
        rain *= rain * np.float32(1.1)  # most wet days are light, a few are heavy
        np.rint(rain, out=rain)
        rain *= _STEP
        return rain.reshape(-1, LATITUDES, LONGITUDES)


def _maps(random: np.random.Generator) -> NDArray[np.float32]:
    """Return the maps, one per row: the mean, the seasonal shift, and the patterns of the weather."""
    degrees = np.linspace(89.75, -89.75, LATITUDES)[:, None]

    def belt(centre: float, width: float) -> NDArray[np.float64]:
        return np.exp(-(((np.abs(degrees) - centre) / width) ** 2))

    mean = 5.5 * belt(0, 10) + 3.0 * belt(48, 16) - 3.2 + _smooth(random, 12.0)
    season = 5.0 * np.sin(np.radians(3 * degrees)) * belt(0, 25) * np.ones((1, LONGITUDES))
    strength = (3.5 * belt(0, 14) + 3.0 * belt(48, 18) + 0.8) * 1.6 / np.sqrt(_PATTERNS)
    weather = [strength * _smooth(random, scale) for scale in np.geomspace(10, 60, _PATTERNS)]
    return np.stack([mean, season, *weather]).astype(np.float32).reshape(2 + _PATTERNS, -1)


def _smooth(random: np.random.Generator, finest: float) -> NDArray[np.float64]:
    """Return a random map with unit variance and no detail beyond `finest` waves around the Earth."""
    along = np.fft.rfftfreq(LONGITUDES, 1 / LONGITUDES)[None, :]
    across = np.fft.fftfreq(LATITUDES, 1 / LATITUDES)[:, None] * 2
    waves = np.hypot(along, across)
    amplitude = np.exp(-((waves / finest) ** 2)) / np.sqrt(1 + waves)
    phases = random.standard_normal((*waves.shape, 2)) @ np.array([1, 1j])
    field = np.fft.irfft2(phases * amplitude, s=(LATITUDES, LONGITUDES))
    result: NDArray[np.float64] = field / field.std()
    return result


def _weights(random: np.random.Generator, days: int) -> NDArray[np.float32]:
    """Return each day's weight of each map."""
    weights = np.empty((days, 2 + _PATTERNS), np.float32)
    weights[:, 0] = 1
    weights[:, 1] = -np.cos(2 * np.pi * (np.arange(days) - 20) / 365.25)
    noise = random.standard_normal((days, _PATTERNS)) * np.sqrt(1 - _PERSISTENCE**2)
    weather = np.zeros(_PATTERNS)
    for day in range(days):
        weather = _PERSISTENCE * weather + noise[day]
        weights[day, 2:] = weather
    return weights
