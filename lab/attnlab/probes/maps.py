"""The trace of an attention (Q, K, log-sum-exp): any region of its map is exact; and its checks.

What the kernel saw is handed over while the model runs. Its own log-sum-exp is off by up to 1e-5 in float32 (scores
of 30 have an ulp of 2e-6), so the one that is kept is made afterwards from the stored Q and K in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import And, Documents, Mask, Padding
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage.results import TraceRow

from ..hook import LayerCall
from ..views.trace_map import BY_KEY_HEAD, SOFTMAX_KINDS, map_facts
from .map_checks import (
    call_arrays,
    exact_normalisers,
    map_of,
    normaliser_names,
    output_distance,
    row_defect,
    with_facts,
)
from .memory import mapped_copy
from .score_rules import ScoreRules, rules_of, rules_of_trace

CHECKED_ROWS = 4
"""of each head, against the kernel's output while the model waits"""
CHECKED_KEYS = 2048
"""keys that are widened to float64 at once"""
SUMMED_ROWS = 8
BLOCK_CELLS = 1 << 21
"""scores held at once, all heads together"""
STORED = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}

Named = tuple[str, np.ndarray, str]
"""name, array and stored dtype of a tensor"""


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """One attention as it is handed over while the model runs; it becomes a trace when it is refined."""

    row: TraceRow
    """without row_sum_defect and lse_defect, which need the log-sum-exp that will be kept"""
    mask: Mask
    arrays: tuple[Named, ...]
    kernel_lse: np.ndarray
    """[Hq, Sq], as the kernel returned it"""

    def released(self) -> "LayerCapture":
        """Return the same without the large arrays."""
        return replace(self, arrays=())


def capture_call(call: LayerCall) -> LayerCapture:
    """Return one attention's Q, K and value norms, batch element 0, with P V checked against the kernel's output.

    Raises:
        Unsupported: no map can be made of this call.
    """
    one = first_element(call)
    row = trace_of(one)
    if call.query.shape[0] > 1:
        row = with_facts(row, batch=f"element 0 of {call.query.shape[0]}")
    row = replace(row, output_defect=_output_defect(one, row))
    extra = {} if one.attention is None else one.attention.extra
    stored = {name: extra[name][0] for name in map_facts(row).get("tensors", ())} | score_rules(one).stored()
    norms = torch.cat([_norms(part) for part in one.value[0].split(CHECKED_KEYS, dim=1)], dim=1)
    arrays = tuple(
        (name, *_array(tensor))
        for name, tensor in (
            ("query", one.query[0]),
            ("key", one.key[0]),
            ("value_norm", norms),
            *stored.items(),
        )
    )
    return LayerCapture(row, one.mask, arrays, mapped_copy(one.lse[0].cpu().numpy()))


def trace_of(call: LayerCall) -> TraceRow:
    """Return what is told of one call of one batch element, its checks not yet made.

    Raises:
        Unsupported: no map can be made of it.
    """
    heads, num_queries, head_dim = call.query.shape[1:]
    kv_heads, num_keys = call.key.shape[1:3]
    detail: dict[str, Any] = {"implementation": call.implementation, "reason": call.reason}
    if call.attention is not None:
        if call.attention.unmapped:
            raise Unsupported(f"record: maps of {call.name} cannot be made: {call.attention.unmapped}")
        # normalisers are made anew from what is stored
        stored = set(call.attention.extra) - set(normaliser_names(call.attention.kind))
        detail["map"] = {**call.attention.detail, "tensors": sorted(stored)}
    if score := score_rules(call).detail():
        detail["score"] = score
    return TraceRow(
        layer=call.layer,
        name=call.name,
        kind=kind_of(call),
        scale=call.scale,
        mask=call.mask.to_json(),
        heads=heads,
        kv_heads=kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=head_dim,
        dtype=STORED[call.query.dtype],
        row_sum_defect=0.0,
        output_defect=0.0,
        detail=detail,
    )


def kind_of(call: LayerCall) -> str:
    """Return what the call's map is, see `views.trace_map`."""
    return "softmax" if call.attention is None else call.attention.kind


