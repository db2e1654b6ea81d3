"""What each head does, in numbers, streamed from Q, K and log-sum-exp: no n x n matrix is formed.

Entropy after Clark et al. 2019 (1906.04341), sink mass after Xiao et al. 2023 (2309.17453), mean distance
after Vig and Belinkov 2019 (1906.04284), maximum weight after Voita et al. 2019 (1905.09418), previous token
as in TransformerLens.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from attnlab_storage.results import MeasurementRow

from ..hook import LayerCall
from .maps import BLOCK_CELLS, first_element, grouped_scores

UNITS = {
    "entropy": "nats",
    "sink_mass": "probability",
    "previous_token": "probability",
    "max_weight": "probability",
    "mean_distance": "tokens",
}


def head_statistics(call: LayerCall) -> list[MeasurementRow]:
    """Return the mean over queries of each statistic, one row a head, of batch element 0.

    Queries that may attend to nothing are left out. ``sink_mass`` is the weight on the first real key,
    ``previous_token`` the weight on the key just before the query (queries that have one).
    """
    one = first_element(call)
    heads, num_queries = one.query.shape[1:3]
    sums = {name: torch.zeros(heads, dtype=torch.float64, device=one.query.device) for name in UNITS}
    rows = torch.zeros((), dtype=torch.float64, device=one.query.device)
    with_previous = torch.zeros_like(rows)
    first = one.mask.band().key_interval(one.key.shape[2])[0]
    for start, stop, low, high in _blocks(one):
        weights, scores, live = _block(one, start, stop, low, high)
        places = torch.arange(low, high, device=weights.device)
        positions = torch.arange(start, stop, device=weights.device) + one.key.shape[2] - num_queries
        rows += live.sum()
        # H = lse - sum p s, since log p = s - lse
        entropy = one.lse[0][:, start:stop] - (weights * scores).sum(-1)
        sums["entropy"] += entropy[:, live].clamp_min(0).sum(-1)
        sums["max_weight"] += weights.amax(-1)[:, live].sum(-1)
        sums["mean_distance"] += (weights * (positions[:, None] - places).abs()).sum(-1)[:, live].sum(-1)
        if low <= first < high:
            sums["sink_mass"] += weights[:, live, first - low].sum(-1)
        has_previous = live & (positions - 1 >= max(low, first)) & (positions - 1 < high)
        chosen = weights[:, has_previous]
        index = (positions[has_previous] - 1 - low).expand(heads, -1)[..., None]
        sums["previous_token"] += chosen.gather(-1, index).sum((-1, -2))
        with_previous += has_previous.sum()
    counts = dict.fromkeys(UNITS, rows) | {"previous_token": with_previous}
    return [
        MeasurementRow(name, float(value), UNITS[name], layer=call.layer, head=head)
        for name, total in sums.items()
        for head, value in enumerate((total / counts[name].clamp_min(1)).tolist())
    ]


def _blocks(call: LayerCall) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, last row + 1, first key, last key + 1): the keys that the mask allows those rows."""
    heads, num_queries = call.query.shape[1:3]
    num_keys = call.key.shape[2]
    step = max(1, BLOCK_CELLS // (heads * num_keys))
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        low, high = call.mask.key_range(start, stop, num_queries=num_queries, num_keys=num_keys)
        if low < high:
            yield start, stop, low, high


def _block(call: LayerCall, start: int, stop: int, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights and scores [Hq, rows, keys], 0 where forbidden, and which rows may attend at all."""
    wide = torch.promote_types(call.query.dtype, torch.float32)
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    query, key = call.query[0][:, start:stop].to(wide), call.key[0][:, low:high].to(wide)
    scores = grouped_scores(query, key).mul_(call.scale)
    allowed = call.mask.allowed(
        np.arange(start, stop), np.arange(low, high), num_queries=num_queries, num_keys=num_keys
    )
    forbidden = torch.as_tensor(~allowed, device=scores.device)
    lse = call.lse[0][:, start:stop].to(wide)
    weights = torch.exp(scores - lse[..., None]).masked_fill_(forbidden, 0)
    return weights, scores.masked_fill_(forbidden, 0), ~forbidden.all(-1)
