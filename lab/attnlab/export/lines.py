"""Two columns of tokens with a line for each weight between them: colour says the head, strength the weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.panel import THEMES, Theme, check_look
from attnlab.export.scene import Anchor, Line, Rect, Scene, Text, shorten, text_width
from attnlab.views.errors import ViewError
from attnlab.views.head_tiles import head_tiles
from attnlab.views.labels import ran_as, view_label
from attnlab.views.tokens import token_labels
from attnlab.views.trace_map import column_word
from attnlab.views.viewport import Region, find_trace, region_of
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow, TraceRow

MOST_TOKENS = 64
AT_FIRST = 32
MOST_LINES = 50_000
# the colours that heads have on the page: far apart to the colour-blind too, the first ones furthest
HEAD_COLOURS = {
    "light": [
        "#007686", "#f7a100", "#03cbb2", "#873bb4", "#a1aeff", "#df0208", "#a19b61", "#3b3721",
        "#690ff0", "#4b003c", "#0f0078", "#d23cff", "#1e0000", "#5a695a", "#e15ac3", "#a5c35a",
        "#78693c", "#690fc3", "#1e4b78", "#789678", "#871e00", "#3c005a", "#ff692d", "#693c5a",
        "#b469e1", "#4b2d87", "#78c396", "#000f1e", "#2d96c3", "#872d3c", "#a5783c", "#5a0000",
    ],
    "dark": [
        "#0093ff", "#f3bd00", "#4f7d58", "#9065a6", "#baffec", "#ff8953", "#ffebaf", "#a4a7b6",
        "#694bff", "#78e1ff", "#87c396", "#a56900", "#d2ff69", "#c32dd2", "#ff2d69", "#78e178",
        "#c35a87", "#c387e1", "#b49600", "#69783c", "#ff1ec3", "#ffc3c3", "#0ff02d", "#f04bff",
        "#ffa5e1", "#5ab44b", "#d2f0ff", "#789678", "#b4d296", "#3c962d", "#ffffd2", "#ff69a5",
    ],
}  # fmt: skip
SAMPLES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
_LEVELS = 12  # strengths that are told apart
_WEAKEST = 0.06
_PITCH, _BETWEEN = 16, 260
_MARGIN, _TOP, _LABEL_ROOM, _KEY_ROOM = 16, 84, 150, 84


def draw_lines(
    store: Store,
    run_id: int,
    layer: int,
    rows: Region = None,
    cols: Region = None,
    *,
    heads: Sequence[int] | Literal["mean"] = (),
    above: float = 0.05,
    theme: str = "light",
) -> Scene:
    """The weights of a short range of a layer as lines, those of some heads side by side or of the mean of all.

    Args:
        rows, cols: at most 64 queries and keys; None for the first 32.
        heads: which ones; none for all of them.
        above: the least weight (its size, where weights are signed) that is drawn, 0 to 1.

    Raises ViewError for anything that cannot be shown.
    """
    check_look(theme, "viridis")
    run, trace = find_trace(store, run_id, layer)
    shape = trace.num_queries, trace.num_keys
    first = [(0, min(AT_FIRST, size)) for size in shape]
    rows, cols = region_of(shape, rows or first[0], cols or first[1])
    _check(trace, rows, cols, heads, above)
    tiles = head_tiles(store, run_id, layer, rows, cols)
    drawn = range(trace.heads) if not heads else [0] if heads == "mean" else heads
    shown = _mean(tiles) if heads == "mean" else tiles[np.array(drawn)]
    found = np.argwhere((np.abs(shown) >= above) & (shown != 0))
    if len(found) > MOST_LINES:
        raise ViewError(f"above must leave at most {MOST_LINES:,} lines; {above} leaves {len(found):,}")
    names, word = _names(store, run_id, trace, rows, cols), column_word(trace)
    look, colours = THEMES[theme], head_colours(drawn, theme)
    marks = [] if heads == "mean" else [(f"H{head}", colours[i]) for i, head in enumerate(drawn)]
    place = _Place.of(names, len(marks))
    scene = Scene(place.width, place.height, look.background)
    shown_ranges = [_range("queries", rows, shape[0]), _range(f"{word}s", cols, shape[1])]
    _draw_title(scene, run, f"layer {layer}, {_heads_word(heads, trace.heads)}", above, shown_ranges, look)
    weights = shown[tuple(found.T)]
    for at in np.argsort(np.abs(weights), kind="stable").tolist():  # the strongest lie on top
        head, row, col = found[at].tolist()
        start, stop = (_TOP + (end + 0.5) * _PITCH + _shift(head, len(drawn)) for end in (row, col))
        scene.add(_line(place.left, start, place.right, stop, colours[head], float(weights[at])))
    _draw_names(scene, place, names, word, look)
    _draw_key(scene, place, marks, colours[0], above, look, dashes=bool((weights < 0).any()))
    return scene


def head_colours(heads: Iterable[int], theme: str) -> list[str]:
    """The colour of each head: its own by its number, the next free one where another that is shown has that."""
    colours = HEAD_COLOURS[theme]
    free: set[int] = set()
    found = []
    for head in heads:
        free = free or set(range(len(colours)))
        at = head % len(colours)
        while at not in free:
            at = (at + 1) % len(colours)
        free.discard(at)
        found.append(colours[at])
    return found


@dataclass(frozen=True)
class _Place:
    """Where the lines begin and end, and the size of the picture, in pixels."""

    left: int
    right: int
    key: int
    width: int
    height: int

    @classmethod
    def of(cls, names: tuple[list[str], list[str]], marks: int) -> _Place:
        down, across = (
            max(72, round(min(_LABEL_ROOM, max(text_width(one, 11) for one in side)))) for side in names
        )
        left = _MARGIN + down + 6
        right = left + _BETWEEN
        key = right + across + 24
        tokens = max(len(side) for side in names) * _PITCH
        return cls(
            left, right, key, key + _KEY_ROOM, _TOP + max(tokens, 14 * (len(SAMPLES) + marks) + 40) + 16
        )


def _check(
    trace: TraceRow,
    rows: tuple[int, int],
    cols: tuple[int, int],
    heads: Sequence[int] | Literal["mean"],
    above: float,
) -> None:
    for name, (start, stop) in (("rows", rows), ("cols", cols)):
        if stop - start > MOST_TOKENS:
            raise ViewError(f"{name} must be at most {MOST_TOKENS} tokens; got {start}:{stop}")
    if not 0 <= above <= 1:
        raise ViewError(f"above must be from 0 to 1; got {above}")
    if heads != "mean" and not all(0 <= head < trace.heads for head in heads):
        raise ViewError(f"heads must be in 0..{trace.heads - 1}; got {list(heads)}")


def _mean(tiles: np.ndarray) -> np.ndarray:
    """float32 [1, rows, cols]: the mean over all heads, NaN where none allows the pair."""
    known = ~np.isnan(tiles)
    mean = np.where(known, tiles, 0).mean(axis=0, dtype=np.float64).astype(np.float32)
    return np.where(known.any(axis=0), mean, np.float32(np.nan))[None]


def _names(
    store: Store, run_id: int, trace: TraceRow, rows: tuple[int, int], cols: tuple[int, int]
) -> tuple[list[str], list[str]]:
    labels, word = token_labels(store, run_id, trace.layer), column_word(trace)
    query, key = labels.query, labels.key if word == "key" else []
    return (
        [query[at] if at < len(query) else f"query {at}" for at in range(*rows)],
        [key[at] if at < len(key) else f"{word} {at}" for at in range(*cols)],
    )


def _range(word: str, span: tuple[int, int], size: int) -> str:
    return f"{word} {span[0]}:{span[1]} of {size}"


def _heads_word(heads: Sequence[int] | Literal["mean"], count: int) -> str:
    if heads == "mean":
        return "mean of all heads"
    if len(heads) in (0, count):
        return "all heads" if count > 1 else "head 0"
    return ("head " if len(heads) == 1 else "heads ") + ", ".join(map(str, heads))


def _shift(at: int, count: int) -> float:
    """Heads run side by side."""
    return 0.0 if count < 2 else (at / (count - 1) - 0.5) * min(_PITCH * 0.6, 1.6 * (count - 1))


def _line(x0: float, y0: float, x1: float, y1: float, color: str, weight: float) -> Line:
    strength = (min(_LEVELS - 1, int(abs(weight) * _LEVELS)) + 0.5) / _LEVELS
    return Line(x0, y0, x1, y1, color, 0.8 + 1.6 * strength, min(1.0, _WEAKEST + strength), weight < 0)


def _draw_title(scene: Scene, run: RunRow, shown: str, above: float, ranges: list[str], look: Theme) -> None:
    brief, room = run_brief(run), scene.width - 2 * _MARGIN
    facts = [ran_as(brief), str(brief["dtype"]), f"weights from {above:g}", *ranges]
    scene.add(Text(_MARGIN, 18, shorten(view_label(brief, shown), room, 14), 14, look.text))
    scene.add(Text(_MARGIN, 38, shorten(" · ".join(facts), room, 11), 11, look.quiet))


def _draw_names(
    scene: Scene, place: _Place, names: tuple[list[str], list[str]], word: str, look: Theme
) -> None:
    above = _TOP - 16
    scene.add(Text(place.left - 6, above, "query (from)", 11, look.quiet, "end"))
    scene.add(Text(place.right + 6, above, f"{word} (to)", 11, look.quiet))
    columns: list[tuple[float, Anchor, list[str]]] = [
        (place.left - 6, "end", names[0]),
        (place.right + 6, "start", names[1]),
    ]
    for x, anchor, side in columns:
        for at, name in enumerate(side):
            text = shorten(name, _LABEL_ROOM, 11)
            scene.add(Text(x, _TOP + (at + 0.5) * _PITCH, text, 11, look.text, anchor))


def _draw_key(
    scene: Scene,
    place: _Place,
    marks: list[tuple[str, str]],
    color: str,
    above: float,
    look: Theme,
    *,
    dashes: bool,
) -> None:
    """How strong a line which weight is, and which colour which head."""
    x, y = place.key, _TOP - 16
    scene.add(Text(x, y, "weight", 11, look.quiet))
    for weight in [one for one in SAMPLES if one >= above]:
        y += 14
        scene.add(_line(x, y, x + 24, y, color if len(marks) < 2 else look.text, weight))
        scene.add(Text(x + 30, y, f"{weight:g}", 10, look.quiet))
    if dashes:
        y += 14
        scene.add(Text(x, y, "dashed: below 0", 10, look.quiet))
    y += 10
    for name, colour in marks:
        y += 14
        scene.add(Rect(x, y - 4, 9, 9, colour), Text(x + 15, y, name, 10, look.quiet))
