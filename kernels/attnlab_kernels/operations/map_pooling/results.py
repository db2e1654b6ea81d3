"""What the map operations give back. All numbers are float32, or float64 for float64 queries."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MapStatistics(NamedTuple):
    """Numbers of every row ``[B, Hq, Sq]`` and every column ``[B, Hq, Sk]`` of the maps; 0 in dead rows."""

    row_sum: Tensor
    """1, or 0 in a dead row, if the log-sum-exp is right"""
    entropy: Tensor
    """``-sum p log p`` in nats (Clark et al., https://arxiv.org/abs/1906.04341)"""
    row_max: Tensor
    """largest weight (Voita et al., https://arxiv.org/abs/1905.09418)"""
    square_sum: Tensor
    """``sum p^2``; its inverse counts the keys that matter"""
    distance: Tensor
    """``sum p |position - key|`` in tokens (Vig and Belinkov, https://arxiv.org/abs/1906.04284)"""
    sink_mass: Tensor
    """weight on the first keys that exist (Xiao et al., https://arxiv.org/abs/2309.17453)"""
    previous: Tensor
    """weight on the key just before the query"""
    column_sum: Tensor
    """weight that each key receives, over all queries (Zhang et al., https://arxiv.org/abs/2306.14048)"""
    column_max: Tensor
    """largest weight that each key receives"""


class PooledMap(NamedTuple):
    """Maximum and mean of each cell of the maps, ``[B, Hq, ceil(Sq / rows), ceil(Sk / columns)]``.

    The mean is over all pairs of a cell, forbidden ones count as 0; cells at the end may be smaller.
    """

    maximum: Tensor
    mean: Tensor


ROWS = MapStatistics._fields[:7]
