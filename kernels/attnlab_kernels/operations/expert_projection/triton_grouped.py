"""Expert projections by our grouped Triton kernel, forward. ``triton_kernel`` is loaded on first use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.operations.expert_projection.reference import Routing
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.triton_platform import load_kernels, triton_support

KERNELS = "attnlab_kernels.operations.expert_projection.triton_kernel"


@dataclass(frozen=True)
class Config:
    """Tile and launch numbers."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_config(element_size: int) -> Config:
    """Tile for the bytes of a number."""
    return Config(32, 32, 16, 4, 2) if element_size == 4 else Config(64, 64, 32, 4, 3)


class Blocks(NamedTuple):
    """Sorted assignments, and for each block of them its group and its part of the order."""

    order: Tensor
    group: Tensor
    start: Tensor
    stop: Tensor


def project_in(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """As ``reference.dense_in``: ``x [B, n, C]`` by ``[H, E, C, d]`` to ``[B, H, n, d]``."""
    heads, top_k = routing.experts.shape[2:]
    rows = _multiply(x.flatten(0, 1), weight, routing, heads * top_k)
    mixed = rows.unflatten(0, (*x.shape[:2], heads, top_k)).sum(dim=3)
    return mixed.transpose(1, 2).to(x.dtype)


def project_out(heads: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """As ``reference.dense_out``: ``[B, H, n, d]`` by ``[H, E, d, C]`` to ``[B, n, C]``."""
    batch, count, tokens, _ = heads.shape
    top_k = routing.experts.shape[3]
    rows = _multiply(heads.transpose(1, 2).flatten(0, 2), weight, routing, top_k)
    return rows.unflatten(0, (batch, tokens, count * top_k)).sum(dim=2).to(heads.dtype)


def supports(x: Tensor, weight: Tensor, *, need_grad: bool) -> Support:
    """Any number of experts; forward only."""
    support = triton_support(x)
    if not support:
        return support
    if weight.dtype != x.dtype:
        return Support(False, f"the Triton kernel needs one dtype; got {x.dtype} and {weight.dtype}")
    if need_grad:
        return Support(False, "the Triton kernel has no backward: use grouped")
    return support


def sort_into_blocks(experts: Tensor, num_experts: int, block_m: int) -> Blocks:
    """Sort assignments ``[.., H, top_k]`` by (head, expert) and cut each group into blocks.

    Nothing waits for the device: there are as many blocks as there could be, the last ones may be empty.
    """
    heads = experts.shape[-2]
    group = (experts + num_experts * torch.arange(heads, device=experts.device)[:, None]).flatten()
    groups = heads * num_experts
    sizes = torch.zeros(groups, dtype=torch.int64, device=experts.device).scatter_add_(
        0, group, torch.ones_like(group)
    )
    blocks = (sizes + block_m - 1) // block_m
    ends, block_ends = sizes.cumsum(0), blocks.cumsum(0)
    most = -(-group.numel() // block_m) + groups
    number = torch.arange(most, device=experts.device)
    owner = torch.searchsorted(block_ends, number, right=True)
    mine = owner.clamp(max=groups - 1)
    within = number - (block_ends - blocks)[mine]
    start = torch.minimum((ends - sizes)[mine] + within * block_m, ends[mine])
    start = torch.where(owner < groups, start, ends[mine])
    return Blocks(torch.argsort(group, stable=True), mine, start, torch.minimum(start + block_m, ends[mine]))


def _multiply(x: Tensor, weight: Tensor, routing: Routing, divisor: int) -> Tensor:
    """One row an assignment, float32: gate times source times matrix; source is ``assignment // divisor``."""
    kernels, config = load_kernels(KERNELS), choose_config(x.element_size())
    x, matrices, gates = x.contiguous(), weight.flatten(0, 1).contiguous(), routing.gates.contiguous()
    out = torch.empty(gates.numel(), weight.shape[3], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    blocks = sort_into_blocks(routing.experts, weight.shape[1], config.block_m)
    grid = (blocks.group.numel(), -(-weight.shape[3] // config.block_n))
    kernels.expert_projection_kernel[grid](
        x, matrices, gates, *blocks, out, x.stride(0), matrices.stride(0), matrices.stride(1), divisor,
        weight.shape[2], weight.shape[3],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
