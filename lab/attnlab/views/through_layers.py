"""Rollout and flow as a page asks for them: JSON values, worked out in the background with progress, and kept.

What takes long is kept in the store beside the run, so that the next look at it is at once, in whatever process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.flow import Flow, attention_flow, flow_span
from attnlab.views.jobs import Answer, Jobs
from attnlab.views.rollout import Rollout, pooled_rollout, rollout, row_groups, self_attention
from attnlab_storage import tensors
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow

Document = dict[str, Any]
Progress = Callable[[float], None]
MOST_COLUMNS = 512
MOST_CELLS = 6 << 30
"""weights that a page may ask to be worked out; all of a model of 30 x 9 heads up to 4,800 tokens"""
KEPT_CELLS = 1 << 24
"""weights behind a result from which on it is kept in the store; fewer are worked out in less than a second"""
TOP = 12
JOBS: Jobs[np.ndarray] = Jobs(keep=16)


@dataclass(frozen=True)
class Way:
    """One rollout or flow of a run: what is asked for, and where it is kept."""

    store: Store
    run: RunRow
    layers: int
    size: int
    name: str
    shape: tuple[int, ...]
    cells: int
    """weights of all layers and heads that it is worked out from"""
    work: Callable[[Progress], np.ndarray]

    @property
    def key(self) -> tuple[object, ...]:
        return (self.store.url, self.run.id, self.run.created_at, self.run.attempt, self.name)

    def ask(self) -> Answer[np.ndarray]:
        """float64 of ``shape`` from the store or from memory, or how far the work is, which this starts."""
        if (kept := self._kept()) is not None:
            return Answer(kept, 1.0)
        return JOBS.ask(self.key, self._worked_out)

    def get(self) -> np.ndarray:
        """The same, waited for."""
        kept = self._kept()
        return self._worked_out(lambda done: None) if kept is None else kept

    def cancel(self) -> bool:
        """Stop the work; False where none is going on."""
        return JOBS.cancel(self.key)

    def _worked_out(self, progress: Progress) -> np.ndarray:
        made = self.work(progress)
        if self.cells >= KEPT_CELLS:
            run = self.run
            flat = made.reshape(1, -1)
            tensors.keep_derived(self.store, run.id, run.attempt, self.name, 0, flat, dtype="float64")
        return made

    def _kept(self) -> np.ndarray | None:
        try:
            flat = tensors.read_tensor(self.store, self.run.id, self.name, 0, 0)
        except tensors.TensorError:
            return None
        return flat.reshape(self.shape) if flat.size == np.prod(self.shape) else None


def rollout_way(store: Store, run_id: int, row: int | None, residual: float = 0.5, height: int = 64) -> Way:
    """The rollout of position ``row``, [layers + 1, tokens] from the position itself down to the input, or of all
    positions pooled to ``height`` (None), [rows, tokens].

    Raises ViewError as `rollout` does, and where there are too many weights for a page to wait for.
    """
    run, layers, size, cells = _sized(store, run_id, row)
    if row is None:
        name = f"rollout_all.{height}.{residual:g}"

        def work(progress: Progress) -> np.ndarray:
            return pooled_rollout(store, run_id, height, residual=residual, progress=progress).values

        return Way(store, run, layers, size, name, (min(height, size), size), cells, work)

    def work_one(progress: Progress) -> np.ndarray:
        return rollout(store, run_id, row, residual=residual, progress=progress).flow[:, 0]

    name = f"rollout_{row}.{residual:g}"
    return Way(store, run, layers, size, name, (layers + 1, size), cells, work_one)


def flow_way(
    store: Store, run_id: int, row: int, span: tuple[int, int] | None = None, residual: float = 0.5
) -> Way:
    """`attention_flow` as one row of numbers, see `flow_of`. Raises ViewError as it does."""
    run, layers, size, cells = _sized(store, run_id, 0)
    start, stop = flow_span(size, row, span)

    def work(progress: Progress) -> np.ndarray:
        found = attention_flow(store, run_id, row, span, residual=residual, progress=progress)
        return np.concatenate([[found.error], found.inside, found.values])

    name = f"flow_{row}.{start}.{stop}.{residual:g}"
    return Way(store, run, layers, size, name, (1 + layers + stop - start,), cells * (stop - start), work)


def rollout_of(way: Way, values: np.ndarray, row: int | None, height: int = 64) -> Rollout:
    """The result of a `rollout_way`; of all positions the steps between are not kept, and ``flow`` is the last."""
    down = list(range(way.layers))[::-1]
    if row is None:
        return Rollout(values, values[None], down, row_groups(way.size, height))
    return Rollout(values[-1:], values[:, None], down, [(row, row + 1)])


def flow_of(way: Way, values: np.ndarray, row: int, span: tuple[int, int] | None = None) -> Flow:
    """The result of a `flow_way`."""
    start, stop = flow_span(way.size, row, span)
    inside, found = np.split(values[1:], [way.layers])
    return Flow(found, row, start, stop, inside, float(values[0]))


def rollout_document(
    store: Store, run_id: int, row: int | None, residual: float = 0.5, height: int = 64
) -> Answer[Document]:
    """The rollout of position ``row``, layer by layer, or of all positions pooled to ``height`` (None).

    ``values`` is [layers + 1][columns] from the position itself down to the input, or [rows][columns]; a column is the
    sum over the positions from ``columns[i]`` to ``columns[i + 1]``. Of one position also ``shares`` of every token and
    the ``top`` tokens as [position, share].
    """
    way = rollout_way(store, run_id, row, residual, height)
    values, done = way.ask()
    if values is None:
        return Answer(None, done)
    if row is not None:
        return Answer(rollout_facts(way, values, row, residual), 1.0)
    rows = row_groups(way.size, height)
    return Answer(_pooled(values, way.size) | {"residual": residual, "rows": rows}, 1.0)


def rollout_facts(way: Way, values: np.ndarray, row: int, residual: float) -> Document:
    """The result of a `rollout_way` of one position as `rollout_document` has it."""
    found = rollout_of(way, values, row)
    shares = found.values[0]
    facts = {"layers": found.layers, "shares": shares.tolist(), "top": _top(shares), "row": row}
    return _pooled(values, way.size) | {"residual": residual} | facts


def flow_document(
    store: Store, run_id: int, row: int, span: tuple[int, int] | None = None, residual: float = 0.5
) -> Answer[Document]:
    """`attention_flow` as JSON values, with ``top`` tokens as [position, flow]."""
    way = flow_way(store, run_id, row, span, residual)
    values, done = way.ask()
    if values is None:
        return Answer(None, done)
    return Answer(flow_facts(way, values, row, span, residual), 1.0)


def flow_facts(
    way: Way, values: np.ndarray, row: int, span: tuple[int, int] | None, residual: float
) -> Document:
    """The result of a `flow_way` as `flow_document` has it."""
    found = flow_of(way, values, row, span)
    return {
        "row": row,
        "residual": residual,
        "start": found.start,
        "shares": found.values.tolist(),
        "top": [[found.start + place, value] for place, value in _top(found.values)],
        "inside": found.inside.tolist(),
        "error": found.error,
    }


def _sized(store: Store, run_id: int, row: int | None) -> tuple[RunRow, int, int, int]:
    """The run, how many layers and tokens it has, and how many weights lie behind a row (None: behind all)."""
    run, traces = self_attention(store, run_id)
    size = traces[0].num_queries
    rows = size if row is None else min(row + 1, size)
    cells = sum(trace.heads for trace in traces) * rows * size
    if cells > MOST_CELLS:
        rule = (
            f"a page waits for at most {MOST_CELLS:,} weights of all layers and heads; this takes {cells:,}"
        )
        raise ViewError(f"{rule}. In Python lab.run_by_id({run_id}).rollout(row) has no such limit")
    return run, len(traces), size, cells


def _pooled(values: np.ndarray, size: int) -> Document:
    columns = np.arange(min(MOST_COLUMNS, size) + 1) * size // min(MOST_COLUMNS, size)
    pooled = np.add.reduceat(values, columns[:-1], axis=1)
    return {"columns": columns.tolist(), "values": pooled.tolist()}


def _top(shares: np.ndarray) -> list[list[Any]]:
    order = np.argsort(-shares, kind="stable")[:TOP].tolist()
    return [[place, float(shares[place])] for place in order if shares[place] > 0]
