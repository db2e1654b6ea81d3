"""A run's results into the store: fenced, layer by layer, and never in the way of the computation."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from attnlab_storage import queue as runs
from attnlab_storage.database import Store
from attnlab_storage.queue import Claim
from attnlab_storage.results import (
    InputRow,
    MeasurementRow,
    TraceRow,
    record_environment,
    record_input,
    record_measurements,
    record_trace,
    recording,
)
from attnlab_storage.tensors import write_tensor

from .probes.maps import LayerTrace

WAITING_LAYERS = 2
"""layers that may wait for the database; with more the computation waits, so memory stays bounded"""
PROGRESS_SECONDS = 0.2
MEASUREMENTS_AT_ONCE = 2000


class Recorder:
    """Writes what one claimed run learns. Every method raises LostLease once the run is no longer ours."""

    def __init__(self, store: Store, claim: Claim) -> None:
        self._store = store
        self._claim = claim
        self._told_at = 0.0
        self._phase = ""

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is being done. Steps within a phase are written at most five times a second."""
        now = time.monotonic()
        if name == self._phase and now - self._told_at < PROGRESS_SECONDS and done != total:
            return
        self._phase, self._told_at = name, now
        runs.progress(self._store, self._claim, name, done, total)

    def log(self, text: str) -> None:
        runs.append_log(self._store, self._claim, text.rstrip("\n") + "\n")

    def environment(self, document: dict[str, Any]) -> None:
        with recording(self._store, self._claim) as session:
            record_environment(session, self._claim, document)

    def input(self, row: InputRow) -> None:
        with recording(self._store, self._claim) as session:
            record_input(session, self._claim, row)

    def measurements(self, rows: Iterable[MeasurementRow]) -> None:
        pending = list(rows)
        for start in range(0, len(pending), MEASUREMENTS_AT_ONCE):
            with recording(self._store, self._claim) as session:
                record_measurements(session, self._claim, pending[start : start + MEASUREMENTS_AT_ONCE])

    def writer(self, layers: int) -> "TraceWriter":
        """Return a background writer for the traces of a forward."""
        return TraceWriter(self, self._write_trace, layers)

    def _write_trace(self, trace: LayerTrace) -> None:
        with recording(self._store, self._claim) as session:
            record_trace(session, self._claim, trace.row)
            for name, array, dtype in trace.arrays:
                _write(session, self._claim, name, trace.row, array, dtype)


def _write(session: Session, claim: Claim, name: str, row: TraceRow, array: np.ndarray, dtype: str) -> None:
    write_tensor(session, claim, name, row.layer, array, dtype=dtype)


class TraceWriter:
    """A thread that writes traces while the model computes the next layer; leaving the block waits for it."""

    def __init__(self, recorder: Recorder, write: Callable[[LayerTrace], None], layers: int) -> None:
        self._recorder = recorder
        self._write = write
        self._layers = layers
        self._queue: queue.Queue[LayerTrace | None] = queue.Queue(maxsize=WAITING_LAYERS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="attnlab-writer", daemon=True)

    def put(self, trace: LayerTrace) -> None:
        """Hand over a trace; waits while too many are unwritten, and raises what the writing raised."""
        if self._error is not None:
            raise self._error
        self._queue.put(trace)

    def __enter__(self) -> "TraceWriter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        done = 0
        while (trace := self._queue.get()) is not None:
            if self._error is not None:
                continue  # drain, so that put() never waits for a writer that has given up
            try:
                self._write(trace)
                done += 1
                self._recorder.phase("capturing", done, self._layers)
            except BaseException as failure:
                self._error = failure
            del trace
