"""Linear attention without gradients, a stretch of tokens at a time: features, sums and output while in the cache.

Only the output is as long as the sequence. Memory of more than 32 MiB comes from the kernel page by page, each of
which it clears on first touch: whole-length features would pay for that again and again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnlab_kernels.operations.linear.chunked import segment
from attnlab_kernels.operations.linear.reference import LinearSums

FeatureMaps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
# of one tensor of a segment, all heads: what a core's cache holds a few times over
SEGMENT_BYTES = 2**21


def segmented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: FeatureMaps | None,
    past: LinearSums | None,
    *,
    chunk: int,
    eps: float | None,
) -> tuple[Tensor, Tensor | None, LinearSums]:
    """Causal attention over at least one token; arguments as in ``linear_attend``.

    Args:
        eps: None leaves the denominator out.

    Returns:
        output in the values' dtype, denominators with ``eps`` (or None), and the sums over the past and all keys.
    """
    wide = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    output = value.new_empty(*query.shape[:3], value.shape[-1])
    below = query.new_empty(query.shape[:3], dtype=wide)
    start, count, length = 0, query.shape[2], _length(query, value, chunk)
    while start < count:
        stop = min(count, start + length)
        q, k, v = (part[:, :, start:stop] for part in (query, key, value))
        if maps is not None:
            q, k = maps[0](q), maps[1](k)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        past = _begin(k, v) if past is None else LinearSums(past.state.to(wide), past.normaliser.to(wide))
        raw = segment(q, k, v, past, chunk)
        past = raw.sums
        if eps is None:
            output[:, :, start:stop] = raw.numerator
        else:
            denominator = torch.add(raw.denominator, eps, out=below[:, :, start:stop])
            safe = denominator.masked_fill(denominator == 0, 1)[..., None]
            output[:, :, start:stop] = raw.numerator.div_(safe)
        start, length = stop, _length(q, v, chunk)
    assert past is not None
    return output, None if eps is None else below, past


def _begin(key: Tensor, value: Tensor) -> LinearSums:
    batch, heads, _, features = key.shape
    return LinearSums(
        key.new_zeros(batch, heads, features, value.shape[-1]), key.new_zeros(batch, heads, features)
    )


def _length(query: Tensor, value: Tensor, chunk: int) -> int:
    """Tokens of a segment, whole chunks: features, values, weights within a chunk and a state a chunk all fit."""
    features, width = query.shape[3], value.shape[3]
    widest = max(features, width, chunk, features * width // chunk)
    token = query.shape[0] * query.shape[1] * widest * query.element_size()
    return chunk * max(1, SEGMENT_BYTES // (token * chunk))
