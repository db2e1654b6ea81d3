"""What routed experts add to an attention map: which expert of the key met which expert of the query. No torch.

Csordás et al., "SwitchHead", https://arxiv.org/abs/2312.07987.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.effective_map import SoftmaxMap


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """The map of one head and the gates at both its ends.

    Args:
        attention: the softmax map; ``attention @ mixed values`` is the head's output.
        source: gates ``[Sk, E]`` of the value experts by key token, 0 where not chosen.
        destination: gates ``[Sq, E]`` of the output experts by query token.
    """

    attention: SoftmaxMap
    source: NDArray[np.floating[Any]]
    destination: NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        queries, keys = self.attention.shape
        if self.source.shape[:1] != (keys,) or self.destination.shape[:1] != (queries,):
            raise ValueError(
                f"source must be [{keys}, E] and destination [{queries}, E]; got {self.source.shape} and "
                f"{self.destination.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.attention.shape

    def tile(self, rows: slice, cols: slice) -> NDArray[np.float32]:
        """Probabilities of a region: float32 ``[rows, cols]``."""
        return self.attention.tile(rows, cols)

    def contribution(self, rows: slice, cols: slice, *, source: int, destination: int) -> NDArray[np.float32]:
        """``A_ij * gate of value expert "source" at j * gate of output expert "destination" at i``."""
        ends = self.destination[rows, destination][:, None] * self.source[cols, source][None]
        return np.multiply(self.tile(rows, cols), ends, dtype=np.float32, casting="same_kind")
