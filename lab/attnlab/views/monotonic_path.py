"""The path through a map of text over sound that only moves forwards: which token was said when.

Dynamic time warping over the standardised weights, as Whisper's word timestamps are made (Radford et al. 2022,
arXiv 2212.04356; Sakoe and Chiba 1978), but of one head, and free to begin and to end anywhere in the sound.
"""

from __future__ import annotations

import numpy as np

MOST_CELLS = 2**21


def monotonic_path(weights: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) cells from the first row to the last of ``weights`` float [rows, cols], each step forwards."""
    rows, cols = weights.shape
    spread = weights.std(axis=0, keepdims=True)
    cost = (weights.mean(axis=0, keepdims=True) - weights) / np.where(spread > 0, spread, 1.0)
    total = np.full((rows, cols), np.inf)
    came = np.zeros((rows, cols), np.int8)  # 0: from above, 1: from the left, 2: from both
    total[0] = cost[0]
    for row in range(1, rows):
        total[row], came[row] = _next_row(total[row - 1], cost[row])
    return _backwards(came, int(total[-1].argmin()))


def _next_row(above: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least total cost of each cell of a row, and where it came from."""
    before = np.concatenate(([np.inf], above[:-1]))
    entered = np.minimum(above, before) + cost
    # staying in the row from column k to j costs the sum between them: a running minimum of entered minus that sum
    run = np.cumsum(cost)
    best = np.minimum.accumulate(entered - run)
    total = best + run
    stayed = np.concatenate(([False], best[:-1] <= (entered - run)[1:]))
    return total, np.where(stayed, 1, np.where(before < above, 2, 0)).astype(np.int8)


def _backwards(came: np.ndarray, col: int) -> list[tuple[int, int]]:
    row = len(came) - 1
    path = [(row, col)]
    while row:
        step = came[row, col]
        row, col = row - (step != 1), col - (step != 0)
        path.append((int(row), int(col)))
    return path[::-1]
