"""How sure a median is: percentile bootstrap intervals, from a fixed seed so that they can be made again."""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
DRAWS = 2000
FEWEST = 3
"""with fewer samples an interval would say nothing"""


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the median (Efron 1979, doi 10.1214/aos/1176344552).

    None with fewer than three samples. Infinite or missing values raise ValueError.
    """
    values = np.asarray(samples, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"samples must be finite; got {samples}")
    if len(values) < FEWEST:
        return None
    drawn = np.random.default_rng(0).choice(values, size=(DRAWS, len(values)))
    medians = np.median(drawn, axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
