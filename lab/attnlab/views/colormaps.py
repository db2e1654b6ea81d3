"""Perceptual colour maps, 256 colours each: sequential for weights, diverging for signed differences."""

from __future__ import annotations

from functools import cache

import numpy as np

from attnlab.views.errors import ViewError

# ten evenly spaced stops of matplotlib's maps (Smith and van der Walt 2015, CC0)
_STOPS = {
    "viridis": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6dcd59 b4de2c fde725",
    "magma": "000004 180f3d 440f76 721f81 9e2f7f cd4071 f1605d fd9668 feca8d fcfdbf",
    # white to deep violet, for paper; ours
    "paper": "ffffff efeaf6 dccfec c5b1e0 ab91d2 9071c2 7652ae 5d3596 451a78 2d0356",
    # both arms fall in lightness alike from the middle; ours
    "blue_red": "2360bd f7f5f2 b0232a",
}
COLORMAPS = tuple(_STOPS)
SEQUENTIAL = ("viridis", "magma", "paper")
DIVERGING = "blue_red"


@cache
def colormap(name: str) -> np.ndarray:
    """uint8 [256, 3] sRGB, interpolated in Oklab (Ottosson 2020) so that equal steps look equal; read-only.

    Raises ViewError for an unknown name.
    """
    if name not in _STOPS:
        raise ViewError(f"colormap must be one of {', '.join(COLORMAPS)}; got {name!r}")
    stops = np.array([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in _STOPS[name].split()])
    lab = _to_oklab(stops / 255.0)
    at = np.linspace(0.0, len(stops) - 1, 256)
    table = np.stack([np.interp(at, np.arange(len(stops)), lab[:, axis]) for axis in range(3)], axis=1)
    colors = np.round(np.clip(_from_oklab(table), 0.0, 1.0) * 255.0).astype(np.uint8)
    colors.setflags(write=False)
    return colors


def colorize(unit: np.ndarray, name: str) -> np.ndarray:
    """uint8 [..., 3] colours of values in 0..1; values outside are clipped."""
    index = np.round(np.clip(np.nan_to_num(unit), 0.0, 1.0) * 255.0).astype(np.uint8)
    return colormap(name)[index]


def lightness(colors: np.ndarray) -> np.ndarray:
    """Oklab lightness (0 black, 1 white) of uint8 [..., 3] colours."""
    return _to_oklab(colors.reshape(-1, 3) / 255.0)[:, 0].reshape(colors.shape[:-1])


_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _to_oklab(srgb: np.ndarray) -> np.ndarray:
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _LMS.T) @ _LAB.T


def _from_oklab(lab: np.ndarray) -> np.ndarray:
    linear = (lab @ np.linalg.inv(_LAB).T) ** 3 @ np.linalg.inv(_LMS).T
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
