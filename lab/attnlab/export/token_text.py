"""A text with a number for each token as the colour behind it, wrapped into lines, with its colour bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.colourbar import BAR_ROOM, Scale, draw_bar
from attnlab.export.panel import THEMES, check_look, unit_values
from attnlab.export.scene import Rect, Scene, Text, outline, shorten, text_width
from attnlab.views.colormaps import DIVERGING, colorize
from attnlab.views.errors import ViewError
from attnlab.views.labels import ran_as, view_label
from attnlab.views.token import token_document
from attnlab.views.tokens import NEWLINE, SPACE, token_labels
from attnlab.views.trace_map import is_signed
from attnlab.views.viewport import find_trace
from attnlab_storage.database import Store

SCALES = ("log", "linear")
DIRECTIONS = {"sent": "attends to", "received": "is attended by"}
DECADES = 3  # of a logarithmic scale: one row spans less than a map
WIDTH = 640
_SIZE, _LINE, _INSET, _GAP = 12, 22, 2, 4
_MARGIN, _TOP, _LEAST_BAR = 16, 60, 96


@dataclass(frozen=True)
class Passage:
    """Tokens of a text with a number each.

    ``values`` float [tokens] are NaN where there can be none: grey. ``peak`` is the number at the end of the colours,
    which signed values have around zero, and ``low`` (of a linear scale) the one at their beginning; ``chosen`` is the
    token that gets a frame.
    """

    title: str
    subtitle: str
    labels: Sequence[str]
    values: np.ndarray
    peak: float
    chosen: int | None = None
    scale: Scale = "linear"
    signed: bool = False
    low: float = 0.0
    decades: int = DECADES


def draw_token(
    store: Store,
    run_id: int,
    layer: int,
    row: int | None = None,
    head: int | None = None,
    *,
    direction: str = "sent",
    shown: tuple[int, int] | None = None,
    scale: Scale = "log",
    colormap: str = "viridis",
    theme: str = "light",
) -> Scene:
    """What a query gives to each key, or what its own key receives, over the ``shown`` tokens (None: all).

    Args:
        row: the query; None for the last one.
        head: None for the mean of all heads.
        direction: "sent" or "received".
        scale: "linear", or "log" over three decades; the largest weight of all tokens is at its end.

    Raises ViewError for anything that cannot be shown, also what a query receives that has no key of its own.
    """
    run, trace = find_trace(store, run_id, layer)
    row = trace.num_queries - 1 if row is None else row
    if direction not in DIRECTIONS:
        raise ViewError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction[:40]!r}")
    document = token_document(store, run_id, layer, row, head, shown)
    side = document[direction]
    if side is None:
        raise ViewError(f"direction must be sent where queries have no key of their own; got {direction!r}")
    start, weights = side["start"], np.array(side["weights"], float)
    labels, word = token_labels(store, run_id, layer), document["columns"]
    names = (labels.key if word == "key" else []) if direction == "sent" else labels.query
    stop = start + len(weights)
    place = None if document["col"] is None else document["col"] if direction == "sent" else row
    brief = run_brief(run)
    query = f"{labels.query[row]} ({row})" if labels.query else f"query {row}"
    facts = [f"what {query} {DIRECTIONS[direction]}", ran_as(brief), str(brief["dtype"])]
    size = document["keys" if direction == "sent" else "queries"]
    facts += [f"tokens {start}:{stop} of {size}"] if len(weights) < size else []
    passage = Passage(
        view_label(brief, f"L{layer}, mean of all heads" if head is None else f"L{layer}H{head}"),
        " · ".join(facts),
        [names[at] if at < len(names) else f"{word} {at}" for at in range(start, stop)],
        weights,
        float(max(map(abs, side["strip"]))),
        place - start if place is not None and start <= place < stop else None,
        scale,
        is_signed(trace),
    )
    return draw_passage(passage, colormap, theme)


def draw_passage(passage: Passage, colormap: str = "viridis", theme: str = "light") -> Scene:
    """The tokens as lines of text, each on its colour in black or white; a line ends where the text's own does.

    Raises ViewError for an unknown look or scale.
    """
    check_look(theme, colormap)
    if passage.scale not in SCALES:
        raise ViewError(f"scale must be one of {', '.join(SCALES)}; got {passage.scale!r}")
    look, name = THEMES[theme], DIVERGING if passage.signed else colormap
    known = ~np.isnan(passage.values)
    values = np.where(known, passage.values, 0.0) - passage.low
    peak, decades = passage.peak - passage.low, passage.decades
    unit = unit_values(values, peak, passage.scale, signed=passage.signed, decades=decades)
    colours = colorize(unit, name)
    colours[~known] = look.masked
    boxes = list(_boxes(passage.labels))
    bottom = max((y for _, y, _, _ in boxes), default=0) + _LINE
    height = max(bottom, _LEAST_BAR)
    side = _MARGIN + WIDTH + 16
    scene = Scene(side + BAR_ROOM, _TOP + height + _MARGIN, look.background)
    room = scene.width - 2 * _MARGIN
    subtitle = passage.subtitle if known.all() else f"{passage.subtitle} · grey: masked"
    scene.add(Text(_MARGIN, 18, shorten(passage.title, room, 14), 14, look.text))
    scene.add(Text(_MARGIN, 38, shorten(subtitle, room, 11), 11, look.quiet))
    for at, (x, y, width, text) in enumerate(boxes):
        red, green, blue = colours[at].tolist()
        left, top, high = _MARGIN + x, _TOP + y, _LINE - _INSET
        scene.add(Rect(left, top, width, high, f"#{red:02x}{green:02x}{blue:02x}"))
        ink = ink_on(red, green, blue)
        scene.add(Text(left + width / 2, top + high / 2, text, _SIZE, ink, "middle"))
    if passage.chosen is not None:
        x, y, width, _ = boxes[passage.chosen]
        scene.add(*outline(_MARGIN + x - 1, _TOP + y - 1, width + 1, _LINE - _INSET + 1, look.text))
    bar = {"peak": passage.peak, "scale": passage.scale, "signed": passage.signed, "colormap": name}
    ends = {"low": passage.low, "decades": decades}
    draw_bar(scene, side, _TOP, min(height, 240), **bar, **ends, color=look.quiet)
    return scene


def ink_on(red: int, green: int, blue: int) -> str:
    """Black or white, whichever is easier to read on a colour: at least 4.5:1 on any (WCAG 2.2)."""
    srgb = np.array([red, green, blue]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return "#000000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#ffffff"


def _boxes(labels: Sequence[str]) -> Iterator[tuple[int, int, int, str]]:
    """(x, y, width, text) of each token from the top left of the text, in pixels."""
    gap = 0 if any(label.startswith((SPACE, NEWLINE)) for label in labels) else _GAP
    x = y = 0
    for label in labels:
        text = f" {label[1:]}" if label.startswith(SPACE) and len(label) > 1 else label
        text = shorten(text, WIDTH - 2 * _INSET, _SIZE)
        width = round(text_width(text, _SIZE)) + 2 * _INSET
        if x and x + width > WIDTH:
            x, y = 0, y + _LINE
        yield x, y, width, text
        x += width + gap
        if label.endswith(NEWLINE):
            x, y = 0, y + _LINE
