"""Differential attention in one pass by our Triton kernel. ``triton_kernel`` is loaded on first use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.differential.reference import Pair
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.softmax.triton_forward import all_ranges_of, capability_of
from attnlab_kernels.operations.triton_platform import grid_refusal, load_kernels, padded, triton_support

KERNELS = "attnlab_kernels.operations.differential.triton_kernel"
MAX_HEAD_DIM = 256
MAX_FLOAT32_QUERY = 128


@dataclass(frozen=True)
class Config:
    """Tile and launch numbers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """As a launch takes them."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def choose_config(block_d: int, block_dv: int, element_size: int, capability: int) -> Config:
    """Tile for padded dimensions, the bytes of a number and the card; a test compiles some for every target."""
    widest = max(block_d, block_dv)
    if element_size == 4:
        return Config(16, 16, 4 if widest <= 64 else 8, 1)
    if widest <= 128:
        return Config(64, 64, 4, 2) if widest <= 64 else Config(64, 32, 8, 2)
    # Ampere keeps both sums of 64 rows in no registers that are left
    return Config(64, 16, 8, 2) if capability >= 90 else Config(32, 32, 8, 2)


def run(
    query: Pair,
    key: Pair,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Pair]:
    """Output ``[B, h, n, dv]`` and the two log-sum-exps ``[B, h, n]``, float32; with gradients where asked for."""
    assert bias is None
    if torch.is_grad_enabled() and any(part.requires_grad for part in (*query, *key, value, weight)):
        from attnlab_kernels.operations.differential.triton_backward import run_with_gradient

        return run_with_gradient(query, key, value, weight, mask=mask, scale=scale)
    return forward(query, key, value, weight, mask=mask, scale=scale)


def forward(
    query: Pair,
    key: Pair,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask,
    scale: float,
    second_output: Tensor | None = None,
) -> tuple[Tensor, Pair]:
    """The forward alone. ``second_output`` float32 ``[B, h, n, dv]`` receives what the second map gives."""
    kernels = load_kernels(KERNELS)
    tensors = [*query, *key, value]
    q1, q2, k1, k2, v = (part if part.stride(-1) == 1 else part.contiguous() for part in tensors)
    batch, heads, num_queries, dim = q1.shape
    value_dim = v.shape[-1]
    out = torch.empty(batch, heads, num_queries, value_dim, dtype=q1.dtype, device=q1.device)
    lse = Pair(
        *(torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q1.device) for _ in range(2))
    )
    weights = weight.float().expand(batch, heads, num_queries)
    band = mask.band()
    ranges = all_ranges_of(mask, batch, k1.shape[2], q1.device)
    config = choose_config(padded(dim), padded(value_dim), q1.element_size(), capability_of(q1))
    kernels.difference_forward_kernel[(-(-num_queries // config.block_m), batch * heads)](
        q1, q2, k1, k2, v, weights, out, *lse, second_output, ranges,
        *q1.stride()[:3], *q2.stride()[:3], *k1.stride()[:3], *k2.stride()[:3], *v.stride()[:3], *weights.stride(),
        heads, heads // k1.shape[1], num_queries, k1.shape[2], band.left or 0, band.right or 0,
        scale * math.log2(math.e),
        D=dim, DV=value_dim, BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim), HAS_LEFT=band.left is not None,
        HAS_RIGHT=band.right is not None, SHARED_KEY=key.first is key.second,
        KEEP_SECOND=second_output is not None, **config.launch,
    )  # fmt: skip
    return out, lse


def supports(
    query: Pair, key: Pair, value: Tensor, weight: Tensor, *, bias: Tensor | None, need_grad: bool
) -> Support:
    """Every mask of one band, any head dimension to 256 (float32 queries to 128), no bias; with gradients."""
    support = triton_support(value)
    if not support:
        return support
    if any(part.dtype != value.dtype for part in (*query, *key)):
        return Support(False, "the Triton kernel needs queries, keys and values of one dtype")
    if max(query.first.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return Support(
            False, f"the Triton kernel holds head dimensions to {MAX_HEAD_DIM}; got {value.shape[-1]}"
        )
    if value.dtype == torch.float32 and query.first.shape[-1] > MAX_FLOAT32_QUERY:
        return Support(
            False,
            f"the Triton kernel holds float32 queries to {MAX_FLOAT32_QUERY} dimensions in registers; "
            f"got {query.first.shape[-1]}",
        )
    if refusal := grid_refusal(query.first):
        return Support(False, refusal)
    if bias is not None:
        return Support(False, "the Triton kernel takes no bias")
    if 0 in (query.first.shape[0], query.first.shape[2], value.shape[2]):
        return Support(False, "there is nothing to attend to")
    return Support(True, support.reason or "reads each tile of values once for both maps")
