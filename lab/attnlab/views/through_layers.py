"""Rollout and flow as a page asks for them: JSON values, worked out in the background, with progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.flow import attention_flow
from attnlab.views.jobs import Answer, Jobs
from attnlab.views.rollout import Rollout, pooled_rollout, rollout, self_attention
from attnlab_storage.database import Store

Document = dict[str, Any]
MOST_COLUMNS = 512
MOST_CELLS = 6 << 30
"""weights that a page may ask to be worked out; all of a model of 30 x 9 heads up to 4,800 tokens"""
TOP = 12
JOBS: Jobs[Document] = Jobs(keep=64)


def rollout_document(
    store: Store, run_id: int, row: int | None, residual: float = 0.5, height: int = 64
) -> Answer[Document]:
    """The rollout of position ``row``, layer by layer, or of all positions pooled to ``height`` (None).

    ``values`` is [layers + 1][columns] from the position itself down to the input, or [rows][columns]; a column is the
    sum over the positions from ``columns[i]`` to ``columns[i + 1]``. Of one position also ``shares`` of every token and
    the ``top`` tokens as [position, share].

    Raises ViewError as `rollout` does, and where there are too many weights for a page to wait for.
    """
    key, size = _key(store, run_id, row)

    def work(progress: Callable[[float], None]) -> Document:
        if row is None:
            found = pooled_rollout(store, run_id, height, residual=residual, progress=progress)
            return _pooled(found.values, size) | {"rows": found.rows, "residual": residual}
        found = rollout(store, run_id, row, residual=residual, progress=progress)
        return _of_one(found, size) | {"row": row, "residual": residual}

    return JOBS.ask((*key, "rollout", row, residual, height), work)


def flow_document(
    store: Store, run_id: int, row: int, span: tuple[int, int] | None = None, residual: float = 0.5
) -> Answer[Document]:
    """`attention_flow` as JSON values, with ``top`` tokens as [position, flow]. Raises ViewError as it does."""
    key, _ = _key(store, run_id, 0)

    def work(progress: Callable[[float], None]) -> Document:
        found = attention_flow(store, run_id, row, span, residual=residual, progress=progress)
        return {
            "row": row,
            "residual": residual,
            "start": found.start,
            "shares": found.values.tolist(),
            "top": [[found.start + place, value] for place, value in _top(found.values)],
            "inside": found.inside.tolist(),
            "error": found.error,
        }

    return JOBS.ask((*key, "flow", row, span, residual), work)


def _key(store: Store, run_id: int, row: int | None) -> tuple[tuple[object, ...], int]:
    run, traces = self_attention(store, run_id)
    size = traces[0].num_queries
    rows = size if row is None else min(row + 1, size)
    cells = sum(trace.heads for trace in traces) * rows * size
    if cells > MOST_CELLS:
        rule = (
            f"a page waits for at most {MOST_CELLS:,} weights of all layers and heads; this takes {cells:,}"
        )
        raise ViewError(f"{rule}. In Python lab.run_by_id({run_id}).rollout(row) has no such limit")
    return (store.url, run_id, run.created_at, run.attempt), size


def _of_one(found: Rollout, size: int) -> Document:
    shares = found.values[0]
    document = _pooled(found.flow[:, 0], size)
    return document | {"layers": found.layers, "shares": shares.tolist(), "top": _top(shares)}


def _pooled(values: np.ndarray, size: int) -> Document:
    columns = np.arange(min(MOST_COLUMNS, size) + 1) * size // min(MOST_COLUMNS, size)
    pooled = np.add.reduceat(values, columns[:-1], axis=1)
    return {"columns": columns.tolist(), "values": pooled.tolist()}


def _top(shares: np.ndarray) -> list[list[Any]]:
    order = np.argsort(-shares, kind="stable")[:TOP].tolist()
    return [[place, float(shares[place])] for place in order if shares[place] > 0]
