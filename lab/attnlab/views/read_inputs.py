"""What a run read, for its views: a picture and its patches, a sound, or a cache that grows step by step."""

from __future__ import annotations

from typing import Any

from attnlab.views.trace_map import map_facts
from attnlab_kernels.masks import mask_from_json
from attnlab_storage import results
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow, TraceRow


def patch_grid(trace: TraceRow) -> dict[str, int] | None:
    """How a layer's keys lie in a picture: rows x columns after ``prefix`` other tokens; None where they do not."""
    told = trace.detail or {}
    if "patches" in told and told.get("keys") == "patches":
        return {name: int(told["patches"][name]) for name in ("rows", "columns", "prefix")}
    space = map_facts(trace).get("space")
    if space is not None and len(space) == 2:
        return {"rows": int(space[0]), "columns": int(space[1]), "prefix": 0}
    return None


def attention_role(run: RunRow, trace: TraceRow) -> str:
    """``self``, ``encoder`` or ``cross``: whether a layer reads its own sequence or another one."""
    alone = "cross" if run.mechanism == "cross" else "self"  # of a bare module, which says no role
    return (trace.detail or {}).get("role", alone)


def grows(trace: TraceRow) -> bool:
    """Whether row after row sees one more key, as steps of decoding do; one row alone follows no other."""
    return 1 < trace.num_queries <= trace.num_keys and mask_from_json(trace.mask).form().right == 0


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
