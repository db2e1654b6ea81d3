"""Laws of the palettes: to every kind of colour vision ramps rise or fall in lightness, and no two colours are one."""

import re
from pathlib import Path

import numpy as np
import pytest

from attnlab.export.lines import HEAD_COLOURS
from attnlab.export.panel import THEMES
from attnlab.views.chart_style import PALETTE
from attnlab.views.colormaps import DIVERGING, SEQUENTIAL, colormap

SCRIPTS = Path(__file__).parents[1] / "webui/attnlab_webui/static/js"
ROUNDING = 0.1
"""L*: what 8 bits of a channel may take back between two of 256 colours"""
# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB
KINDS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# sRGB to XYZ under D65 (IEC 61966-2-1)
_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]],
)


def seen(colours: np.ndarray, kind: str) -> np.ndarray:
    """CIELAB [n, 3] of sRGB colours 0..255 [n, 3] as somebody with this vision sees them."""
    srgb = np.asarray(colours, float) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(KINDS[kind]).T, 0, 1)
    ratio = (linear @ _XYZ.T) / _XYZ.sum(1)
    curve = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curve.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def from_hex(colours: list[str]) -> np.ndarray:
    """[n, 3] of ``#rrggbb``."""
    return np.array([[int(one.lstrip("#")[at : at + 2], 16) for at in (0, 2, 4)] for one in colours])


def closest(colours: np.ndarray, kind: str) -> tuple[float, int, int]:
    """The smallest delta E (CIE 1976) between two of the colours, and which two they are."""
    lab = seen(colours, kind)
    gaps = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    a, b = np.unravel_index(gaps.argmin(), gaps.shape)
    return float(gaps[a, b]), int(a), int(b)


def script_colours(file: str, name: str) -> list[str]:
    """The ``#rrggbb`` or ``rrggbb`` of an array in a script of the page."""
    found = re.search(rf"const {name} = \[(.*?)\]", (SCRIPTS / file).read_text())
    assert found is not None
    return re.findall("[0-9a-f]{6}", found[1])


def dark_difference() -> np.ndarray:
    """The table that the page makes of its stops for differences on a dark ground."""
    stops = from_hex(script_colours("colour.js", "DARK_DIFFERENCE"))
    at = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(at, range(len(stops)), part) for part in stops.T], axis=1).round()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_ramp_of_weights_goes_one_way_in_lightness(name: str, kind: str) -> None:
    lightness = seen(colormap(name), kind)[:, 0]
    steps = np.diff(lightness) * np.sign(lightness[-1] - lightness[0])
    assert steps.min() > -ROUNDING
    assert abs(lightness[-1] - lightness[0]) > 70


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("table", "towards"), [(colormap(DIVERGING), -1), (dark_difference(), 1)])
def test_a_ramp_of_differences_goes_one_way_from_zero_and_its_arms_are_two_colours(
    table: np.ndarray, towards: int, kind: str
) -> None:
    lab = seen(table, kind)
    for arm in (lab[127::-1, 0], lab[128:, 0]):
        assert (np.diff(arm) * towards).min() > -ROUNDING
    for distance in (1, 64):  # full size, and half
        assert np.linalg.norm(lab[distance - 1] - lab[-distance]) > 25


HEADS = ((8, 25), (12, 20), (32, 10))
"""the colours of so many heads are so far apart"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "colours", "apart"),
    [
        *((f"{n} heads on a {on} page", HEAD_COLOURS[on][:n], apart) for on in THEMES for n, apart in HEADS),
        ("parts of an overlay", script_colours("overlay.js", "COLOURS"), 25),
        ("lines of a chart, which also have symbols", list(PALETTE), 12),
    ],
)
def test_colours_of_different_things_are_far_apart(
    name: str, colours: list[str], apart: float, kind: str
) -> None:
    gap, a, b = closest(from_hex(colours), kind)
    assert gap > apart, f"{name}: {colours[a]} and {colours[b]} are {gap:.1f} apart"


@pytest.mark.parametrize("theme", THEMES)
def test_the_colour_of_a_head_is_seen_on_its_ground(theme: str) -> None:
    for kind in KINDS:
        colours = from_hex([THEMES[theme].background, *HEAD_COLOURS[theme]])
        lightness = seen(colours, kind)[:, 0]
        assert np.abs(lightness[1:] - lightness[0]).min() > {"light": 22, "dark": 38}[theme]
