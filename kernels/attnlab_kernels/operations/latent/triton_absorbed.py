"""Absorbed latent attention by our Triton kernels, forward. ``triton_kernel`` is loaded on first use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.softmax.triton_forward import all_ranges_of
from attnlab_kernels.operations.triton_platform import load_kernels, padded, triton_support

KERNELS = "attnlab_kernels.operations.latent.triton_kernel"
MAX_RANK = 512
# keys of a split at least: below that the merge costs more than it spreads
LEAST_SPLIT = 256


@dataclass(frozen=True)
class Config:
    """Tile and launch numbers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_config(block_r: int, element_size: int) -> Config:
    """Tile for a padded rank and the bytes of a number."""
    if element_size == 4:
        return Config(16, 16, 8, 1)
    return Config(16, 32, 4, 2) if block_r > 256 else Config(16, 64, 4, 2)


def run(
    nope: Tensor,
    rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    *,
    mask: Mask,
    scale: float,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to latents as they are.

    Args:
        nope: absorbed queries ``[B, H, n, r]``; rope ``[B, H, n, dr]``.
        latent: ``[B, m, r]``; key_rope ``[B, m, dr]``.
        splits: parts of the keys that are attended apart; default: enough to fill the card.

    Returns:
        ``[B, H, n, r]`` in the queries' dtype, and float32 lse ``[B, H, n]``.
    """
    kernels = load_kernels(KERNELS)
    latent, key_rope = (part if part.stride(-1) == 1 else part.contiguous() for part in (latent, key_rope))
    batch, heads, num_queries, rank = nope.shape
    num_keys, rows = latent.shape[1], heads * num_queries
    config = choose_config(padded(rank), nope.element_size())
    blocks = -(-rows // config.block_m)
    splits = _splits(nope.device, blocks * batch, num_keys) if splits is None else splits
    wide = {"dtype": torch.float32, "device": nope.device}
    parts, part_lse = torch.empty(splits, batch, rows, rank, **wide), torch.empty(splits, batch, rows, **wide)
    out, lse = (
        torch.empty(nope.shape, dtype=nope.dtype, device=nope.device),
        torch.empty(nope.shape[:3], **wide),
    )
    band = mask.band()
    ranges = all_ranges_of(mask, batch, num_keys, nope.device)
    kernels.latent_decode_kernel[(blocks, batch, splits)](
        nope.contiguous(), rope.contiguous(), latent, key_rope, parts, part_lse, ranges,
        *latent.stride()[:2], *key_rope.stride()[:2], parts.stride(0), part_lse.stride(0),
        rows, num_queries, num_keys, -(-num_keys // splits), band.left or 0, band.right or 0,
        scale * math.log2(math.e),
        R=rank, DR=rope.shape[-1], BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=padded(rank),
        BLOCK_DR=padded(rope.shape[-1]), HAS_LEFT=band.left is not None, HAS_RIGHT=band.right is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    kernels.latent_merge_kernel[(batch * rows,)](
        parts,
        part_lse,
        out,
        lse,
        parts.stride(0),
        part_lse.stride(0),
        splits,
        R=rank,
        BLOCK_R=padded(rank),
        num_warps=4,
    )
    return out, lse


def supports(
    nope: Tensor, latent: Tensor, *, bias: Tensor | None, dropout: float, need_grad: bool
) -> Support:
    """Every mask, ranks to 512; forward only, no bias."""
    support = triton_support(nope)
    if not support:
        return support
    if nope.shape[-1] > MAX_RANK:
        return Support(False, f"the Triton kernel holds ranks to {MAX_RANK}; got {nope.shape[-1]}")
    if latent.dtype != nope.dtype:
        return Support(False, f"the Triton kernel needs one dtype; got {nope.dtype} and {latent.dtype}")
    if bias is not None or dropout:
        return Support(False, "the Triton kernel takes no bias and no dropout")
    if need_grad:
        return Support(False, "the Triton kernel has no backward")
    if 0 in (nope.shape[0], nope.shape[2], latent.shape[1]):
        return Support(False, "there is nothing to attend to")
    return Support(True, support.reason or "loads each latent once for keys and values")


def _splits(device: torch.device, programs: int, num_keys: int) -> int:
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(-(-2 * cores // programs), -(-num_keys // LEAST_SPLIT)))
