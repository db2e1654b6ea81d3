"""What a mechanism adds to its map, as data to draw over it: bands, boundaries, owners, blocks, routes. Torch-free.

Two shapes are enough. Lines run through the map in cells (row, column); a strip gives every key (or query) one of a
few names. A part is another map of the same size that may be shown in place of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.monotonic_path import MOST_CELLS, monotonic_path
from attnlab.views.trace_map import AttentionMap, Read, make_map, map_facts
from attnlab_kernels.difference_map import DifferenceMap
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.linear_map import LinearMap
from attnlab_kernels.masks import mask_from_json
from attnlab_kernels.operations.ring.layout import meeting_step, owners
from attnlab_kernels.patterns import BigBird, Fixed, Local, LocalGlobal, Strided, pattern_from_json
from attnlab_storage.results import TraceRow

Line = list[tuple[float, float]]
MOST_LINES = 64
"""of a grid: more hide the map under them"""


@dataclass(frozen=True)
class Lines:
    """Polylines in cells: (row, column) from the top left corner of the map."""

    name: str
    help: str
    lines: list[Line]
    kind: str = "lines"


@dataclass(frozen=True)
class Strip:
    """One of ``names`` for each key (``side`` "cols") or query ("rows"), by its number; -1: none."""

    name: str
    help: str
    side: str
    values: list[int]
    names: list[str]
    kind: str = "strip"


@dataclass(frozen=True)
class Note:
    """A sentence that belongs to the map."""

    name: str
    help: str
    kind: str = "note"


Overlay = Lines | Strip | Note


def overlays(trace: TraceRow, head: int, read: Read) -> list[dict[str, Any]]:
    """Everything to draw over the map of one head, as JSON."""
    facts = map_facts(trace)
    found: list[Overlay] = [*_window(trace), *_alignment(trace, head, read)]
    if columns := facts.get("columns"):
        found.append(Note("columns", f"columns are {columns}"))
    for key, make in _OVERLAYS.items():
        if key in facts:
            found += make(trace, facts, head, read)
    if trace.kind == "difference":
        weight = read("lambda", head)
        low, high = float(weight.min()), float(weight.max())
        said = f"{low:.4g}" if high - low < 1e-6 else f"{low:.4g} to {high:.4g}, for each query its own"
        found.append(Note("lambda", f"first map − λ × second map, λ = {said}; rows sum to 1 − λ"))
    return [asdict(one) for one in found]


def part_names(trace: TraceRow) -> dict[str, str]:
    """The maps that may be shown in place of the weights, by name, and what they are."""
    if trace.kind == "difference":
        return {"first": "the map that is kept", "second": "the map that λ weighs and takes away"}
    if "content_dim" in map_facts(trace):
        return {
            "content": "scaled scores of the latent part, before the softmax",
            "position": "scaled scores of the rotary part, before the softmax",
        }
    return {}


def make_part(trace: TraceRow, head: int, read: Read, part: str) -> AttentionMap:
    """One of ``part_names`` as a map; ViewError for another."""
    names = part_names(trace)
    if part not in names:
        raise ViewError(f"part must be one of {', '.join(names) or 'none: this map has none'}; got {part!r}")
    whole = make_map(trace, head, read)
    if isinstance(whole, DifferenceMap):
        return whole.first if part == "first" else whole.second
    assert isinstance(whole, SoftmaxMap)
    cut = map_facts(trace)["content_dim"]
    side = slice(None, cut) if part == "content" else slice(cut, None)
    ones = np.ones(trace.num_queries)
    return LinearMap(whole.query[:, side] * np.float32(trace.scale), whole.key[:, side], ones, whole.mask)


def _alignment(trace: TraceRow, head: int, read: Read) -> list[Overlay]:
    told = trace.detail or {}
    if told.get("role") != "cross" or told.get("keys") != "audio":
        return []
    if trace.num_queries * trace.num_keys > MOST_CELLS:
        return []
    path = monotonic_path(make_map(trace, head, read).tile(slice(None), slice(None)))
    line = [(row + 0.5, col + 0.5) for row, col in path]
    return [Lines("alignment", "the best path that only moves forwards in both text and sound", [line])]


def _window(trace: TraceRow) -> list[Overlay]:
    band = mask_from_json(trace.mask).form()
    offset = trace.num_keys - trace.num_queries
    lines: list[Line] = []
    if band.left:
        lines.append(_diagonal(trace, offset - band.left))
    if band.right and band.left is not None:
        lines.append(_diagonal(trace, offset + band.right + 1))
    drawn = [line for line in lines if line]
    if not drawn:
        return []
    after = "" if not band.right else f" and {band.right} after"
    return [Lines("window", f"a query sees {band.left} keys before itself{after}", drawn)]


def _diagonal(trace: TraceRow, shift: int) -> Line:
    """Where column = row + shift runs through the map; nothing if it does not."""
    first, last = max(0, -shift), min(trace.num_queries, trace.num_keys - shift)
    return [(first, first + shift), (last, last + shift)] if first < last else []


def _chunks(trace: TraceRow, facts: Mapping[str, Any], head: int, read: Read) -> list[Overlay]:
    inner = [stop for _, stop in facts["chunks"][:-1]]
    lines: list[Line] = [[(at, 0), (at, min(at, trace.num_keys))] for at in inner]
    lines += [[(at, at), (trace.num_queries, at)] for at in inner]
    return [
        Lines("chunks", f"the prompt came in {len(inner) + 1} chunks; each row block was one step", lines)
    ]


def _blocks(trace: TraceRow, facts: Mapping[str, Any], head: int, read: Read) -> list[Overlay]:
    size, table = facts["block_size"], facts["block_table"]
    count = -(-trace.num_keys // size)
    names = [f"block {number}" for number in table[:count]]
    lines: list[Line] = [[(0, at), (trace.num_queries, at)] for at in range(size, trace.num_keys, size)]
    places = (np.arange(trace.num_keys) // size).tolist()
    help = f"pages of {size} tokens in logical order, with their numbers in the pool"
    return [Lines("block edges", help, lines), Strip("blocks", help, "cols", places, names)]


def _pattern(trace: TraceRow, facts: Mapping[str, Any], head: int, read: Read) -> list[Overlay]:
    """The blocks of a pattern that is made of them; the band and the shared tokens of one that has those."""
    match pattern_from_json(facts["pattern"]):
        case BigBird(block_size=size) | Fixed(stride=size):
            return _block_grid(trace, size)
        case LocalGlobal(global_tokens=shared) as pattern:
            return [
                *_band(trace, pattern.reach, causal=pattern.causal),
                *_shared(trace, shared, pattern.causal),
            ]
        case Local(window=window) | Strided(stride=window) as pattern:
            return _band(trace, window - 1, causal=pattern.causal)
        case _:
            return []


def _band(trace: TraceRow, reach: int, *, causal: bool) -> list[Overlay]:
    shifts = [-reach] if causal else [-reach, reach + 1]
    lines = [line for line in (_diagonal(trace, shift) for shift in shifts) if line]
    return [Lines("window", f"a query sees every key up to {reach} away", lines)] if lines else []


def _shared(trace: TraceRow, count: int, causal: bool) -> list[Overlay]:
    lines: list[Line] = [[(0, count), (trace.num_queries, count)]]
    if not causal:
        lines.append([(count, 0), (count, trace.num_keys)])
    return [Lines("global tokens", f"every query sees the first {count}", lines)] if count else []


def _block_grid(trace: TraceRow, size: int) -> list[Overlay]:
    help = f"blocks of {size} tokens"
    rows, cols = (range(size, count, size) for count in (trace.num_queries, trace.num_keys))
    lines: list[Line] = [[(at, 0), (at, trace.num_keys)] for at in rows]
    lines.extend([(0, at), (trace.num_queries, at)] for at in cols)
    return [Lines("block edges", help, lines)] if 0 < len(lines) <= MOST_LINES else []


def _ring(trace: TraceRow, facts: Mapping[str, Any], head: int, read: Read) -> list[Overlay]:
    size, layout = facts["ring_size"], facts["layout"]
    names = [f"rank {rank}" for rank in range(size)]
    queries, keys = (owners(layout, count, size) for count in (trace.num_queries, trace.num_keys))
    rows, cols = (np.flatnonzero(np.diff(whose)) + 1 for whose in (queries, keys))
    lines: list[Line] = [[(float(at), 0.0), (float(at), float(trace.num_keys))] for at in rows]
    lines += [[(0.0, float(at)), (float(trace.num_queries), float(at))] for at in cols]
    help = f"{layout} layout: who owns the queries (left) and the keys (top)"
    found: list[Overlay] = [
        Strip("query owners", help, "rows", queries.tolist(), names),
        Strip("key owners", help, "cols", keys.tolist(), names),
    ]
    if len(lines) <= MOST_LINES:
        found.append(Lines("tiles", "one rank's queries against one rank's keys", lines))
    steps = meeting_step(0, keys, size).tolist()
    met = [f"step {step}" for step in range(size)]
    found.append(
        Strip("step, for rank 0", "in which step the keys reach the queries of rank 0", "cols", steps, met)
    )
    return found


def _experts(trace: TraceRow, facts: Mapping[str, Any], head: int, read: Read) -> list[Overlay]:
    names = [f"expert {number}" for number in range(facts["experts"])]
    found: list[Overlay] = []
    sides = (("source_gates", "cols", "value expert"), ("destination_gates", "rows", "output expert"))
    for tensor, side, word in sides:
        if tensor in facts["tensors"]:
            gates = read(tensor, head)
            chosen = np.where(gates.max(axis=1) > 0, gates.argmax(axis=1), -1)
            what = f"the {word} with the largest gate, of {facts['top_k']} chosen"
            found.append(Strip(f"{word}s", what, side, chosen.tolist(), names))
    return found


_OVERLAYS: dict[str, Callable[[TraceRow, Mapping[str, Any], int, Read], list[Overlay]]] = {
    "chunks": _chunks,
    "block_table": _blocks,
    "pattern": _pattern,
    "ring_size": _ring,
    "experts": _experts,
}
