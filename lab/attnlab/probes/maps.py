"""The trace of an attention (Q, K, log-sum-exp): any region of its map is exact; and its self-check."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_storage.results import TraceRow

from ..hook import LayerCall

CHECKED_ROWS = 16
STORED = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float32",
}


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One attention, ready to be stored: its description and its arrays (name, array, stored dtype)."""

    row: TraceRow
    arrays: tuple[tuple[str, np.ndarray, str], ...]


def trace_call(call: LayerCall) -> LayerTrace:
    """Return the trace of one attention, batch element 0, checked against the kernel's own output."""
    batch = call.query.shape[0]
    one = first_element(call)
    row_sum, output = self_check(one)
    heads, num_queries, head_dim = one.query.shape[1:]
    kv_heads, num_keys = one.key.shape[1:3]
    detail: dict[str, Any] = {
        "implementation": call.implementation,
        "reason": call.reason,
        "checked_rows": CHECKED_ROWS,
    }
    if batch > 1:
        detail["batch"] = f"element 0 of {batch}"
    if call.query.dtype == torch.float64:
        detail["stored"] = "float64 rounded to float32"
    row = TraceRow(
        layer=call.layer,
        name=call.name,
        kind="softmax",
        scale=call.scale,
        mask=one.mask.to_json(),
        heads=heads,
        kv_heads=kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=head_dim,
        dtype=STORED[call.query.dtype],
        row_sum_defect=row_sum,
        output_defect=output,
        detail=detail,
    )
    norms = torch.linalg.vector_norm(one.value[0], dim=-1, dtype=torch.float32)
    arrays = (
        ("query", *_array(one.query[0])),
        ("key", *_array(one.key[0])),
        ("lse", *_array(one.lse[0])),
        ("value_norm", *_array(norms)),
    )
    return LayerTrace(row, arrays)


def first_element(call: LayerCall) -> LayerCall:
    """Return the call of batch element 0 alone, its mask included."""
    tensors = {name: getattr(call, name)[:1] for name in ("query", "key", "value", "output", "lse")}
    return replace(call, mask=element_mask(call.mask, 0), **tensors)


def element_mask(mask: Mask, element: int) -> Mask:
    """Return the mask of one batch element: padding keeps only that element's range."""
    from attnlab_kernels.masks import And, Padding

    if isinstance(mask, Padding) and len(mask.ranges) > 1:
        return Padding((mask.ranges[element],))
    if isinstance(mask, And):
        return And(tuple(element_mask(part, element) for part in mask.parts))
    return mask


def self_check(call: LayerCall, rows: int = CHECKED_ROWS) -> tuple[float, float]:
    """Rebuild sampled rows of batch element 0 in float64 and compare them with what the kernel returned.

    Returns:
        The largest distance of a row's sum from 1 (from 0 where a row may attend to nothing), and the largest
        distance of P V from the kernel's output.
    """
    chosen, weights = rebuilt_rows(call, rows)
    sums = weights.sum(dim=-1)
    dead = torch.isneginf(call.lse[0][:, chosen])
    row_sum = (sums - torch.where(dead, 0.0, 1.0)).abs().max()
    group = weights.shape[0] // call.value.shape[1]
    value = call.value[0].double()
    mixed = weights.unflatten(0, (value.shape[0], group)).flatten(1, 2) @ value
    mixed = mixed.unflatten(1, (group, len(chosen))).flatten(0, 1)
    output = (mixed - call.output[0][:, chosen].double()).abs().max()
    return float(row_sum), float(output)


def rebuilt_rows(call: LayerCall, rows: int) -> tuple[Tensor, Tensor]:
    """Return sampled query rows of element 0 and their exact probabilities, float64 [Hq, rows, Sk]."""
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    places = np.unique(np.linspace(0, num_queries - 1, min(rows, num_queries)).astype(np.int64))
    chosen = torch.as_tensor(places, device=call.query.device)
    allowed = call.mask.allowed(places, np.arange(num_keys), num_queries=num_queries, num_keys=num_keys)
    scores = grouped_scores(call.query[0][:, chosen].double(), call.key[0].double()) * call.scale
    weights = torch.exp(scores - call.lse[0][:, chosen].double()[..., None])
    return chosen, weights.masked_fill(~torch.as_tensor(allowed, device=weights.device), 0.0)


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """Return q k^T as [Hq, rows, Sk] for query [Hq, rows, D] and key [Hkv, Sk, D]; no key is copied."""
    group = query.shape[0] // key.shape[0]
    folded = query.unflatten(0, (key.shape[0], group)).flatten(1, 2)
    scores = folded @ key.transpose(-1, -2)
    return scores.unflatten(1, (group, query.shape[1])).flatten(0, 1)


def _array(tensor: Tensor) -> tuple[np.ndarray, str]:
    name = STORED[tensor.dtype]
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16: its bits are kept
        tensor = tensor.view(torch.uint16)
    return tensor.numpy(), name
