"""Training through our Triton kernels: the launchers of the backward, as an autograd function.

Deterministic: no atomic additions; see ``triton_backward_kernel``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.masks import Band, Mask
from attnlab_kernels.operations.softmax.support import Modifiers
from attnlab_kernels.operations.softmax.triton_config import Config, choose_key_config, choose_query_config
from attnlab_kernels.operations.softmax.triton_forward import (
    LOG2E,
    as_float,
    capability_of,
    forward,
    limits_of,
    ranges_of,
)
from attnlab_kernels.operations.triton_platform import load_kernels, padded

DELTA_ROWS = 16
KERNELS = "attnlab_kernels.operations.softmax.triton_backward_kernel"


def run_with_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None,
    modifiers: Modifiers,
) -> tuple[Tensor, Tensor]:
    """Attend, with gradients of q, k, v and the sinks; the log-sum-exp is detached."""
    return _Attention.apply(q, k, v, modifiers.sinks, (mask, scale, bias, modifiers))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, terms: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        mask, scale, bias, modifiers = terms
        output, lse = forward(q, k, v, mask=mask, scale=scale, bias=bias, modifiers=modifiers)
        ctx.save_for_backward(q, k, v, sinks, bias, modifiers.alibi, output, lse)
        ctx.terms = (mask, scale, modifiers.softcap)
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, alibi, output, lse = ctx.saved_tensors
        mask, scale, softcap = ctx.terms
        terms = {"mask": mask, "scale": scale, "bias": bias, "softcap": softcap, "alibi": alibi}
        dq, dk, dv, delta = backward(q, k, v, output, lse, gradients[0], **terms)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # the sink's weight met no value, so only the common term is left
            share = torch.exp(sinks.float()[:, None] - lse)
            dsinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
        return dq, dk, dv, dsinks, None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    gradient: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV in the shapes and dtypes of q, k, v, and ``delta`` float32 ``[B, H, Sq]``.

    Args:
        output, lse: of the forward with the same arguments; ``gradient`` is the output's.
    """
    kernels = load_kernels(KERNELS)
    q, k, v, gradient = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, gradient))
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    delta = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    kernels.softmax_delta_kernel[(-(-num_queries // DELTA_ROWS), batch * heads)](
        *(output, gradient, delta),
        *output.stride()[:3],
        *gradient.stride()[:3],
        *(heads, num_queries),
        DV=value_dim,
        BLOCK_M=DELTA_ROWS,
        BLOCK_DV=padded(value_dim),
        num_warps=4,
    )
    limits, reach = limits_of(mask, batch, num_queries, num_keys, q.device)
    band = mask.form() if limits is None else Band()
    ranges = ranges_of(mask, batch, num_keys, q.device) if limits is None else None
    several = limits is not None and len(limits) > 1
    bias_strides = (0, 0, 0, 0) if bias is None else bias.expand(batch, heads, num_queries, num_keys).stride()
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *gradient.stride()[:3], *bias_strides]
    row_step, key_step = (2 * length if several else 0 for length in (num_queries, num_keys))
    numbers = [heads // kv_heads, num_queries, num_keys, band.left or 0, band.right or 0]
    numbers += [scale, scale * LOG2E, (softcap or 0.0) * LOG2E]
    constants = {
        "D": dim,
        "DV": value_dim,
        "BLOCK_D": padded(dim),
        "BLOCK_DV": padded(value_dim),
        "HAS_LEFT": band.left is not None,
        "HAS_RIGHT": band.right is not None,
        "HAS_RANGES": ranges is not None,
        "HAS_LIMITS": limits is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_ALIBI": alibi is not None,
        "HAS_BIAS": bias is not None,
    }
    modified = bias is not None or softcap is not None or alibi is not None
    choice = (max(padded(dim), padded(value_dim)), q.element_size(), capability_of(q), modified)
    query_config, query_launch = _launched(choose_query_config(*choice), kernels.INTERPRETED)
    key_config, key_launch = _launched(choose_key_config(*choice, limits is not None), kernels.INTERPRETED)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    given, extras = (q, k, v, gradient, lse, delta), (as_float(alibi), bias)
    kernels.softmax_query_gradient_kernel[(-(-num_queries // query_config.block_m), batch * heads)](
        *given, dq, ranges, limits, *extras, *strides, row_step, heads, *numbers, **constants, **query_launch
    )
    kernels.softmax_key_gradient_kernel[(-(-num_keys // key_config.block_n), batch * kv_heads)](
        *given,
        dk,
        dv,
        ranges,
        limits,
        reach,
        *extras,
        *strides,
        row_step,
        key_step,
        kv_heads,
        *numbers,
        **constants,
        **key_launch,
    )
    return dq, dk, dv, delta


def _launched(config: Config, interpreted: bool) -> tuple[Config, dict[str, int]]:
    if interpreted:
        config = Config(min(config.block_m, 32), min(config.block_n, 32), 1, 1)
    return config, {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
