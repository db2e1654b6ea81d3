"""What is measured of each head: formula and source of every statistic, and its curves as they were stored.

In the formulas p_ij is the weight of query i on key j, each row divided by its own sum (of absolute values where a map
has negative weights); rows that may attend to nothing are left out, and "mean" is over the rows that are left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnlab.views.errors import NothingRecorded, ViewError
from attnlab.views.viewport import find_run
from attnlab_storage import tensors
from attnlab_storage.database import Store

LOCAL_BAND = 32
"""distances below this are local"""
TOP_KEYS = 8
COVERED = 0.95
HEAVY_COLUMNS = 16
CURVE_POINTS = 1024
"""points that a curve keeps at most; each is exact for the rows or columns under it"""
CURVES = {
    "row_entropy": "entropy of the rows, in nats: the mean under each point",
    "column_mass": "weight that the columns receive, summed over all rows: the mean under each point",
}


class Statistic(NamedTuple):
    """One number a head: what it is called, in which unit, by which formula, and whose idea it was."""

    title: str
    unit: str
    formula: str
    source: str
    needs: str = ""
    """what the input must have for it to be measured"""


STATISTICS: dict[str, Statistic] = {
    "entropy": Statistic(
        "entropy", "nats", "mean of H_i = -sum_j p_ij ln p_ij", "Clark et al. 2019, arXiv 1906.04341"
    ),
    "normalized_entropy": Statistic(
        "entropy, share of the largest possible",
        "fraction",
        "mean of H_i / ln n_i over rows with n_i > 1 allowed keys",
        "Zhai et al. 2023, arXiv 2303.06296 (entropy collapse)",
    ),
    "effective_tokens": Statistic(
        "effective number of tokens", "tokens", "mean of exp(H_i)", "perplexity of a row (Shannon 1948)"
    ),
    "participation_ratio": Statistic(
        "participation ratio", "tokens", "mean of 1 / sum_j p_ij^2", "inverse Simpson index (Hill 1973)"
    ),
    "max_weight": Statistic(
        "largest weight", "probability", "mean of max_j p_ij", "Voita et al. 2019, arXiv 1905.09418"
    ),
    "sink_mass": Statistic(
        "mass on the first token",
        "probability",
        "mean of p_i0, key 0 being the first real key",
        "Xiao et al. 2023, arXiv 2309.17453; Gu et al. 2024, arXiv 2410.10781",
    ),
    "previous_token": Statistic(
        "mass on the previous token",
        "probability",
        "mean of p_i,i-1 over rows that may attend to the key before their own",
        "TransformerLens head_detector",
    ),
    "self_token": Statistic(
        "mass on the own token",
        "probability",
        "mean of p_ii over rows that may attend to their own key",
        "TransformerLens; Clark et al. 2019, arXiv 1906.04341",
    ),
    "duplicate_token": Statistic(
        "mass on earlier copies of the token",
        "probability",
        "mean of sum_j p_ij [t_j = t_i, j < i] over rows that have such a key",
        "TransformerLens head_detector; Wang et al. 2022, arXiv 2211.00593",
        "tokens of its own: self-attention over text",
    ),
    "induction": Statistic(
        "mass on what followed earlier copies (prefix matching)",
        "probability",
        "mean of sum_j p_ij [t_j-1 = t_i, j <= i] over rows that have such a key",
        "Olsson et al. 2022, arXiv 2209.11895; TransformerLens head_detector",
        "tokens of its own: self-attention over text",
    ),
    "mean_distance": Statistic(
        "mean distance",
        "tokens",
        "mean of sum_j p_ij |i - j|",
        "Vig and Belinkov 2019, arXiv 1906.04284",
    ),
    "local_mass": Statistic(
        "local mass",
        "probability",
        f"mean of sum_j p_ij [|i - j| < {LOCAL_BAND}]",
        "Sukhbaatar et al. 2019, arXiv 1905.07799 (attention span)",
    ),
    "gini": Statistic(
        "Gini coefficient",
        "fraction",
        "mean of 2 sum_k k p_i(k) / n_i - (n_i + 1) / n_i, p_i(k) the k-th smallest of n_i allowed weights",
        "Hurley and Rickard 2009, arXiv 0811.4706",
    ),
    "hoyer": Statistic(
        "Hoyer sparsity",
        "fraction",
        "mean of (sqrt n_i - 1 / sqrt(sum_j p_ij^2)) / (sqrt n_i - 1) over rows with n_i > 1",
        "Hoyer 2004; Hurley and Rickard 2009, arXiv 0811.4706",
    ),
    "top_mass": Statistic(
        f"mass of the {TOP_KEYS} largest weights",
        "probability",
        f"mean of the sum of the {TOP_KEYS} largest p_ij",
        "Zhang et al. 2023 (H2O), arXiv 2306.14048",
    ),
    "coverage_keys": Statistic(
        f"keys that hold {COVERED:.0%}",
        "tokens",
        f"mean of the fewest keys whose p_ij sum to {COVERED} or more",
        "Jiang et al. 2024 (MInference), arXiv 2407.02490",
    ),
    "heavy_hitter_mass": Statistic(
        f"mass on the {HEAVY_COLUMNS} heaviest columns",
        "probability",
        f"mean over rows of sum_j p_ij, j the {HEAVY_COLUMNS} columns with the largest sum_i p_ij",
        "Zhang et al. 2023 (H2O), arXiv 2306.14048",
    ),
    "value_weighted_norm": Statistic(
        "value-weighted norm",
        "norm",
        "mean of sum_j p_ij |v_j|, |v_j| the Euclidean norm of the head's value before its output projection",
        "Kobayashi et al. 2020, arXiv 2004.10102 (there after the output projection)",
        "values, which a softmax attention has",
    ),
    "value_weighted_sink": Statistic(
        "value-weighted share of the first token",
        "fraction",
        "mean of p_i0 |v_0| / sum_j p_ij |v_j|",
        "Kobayashi et al. 2020, arXiv 2004.10102",
        "values, which a softmax attention has",
    ),
    "needle_mass": Statistic(
        "mass on the needle while answering",
        "probability",
        "mean of sum_j p_ij, j in the needle, over the rows that predict a token of the answer",
        "after Wu et al. 2024, arXiv 2404.15574",
        "an input with a needle",
    ),
    "retrieval": Statistic(
        "retrieval score",
        "fraction",
        "needle tokens j that some row i of the answer attends to most, where t_j = t_i+1, over all needle tokens",
        "Wu et al. 2024, arXiv 2404.15574; the answer is given here, not generated",
        "an input with a needle",
    ),
}


def curve(store: Store, run_id: int, name: str, layer: int, head: int) -> np.ndarray:
    """One of `CURVES` of a head: float32, at most 1,024 points from the first row or column to the last.

    Raises ViewError for an unknown curve, NothingRecorded where the run kept no statistics of this layer and head.
    """
    if name not in CURVES:
        raise ViewError(f"curve must be one of {', '.join(CURVES)}; got {name!r}")
    find_run(store, run_id)
    try:
        return tensors.read_tensor(store, run_id, name, layer, head)
    except tensors.TensorError as error:
        why = "its record does not include statistics there"
        raise NothingRecorded(f"run {run_id} holds no {name} of L{layer}H{head}: {why} ({error})") from None


def kept_curves(store: Store, run_id: int) -> list[str]:
    """The `CURVES` that a run keeps of any layer."""
    names = {info.name for info in tensors.tensor_info(store, run_id)}
    return [name for name in CURVES if name in names]


def statistics_table() -> str:
    """The statistics as a Markdown table: what the documents show."""
    lines = ["| name | what it is | unit | formula | source |", "| --- | --- | --- | --- | --- |"]
    for name, one in STATISTICS.items():
        formula = one.formula.replace("|", "\\|")
        needs = f" (needs {one.needs})" if one.needs else ""
        lines.append(f"| `{name}` | {one.title}{needs} | {one.unit} | {formula} | {one.source} |")
    return "\n".join(lines)
