"""What an eight-bit FlashAttention-3 computes, tile by tile, with real e4m3 numbers on any device.

Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608, section 3.3. Products of e4m3 numbers are summed in
float32, as the tensor cores are asked to. Forward only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.fp8.hadamard import random_signs, rotate
from attnlab_kernels.operations.fp8.quantize import Quantized, cast, quantize
from attnlab_kernels.operations.softmax import lower

# probabilities lie in [0, 1]; times 256 they use the exponents of e4m3 up to 448
P_SHIFT = 256.0
TILE_KEYS = 128


class Fp8Attention(NamedTuple):
    """Output ``[B, Hq, Sq, Dv]`` in q's dtype, float32 lse ``[B, Hq, Sq]``, and the numbers that were multiplied."""

    output: Tensor
    lse: Tensor
    query: Quantized
    key: Quantized
    value: Quantized


def quantize_scores(
    q: Tensor, k: Tensor, *, mask: Mask, block_size: int | None, rotated: bool = True, seed: int = 0
) -> tuple[Quantized, Quantized]:
    """Queries and keys as ``run`` multiplies them; rotated ones have D padded to a power of two.

    Padded key slots count as zeros. A block's scale depends on all its rows, so also on keys that a causal mask hides
    from some queries.
    """
    k = lower.hide_padding(k, mask)
    if rotated:
        signs = random_signs(q.shape[-1], seed=seed)
        q, k = rotate(q, signs), rotate(k, signs)
    return quantize(q, block_size), quantize(k, block_size)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    block_size: int | None = 128,
    rotated: bool = True,
    seed: int = 0,
) -> Fp8Attention:
    """Softmax attention with q, k, v and the probabilities in e4m3.

    ``S = (q8 . k8) s_q s_k scale``; P is rounded to e4m3 with its exponent shifted; the sum of a row is that of P
    before rounding; each tile's ``P8 v8`` is multiplied with the scale of its values.

    Args:
        q: ``[B, Hq, Sq, D]``; k ``[B, Hkv, Sk, D]``; v ``[B, Hkv, Sk, Dv]``; heads as in ``attend``.
        bias: added to the scaled scores, broadcasts to ``[B, Hq, Sq, Sk]``.
        block_size: rows of a head that share a scale; None: one scale for each whole tensor.
        rotated: whether q and k are turned by the random Hadamard matrix of ``seed`` first.

    Returns:
        ``Fp8Attention``; a dead row is zero with lse minus infinity.
    """
    query, key = quantize_scores(q, k, mask=mask, block_size=block_size, rotated=rotated, seed=seed)
    value = quantize(lower.hide_padding(v, mask), block_size)
    groups = q.shape[1] // k.shape[1]
    left, s_q = query.values.float(), query.row_scales()
    top = left.new_full((*q.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(top)
    partial = left.new_zeros(*q.shape[:3], v.shape[-1])
    tile = TILE_KEYS if block_size is None else block_size
    for start in range(0, k.shape[2], tile):
        keys = slice(start, min(start + tile, k.shape[2]))
        k8, s_k = _tile(key, keys, groups)
        v8, s_v = _tile(value, keys, groups)
        scores = (left @ k8.transpose(-1, -2)) * s_q * s_k * scale
        scores = _hide(scores, keys, mask=mask, bias=bias, num_keys=k.shape[2])
        new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        safe = torch.where(torch.isneginf(new_top), 0, new_top)
        weights = torch.exp(scores - safe)
        shrink = torch.exp(top - safe)
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        partial = partial * shrink + (cast(weights * P_SHIFT).float() @ v8) * s_v
        top = new_top
    dead = total == 0
    output = partial / (torch.where(dead, 1, total) * P_SHIFT)
    lse = torch.where(dead, -torch.inf, torch.where(dead, 0, top) + torch.where(dead, 1, total).log())
    return Fp8Attention(output.to(q.dtype), lse.squeeze(-1), query, key, value)


def _tile(numbers: Quantized, keys: slice, groups: int) -> tuple[Tensor, Tensor]:
    """E4m3 numbers ``[B, Hq, keys, D]`` and the one scale of the tile ``[B, Hq, 1, 1]``."""
    values = numbers.values[:, :, keys].float().repeat_interleave(groups, dim=1)
    scale = numbers.scales[:, :, keys.start // numbers.block_size, None, None]
    return values, scale.repeat_interleave(groups, dim=1)


def _hide(scores: Tensor, keys: slice, *, mask: Mask, bias: Tensor | None, num_keys: int) -> Tensor:
    batch, _, num_queries, _ = scores.shape
    rows = slice(0, num_queries)
    if bias is not None:
        scores = scores + lower.bias_tile(bias, slice(0, batch), rows, keys)
    ranges = mask.band().ranges
    count = batch if ranges is not None and len(ranges) > 1 else 1
    size = {"num_queries": num_queries, "num_keys": num_keys, "device": scores.device}
    allowed = torch.stack([lower.dense(mask, rows, keys, batch=index, **size) for index in range(count)])
    return scores.masked_fill(~allowed[:, None], -torch.inf)
