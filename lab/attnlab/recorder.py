"""A run's results into the store: fenced, layer by layer, and never in the way of the computation."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from sqlalchemy.orm import Session

from attnlab_storage import queue as runs
from attnlab_storage.database import Store
from attnlab_storage.queue import Claim
from attnlab_storage.results import (
    InputRow,
    Measured,
    MeasurementRow,
    TraceRow,
    fastest,
    record_environment,
    record_input,
    record_measurements,
    record_trace,
    recording,
)
from attnlab_storage.tensors import read_tensor, write_tensor

from .probes.maps import LayerCapture, Named
from .probes.memory import HeapBound
from .spec import RunPoint

WAITING_LAYERS = 2
"""layers that may wait for the database; with more the computation waits, so memory stays bounded"""
PROGRESS_SECONDS = 0.5
MEASUREMENTS_AT_ONCE = 2000
HEAP_BYTES = 560 << 20
"""that the process may grow by while maps are kept; trimmed pages are faulted in again by later layers"""


class Recorder:
    """Writes what one claimed run learns. Every method raises LostLease once the run is no longer ours."""

    def __init__(self, store: Store, claim: Claim) -> None:
        self._store = store
        self._claim = claim
        self._told_at = 0.0
        self._phase = ""

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is being done. Steps within a phase are written at most twice a second."""
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

    def best_known(self, task: Mapping[str, Any], point: RunPoint) -> Measured | None:
        """The fastest stored run that timed the same task on the same device; None where there is none."""
        alike = {"dtype": point.dtype, "batch_size": point.batch_size, "phase": point.phase}
        return fastest(
            self._store,
            "attention_latency",
            alike | {"sequence_length": point.sequence_length},
            lambda detail: detail.get("task") == task,
        )

    def curves(self, layer: int, curves: Mapping[str, np.ndarray]) -> None:
        """Keep curves of a layer's heads, float32 [heads, points] by name."""
        with recording(self._store, self._claim) as session:
            for name, array in curves.items():
                self._write(session, layer, (name, array, "float32"))

    def series(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep float64 [1, rows, fields] by name: what happened over time in the whole run."""
        with recording(self._store, self._claim) as session:
            for name, array in arrays.items():
                self._write(session, 0, (name, array, "float64"))

    def writer(self, layers: int, *, beside: bool) -> "DirectWriter | CaptureWriter":
        """Return what takes the captures of a forward: beside the computation, or in its own thread."""
        return (CaptureWriter if beside else DirectWriter)(self, self._write_capture, layers)

    def settle(self) -> None:
        """Let the database put away what was captured, now that nothing is computed."""
        self._store.settle()

    def trace(self, row: TraceRow, *normalisers: Named) -> None:
        """Publish a finished trace: from here on its map can be looked at."""
        with recording(self._store, self._claim) as session:
            for named in normalisers:
                self._write(session, row.layer, named)
            record_trace(session, self._claim, row)

    def stored(self, name: str, layer: int, heads: int) -> np.ndarray:
        """Return a tensor as it was stored, [heads, S, D]."""
        read = [read_tensor(self._store, self._claim.run_id, name, layer, head) for head in range(heads)]
        return np.stack(read)

    def _write_capture(self, capture: LayerCapture) -> None:
        with recording(self._store, self._claim) as session:
            for named in capture.arrays:
                self._write(session, capture.row.layer, named)

    def _write(self, session: Session, layer: int, named: Named) -> None:
        name, array, dtype = named
        write_tensor(session, self._claim, name, layer, array, dtype=dtype)


def core_is_free(device: torch.device) -> bool:
    """Whether a thread could write beside the computation.

    Where every core computes, a second thread takes one away and the others wait for it: writing in between is
    faster (1.11 against 1.22 times the plain forward on two cores).
    """
    return device.type != "cpu" or torch.get_num_threads() < len(os.sched_getaffinity(0))


class DirectWriter:
    """Writes each capture where it is handed over."""

    def __init__(self, recorder: Recorder, write: Callable[[LayerCapture], None], layers: int) -> None:
        self._recorder = recorder
        self._write = write
        self._layers = layers
        self._done = 0
        self._heap = HeapBound(HEAP_BYTES)

    def put(self, capture: LayerCapture) -> None:
        self._write(capture)
        self._heap.hold()
        self._done += 1
        self._recorder.phase("capturing", self._done, self._layers)

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        pass


class CaptureWriter:
    """A thread that writes captures while the model computes the next layer; leaving the block waits for it."""

    def __init__(self, recorder: Recorder, write: Callable[[LayerCapture], None], layers: int) -> None:
        self._recorder = recorder
        self._write = write
        self._layers = layers
        self._queue: queue.Queue[LayerCapture | None] = queue.Queue(maxsize=WAITING_LAYERS)
        self._error: BaseException | None = None
        self._heap = HeapBound(HEAP_BYTES)
        self._thread = threading.Thread(target=self._run, name="attnlab-writer", daemon=True)

    def put(self, capture: LayerCapture) -> None:
        """Hand over a capture; waits while too many are unwritten, and raises what the writing raised."""
        if self._error is not None:
            raise self._error
        self._heap.hold()
        self._queue.put(capture)

    def __enter__(self) -> "CaptureWriter":
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
        while (capture := self._queue.get()) is not None:
            if self._error is not None:
                continue  # drain, so that put() never waits for a writer that has given up
            try:
                self._write(capture)
                done += 1
                self._recorder.phase("capturing", done, self._layers)
            except BaseException as failure:
                self._error = failure
            del capture
