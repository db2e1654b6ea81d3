"""Pyramids of stored maps: read where they are kept, built on first look in the background, and kept then."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from attnlab.views.memory import ArrayMemory
from attnlab.views.overview import REDUCTIONS, Layout, PooledRegion, build_pyramid
from attnlab_storage import tensors
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow

Pyramid = dict[str, np.ndarray]
Key = tuple[object, ...]


class Pyramids:
    """The pyramids of one process: a budget of memory, one builder, and one more that rests while the first works."""

    def __init__(self, budget: int) -> None:
        self.memory = ArrayMemory(budget)
        self._lock = threading.Lock()
        self._jobs: dict[Key, Future[Pyramid]] = {}
        self._done: dict[Key, float] = {}
        self._failed: dict[Key, BaseException] = {}
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="attnlab-overview")
        self._patient = ThreadPoolExecutor(1, thread_name_prefix="attnlab-pictures")
        self._looked_at: set[Key] = set()
        self._rested = threading.Condition(self._lock)

    def get(self, store: Store, run: RunRow, layer: int, head: int, full_map: PooledRegion) -> Pyramid:
        """The pyramid, waited for where it has to be built."""
        found = self._found(store, run, layer, head, full_map)
        if found is not None:
            return found
        try:
            return self._job(store, run, layer, head, full_map).result()
        finally:
            self._failed.pop(_key(store, run, layer, head), None)

    def progress(
        self,
        store: Store,
        run: RunRow,
        layer: int,
        head: int,
        full_map: PooledRegion,
        *,
        patient: bool = False,
    ) -> float:
        """1.0 where the pyramid is there; else how far the builder is, which this call starts.

        Args:
            patient: start it only while no other is being built, and rest while one is built that somebody looks at.

        Raises what the building raised, once: asked again, it is tried again.
        """
        if self._found(store, run, layer, head, full_map) is not None:
            return 1.0
        failure = self._failed.pop(_key(store, run, layer, head), None)
        if failure is not None:
            raise failure
        if patient and self._busy_with_others(_key(store, run, layer, head)):
            return 0.0
        job = self._job(store, run, layer, head, full_map, patient=patient)
        if not job.done():
            return min(self._done.get(_key(store, run, layer, head), 0.0), 0.99)
        self._failed.pop(_key(store, run, layer, head), None)
        job.result()
        return 1.0

    def _found(
        self, store: Store, run: RunRow, layer: int, head: int, full_map: PooledRegion
    ) -> Pyramid | None:
        key = _key(store, run, layer, head)
        size = Layout(full_map.shape, full_map.mask).size

        def read(name: str) -> np.ndarray:
            array = tensors.read_tensor(store, run.id, _name(name, head), layer, 0)
            if array.shape != (size,):
                raise tensors.TensorError(f"overview must hold {size} numbers; got {array.shape}")
            return array

        try:
            return {name: self.memory.get((*key, name), lambda name=name: read(name)) for name in REDUCTIONS}
        except tensors.TensorError:
            return None  # not built yet, or by a program that laid it out differently

    def _busy_with_others(self, key: Key) -> bool:
        with self._lock:
            return bool(self._jobs) and key not in self._jobs

    def _job(
        self,
        store: Store,
        run: RunRow,
        layer: int,
        head: int,
        full_map: PooledRegion,
        *,
        patient: bool = False,
    ) -> Future[Pyramid]:
        key = _key(store, run, layer, head)
        with self._rested:
            if not patient:
                self._looked_at.add(key)
                self._rested.notify_all()
            if key not in self._jobs:
                builder = self._patient if patient else self._builder
                self._jobs[key] = builder.submit(self._build, store, run, layer, head, full_map)
            return self._jobs[key]

    def _tell(self, key: Key, done: float) -> None:
        """Keep the share that is done; what nobody looks at rests here while another is looked at."""
        with self._rested:
            self._done[key] = done
            self._rested.wait_for(lambda: key in self._looked_at or not self._looked_at)

    def _build(self, store: Store, run: RunRow, layer: int, head: int, full_map: PooledRegion) -> Pyramid:
        key = _key(store, run, layer, head)
        try:
            made = build_pyramid(full_map, lambda done: self._tell(key, done))
            for name, array in made.items():
                tensors.keep_derived(store, run.id, run.attempt, _name(name, head), layer, array[None])
                self.memory.get((*key, name), lambda array=array: array)
            return made
        except BaseException as error:
            self._failed[key] = error
            raise
        finally:
            with self._rested:
                self._jobs.pop(key, None)
                self._done.pop(key, None)
                self._looked_at.discard(key)
                self._rested.notify_all()


def _name(reduction: str, head: int) -> str:
    return f"overview_{reduction}.{head}"


def _key(store: Store, run: RunRow, layer: int, head: int) -> Key:
    # as for tensors: a retry moves the attempt, and a purged id may come back with another creation time
    return (store.url, run.id, run.created_at, run.attempt, layer, head)