def finish(
    capture: LayerCapture, stored: Callable[[str, int], np.ndarray], device: torch.device
) -> tuple[TraceRow, list[Named]]:
    """Return the finished trace and its normalisers, from the tensors as they were stored.

    Args:
        stored: gives a tensor [heads, S, D] by its name and number of heads.
    """
    row = capture.row
    query, key = stored("query", row.heads), stored("key", row.kv_heads)
    if row.kind in SOFTMAX_KINDS:
        row, lse = refine(capture, query, key, device, rules_of_trace(row, stored))
        return row, [lse]
    arrays = {"query": query, "key": key}
    for name in map_facts(row)["tensors"]:
        arrays[name] = stored(name, row.kv_heads if name in BY_KEY_HEAD else row.heads)
    if row.kind == "difference":
        pairs = {"lse": (query, key), "second_lse": (arrays["second_query"], arrays["second_key"])}
        made: dict[str, np.ndarray] = {}
        for name, pair in pairs.items():
            queries, keys = (torch.from_numpy(part).to(device) for part in pair)
            made[name] = exact_lse(queries, keys, capture).cpu().numpy()
    else:
        made = exact_normalisers(row, arrays)
    first = next(iter(made.values()))
    alive = np.isfinite(first)
    gap = np.abs(first[alive] - capture.kernel_lse[alive])
    # a denominator is a sum, not the logarithm of one
    gap = gap / np.maximum(np.abs(first[alive]), 1e-30) if row.kind == "linear" else gap
    sums = row_defect(row, arrays | made, _sampled(row.num_queries, CHECKED_ROWS // 2))
    row = with_facts(replace(row, row_sum_defect=sums), lse_defect=float(gap.max(initial=0.0)))
    return row, [(name, array, "float64") for name, array in made.items()]


def refine(
    capture: LayerCapture,
    query: np.ndarray,
    key: np.ndarray,
    device: torch.device,
    rules: ScoreRules | None = None,
) -> tuple[TraceRow, Named]:
    """Return the finished trace and its log-sum-exp, from Q and K as they were stored.

    Args:
        query: [Hq, Sq, D] as read back.
        key: [Hkv, Sk, D] as read back.
    """
    rules = rules or ScoreRules(query.shape[1], key.shape[1])
    lse = exact_lse(torch.from_numpy(query).to(device), torch.from_numpy(key).to(device), capture, rules)
    exact = lse.cpu().numpy()
    alive = np.isfinite(exact)
    lse_defect = float(np.abs(exact[alive] - capture.kernel_lse[alive]).max(initial=0.0))
    detail = (capture.row.detail or {}) | {"lse_defect": lse_defect}
    defect = row_sum_defect(capture, query, key, exact, rules)
    return replace(capture.row, row_sum_defect=defect, detail=detail), ("lse", exact, "float64")


def exact_lse(query: Tensor, key: Tensor, capture: LayerCapture, rules: ScoreRules | None = None) -> Tensor:
    """Return the log-sum-exp of every row in float64 [Hq, Sq], streamed over the mask (dead row: minus infinity)."""
    heads, num_queries = query.shape[:2]
    num_keys = key.shape[1]
    size = {"num_queries": num_queries, "num_keys": num_keys}
    lse = query.new_full((heads, num_queries), -torch.inf, dtype=torch.float64)
    wide = key.double()
    places = torch.arange(num_queries, device=query.device)
    step = max(1, BLOCK_CELLS // (heads * num_keys))
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        low, high = capture.mask.key_range(start, stop, **size)
        if low == high:
            continue
        scores = grouped_scores(query[:, start:stop].double(), wide[:, low:high]).mul_(capture.row.scale)
        if rules is not None:
            scores = rules.apply(scores, places[start:stop], torch.arange(low, high, device=query.device))
        allowed = capture.mask.allowed(np.arange(start, stop), np.arange(low, high), **size)
        if not allowed.all():
            scores.masked_fill_(torch.from_numpy(~allowed).to(scores.device), -torch.inf)
        lse[:, start:stop] = scores.logsumexp(-1)
    return lse if rules is None else rules.with_sinks(lse)


def row_sum_defect(
    capture: LayerCapture, query: np.ndarray, key: np.ndarray, lse: np.ndarray, rules: ScoreRules
) -> float:
    """Return how far sampled rows of the map, as the viewer draws it, are from what they must sum to.

    That is 1, less the sink's share, and 0 for a dead row.
    """
    worst = 0.0
    arrays = {"query": query, "key": key, "lse": lse}
    arrays |= {name: tensor.cpu().numpy() for name, tensor in rules.stored().items()}
    for head in range(query.shape[0]):
        drawn = map_of(capture.row, arrays, head)
        assert isinstance(drawn, SoftmaxMap)
        wanted = np.isfinite(lse[head]) - drawn.sink_shares()
        for row in _sampled(query.shape[1], SUMMED_ROWS):
            total = drawn.tile(slice(row, row + 1), slice(0, key.shape[1])).sum(dtype=np.float64)
            worst = max(worst, abs(total - wanted[row]))
    return float(worst)


def score_rules(call: LayerCall) -> ScoreRules:
    """Return what a call of one batch element does to its scores."""
    return rules_of(call.extras, call.query.shape[1], call.query.shape[2], call.key.shape[2])


def first_element(call: LayerCall) -> LayerCall:
    """Return the call of batch element 0 alone, its mask included."""
    tensors = {name: getattr(call, name)[:1] for name in ("query", "key", "value", "output", "lse")}
    attention = call.attention
    if attention is not None:
        own = {name: tensor[:1] for name, tensor in attention.extra.items()}
        attention = replace(attention, extra=own)
    extras = dict(call.extras)
    if "bias" in extras and extras["bias"].ndim == 4:
        extras["bias"] = extras["bias"][:1]
    return replace(call, mask=element_mask(call.mask, 0), attention=attention, extras=extras, **tensors)


def element_mask(mask: Mask, element: int) -> Mask:
    """Return the mask of one batch element: padding and documents keep only that element's."""
    if isinstance(mask, Padding) and len(mask.ranges) > 1:
        return Padding((mask.ranges[element],))
    if isinstance(mask, Documents) and len(mask.lengths) > 1:
        return Documents((mask.lengths[element],))
    if isinstance(mask, And):
        return And(tuple(element_mask(part, element) for part in mask.parts))
    return mask


def _output_defect(call: LayerCall, row: TraceRow) -> float:
    if row.kind in SOFTMAX_KINDS:
        return output_defect(call)
    return output_distance(row, call_arrays(call), call, _sampled(row.num_queries, CHECKED_ROWS))


def output_defect(call: LayerCall) -> float:
    """Return the largest distance of P V from the kernel's output, on sampled rows of batch element 0.

    P is rebuilt in float64 from Q, K and the kernel's own log-sum-exp.
    """
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    places = _sampled(num_queries, CHECKED_ROWS)
    rows = torch.as_tensor(places, device=call.query.device)
    query, lse = call.query[0][:, rows].double(), call.lse[0][:, rows].double()[..., None]
    rules = score_rules(call)
    mixed = call.output[0][:, rows].double().neg_()
    for start in range(0, num_keys, CHECKED_KEYS):
        keys = np.arange(start, min(start + CHECKED_KEYS, num_keys))
        allowed = call.mask.allowed(places, keys, num_queries=num_queries, num_keys=num_keys)
        if not allowed.any():
            continue
        span, cols = slice(start, start + len(keys)), torch.from_numpy(keys).to(rows.device)
        scores = grouped_scores(query, call.key[0][:, span].double()).mul_(call.scale)
        weights = rules.apply(scores, rows, cols).sub_(lse).exp_()
        weights.masked_fill_(torch.from_numpy(~allowed).to(rows.device), 0.0)
        mixed += _grouped_mix(weights, call.value[0][:, span].double())
    return float(mixed.abs().max())


def _sampled(rows: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(np.int64))


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """Return q k^T as [Hq, rows, Sk] for query [Hq, rows, D] and key [Hkv, Sk, D]; no key is copied."""
    group = query.shape[0] // key.shape[0]
    folded = query.unflatten(0, (key.shape[0], group)).flatten(1, 2)
    scores = folded @ key.transpose(-1, -2)
    return scores.unflatten(1, (group, query.shape[1])).flatten(0, 1)


def _grouped_mix(weights: Tensor, value: Tensor) -> Tensor:
    """Return P V as [Hq, rows, Dv] for weights [Hq, rows, Sk] and values [Hkv, Sk, Dv]; no value is copied."""
    group = weights.shape[0] // value.shape[0]
    mixed = weights.unflatten(0, (value.shape[0], group)).flatten(1, 2) @ value
    return mixed.unflatten(1, (group, weights.shape[1])).flatten(0, 1)


def _norms(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value.double(), dim=-1).float()


def _array(tensor: Tensor) -> tuple[np.ndarray, str]:
    """Return the tensor as numpy, on a CPU without a copy: the store takes it piece by piece."""
    name = STORED[tensor.dtype]
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16: its bits are kept
        tensor = tensor.view(torch.uint16)
    return tensor.numpy(), name
