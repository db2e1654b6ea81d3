"""How a number grows with another: the exponent of a power law and its interval, by least squares in logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# two-sided 95 % of Student's t for 1, 2, ... degrees of freedom
_T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


class Fit(NamedTuple):
    """``y = factor * x ** exponent``."""

    exponent: float
    half_width: float  # of the 95 % interval of the exponent
    factor: float

    def words(self) -> str:
        return f"n^{self.exponent:.2f} ± {self.half_width:.2f}"


def fit_power(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The power law through points that are all above 0; None with fewer than three different x.

    Raises ValueError where x and y differ in length or a value is not above 0.
    """
    if len(x) != len(y) or any(not value > 0 for value in (*x, *y)):
        raise ValueError("x and y must be equally long and above 0")
    if len(set(x)) < 3:
        return None
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    spread = float(((u - u.mean()) ** 2).sum())
    exponent = float(((u - u.mean()) * (v - v.mean())).sum() / spread)
    level = float(v.mean() - exponent * u.mean())
    free = len(u) - 2
    noise = float(((v - level - exponent * u) ** 2).sum()) / free
    quantile = _T95[free - 1] if free <= len(_T95) else 1.96 + 2.5 / free
    return Fit(exponent, quantile * float(np.sqrt(noise / spread)), float(np.exp(level)))
