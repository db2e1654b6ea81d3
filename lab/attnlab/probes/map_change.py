"""How far an approximate swap moves the attention maps: total variation from the exact maps, on sampled rows.

Total variation between two rows of probabilities is half the sum of their absolute differences: 0 for equal rows, 1
for rows that share no key. It is the largest difference in probability that the two give to any set of keys.
"""

import numpy as np
from numpy.typing import NDArray

from attnlab_storage.results import MeasurementRow

from ..hook import LayerCall
from .map_checks import call_arrays, map_of
from .maps import first_element, trace_of

ROWS = 16
CELLS = 1 << 24
"""probabilities of the exact model that are kept until the swapped one is there, all layers together"""


class MapSample:
    """Rows of every map of the exact model, of batch element 0; then how far each map of the swapped one is off.

    Args:
        layers: attentions of a forward, which decide how many rows fit.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._changes: dict[int, NDArray[np.float64]] = {}
        self.rows = ROWS

    def keep(self, call: LayerCall) -> None:
        """Hear an attention of the exact model."""
        self._kept[call.layer] = self._sampled(call)

    def compare(self, call: LayerCall) -> None:
        """Hear the same attention of the swapped model."""
        before = self._kept.pop(call.layer)
        apart = np.abs(self._sampled(call).astype(np.float64) - before).sum(axis=-1) / 2
        self._changes[call.layer] = apart.mean(axis=-1)

    def measurements(self, detail: dict[str, object]) -> list[MeasurementRow]:
        """Return map_change of every layer and head, and of the whole run their mean."""
        if not self._changes:
            return []
        every = np.concatenate(list(self._changes.values()))
        told = detail | {"rows": self.rows, "largest": float(every.max())}
        whole = MeasurementRow("map_change", float(every.mean()), "total variation", detail=told)
        return [whole] + [
            MeasurementRow("map_change", float(change), "total variation", layer, head)
            for layer, changes in self._changes.items()
            for head, change in enumerate(changes)
        ]

    def _sampled(self, call: LayerCall) -> NDArray[np.float32]:
        """Probabilities of evenly spread rows, ``[heads, rows, keys]``."""
        one = first_element(call)
        heads, queries = one.output.shape[1:3]
        keys = one.key.shape[2]
        fitting = max(2, CELLS // (self._layers * heads * keys))
        self.rows = min(ROWS, fitting, queries)
        places = np.unique(np.linspace(0, queries - 1, self.rows).astype(np.int64))
        row, arrays = trace_of(one), call_arrays(one)
        maps = (map_of(row, arrays, head) for head in range(heads))
        return np.stack(
            [
                np.concatenate([drawn.tile(slice(row, row + 1), slice(0, keys)) for row in places.tolist()])
                for drawn in maps
            ]
        )
