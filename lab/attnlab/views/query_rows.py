"""One query in every head of a layer, and where its keys lie: in a picture, or behind it in a growing cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.trace_map import map_facts
from attnlab.views.viewport import allowed_pixels, find_trace, head_map
from attnlab_kernels.masks import mask_from_json
from attnlab_storage import results
from attnlab_storage.database import Store
from attnlab_storage.results import TraceRow


@dataclass(frozen=True)
class QueryRow:
    """What one query gives to every key, head by head.

    Attributes:
        weights: float32 [heads, keys]; 0 where the pair is forbidden.
        allowed: bool [heads, keys]: whether the pair may have a weight.
    """

    weights: np.ndarray
    allowed: np.ndarray


def query_row(store: Store, run_id: int, layer: int, row: int) -> QueryRow:
    """The exact weights of query ``row`` in all heads of a layer: O(heads x keys).

    Raises ViewError for a layer or row that is not there.
    """
    run, trace = find_trace(store, run_id, layer)
    if not 0 <= row < trace.num_queries:
        raise ViewError(f"row must be in 0..{trace.num_queries - 1} for run {run_id}; got {row}")
    maps = [head_map(store, run, trace, head) for head in range(trace.heads)]
    rows, keys = (row, row + 1), maps[0].shape[1]
    weights = [one.tile(slice(*rows), slice(None))[0] for one in maps]
    allowed = [allowed_pixels(one, rows, (0, keys), 1, keys)[0] for one in maps]
    return QueryRow(np.stack(weights), np.stack(allowed))


def patch_grid(trace: TraceRow) -> dict[str, int] | None:
    """How a layer's keys lie in a picture: rows x columns after ``prefix`` other tokens; None where they do not."""
    told = trace.detail or {}
    if "patches" in told and told.get("keys") == "patches":
        return {name: int(told["patches"][name]) for name in ("rows", "columns", "prefix")}
    space = map_facts(trace).get("space")
    if space is not None and len(space) == 2:
        return {"rows": int(space[0]), "columns": int(space[1]), "prefix": 0}
    return None


def grows(trace: TraceRow) -> bool:
    """Whether row after row sees one more key, as steps of decoding do."""
    return trace.num_queries <= trace.num_keys and mask_from_json(trace.mask).form().right == 0


def run_picture(store: Store, run_id: int) -> dict[str, Any]:
    """The picture that a run read, as the model saw it, and what the model answered; each None where there is none."""
    row = results.run_input(store, run_id)
    told = {} if row is None else row.detail or {}
    return {"picture": told.get("picture"), "answer": told.get("answer")}


def run_sound(store: Store, run_id: int) -> dict[str, Any]:
    """The sound that a run heard: its length in seconds, its envelope (None where it heard none)."""
    row = results.run_input(store, run_id)
    told = {} if row is None else row.detail or {}
    names = ("seconds", "seconds_per_position", "envelope")
    return {name: told.get(name) for name in names}
