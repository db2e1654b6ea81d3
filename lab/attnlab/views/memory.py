"""A memory of arrays by bytes: the least recently used go first when the budget is full."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np


class ArrayMemory:
    """Arrays under keys, at most ``budget`` bytes of them; safe to share between threads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._kept: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], np.ndarray]) -> np.ndarray:
        """The array under ``key``, loaded when it is not here; read-only, because it is shared."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        array = load()  # outside the lock: two threads may load the same array, none waits for another's
        array.setflags(write=False)
        with self._lock:
            if key not in self._kept and array.nbytes <= self.budget:
                self._kept[key] = array
                self.used += array.nbytes
            while self.used > self.budget:
                self.used -= self._kept.popitem(last=False)[1].nbytes
        return array

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._kept.clear()
            self.used = 0
