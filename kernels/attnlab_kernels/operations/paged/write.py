"""Writing new tokens into a pool of blocks: slots counted over the whole pool, minus one for a token to skip."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.triton_platform import load_kernels, padded, triton_support

IMPLEMENTATIONS = ("eager", "triton")
KERNELS = "attnlab_kernels.operations.paged.kernel"


def write_cache(
    keys: Tensor,
    values: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    implementation: str = "auto",
) -> str:
    """Put new tokens into their slots, in place; returns the implementation that ran.

    Args:
        keys: ``[T, Hkv, D]``; values ``[T, Hkv, Dv]``, with Dv = 0 where the keys hold the values, as latents do.
        key_pool: ``[num_blocks, block_size, Hkv, D]``; value_pool the same with Dv.
        slots: int64 ``[T]``, ``block * block_size + slot`` of each token, no two alike; -1 is not written.
        implementation: "eager", "triton", or "auto" (Triton on CUDA).

    Raises:
        ValueError: shapes that do not fit; Unsupported: the implementation cannot run here.
    """
    for name, new, pool in (("keys", keys, key_pool), ("values", values, value_pool)):
        if new.dim() != 3 or pool.dim() != 4 or new.shape[1:] != pool.shape[2:]:
            raise ValueError(
                f"{name} must be [T, Hkv, D] and their pool [num_blocks, block_size, Hkv, D]; "
                f"got {tuple(new.shape)} and {tuple(pool.shape)}"
            )
    if slots.dtype != torch.int64 or slots.shape != keys.shape[:1] or values.shape[0] != keys.shape[0]:
        raise ValueError(
            f"slots must be int64 [{keys.shape[0]}], one a token of both keys and values; "
            f"got {slots.dtype} {tuple(slots.shape)} and {values.shape[0]} values"
        )
    support = triton_support(key_pool)
    name = implementation
    if name == "auto":
        name = "triton" if support and key_pool.device.type == "cuda" else "eager"
    if name not in IMPLEMENTATIONS:
        raise Unsupported(
            f"implementation must be one of auto, {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    if name == "triton" and not support:
        raise Unsupported(f"implementation 'triton' cannot run this call: {support.reason}")
    write = _scatter if name == "eager" else _launch
    write(keys, key_pool, slots)
    write(values, value_pool, slots)
    return name


def _scatter(new: Tensor, pool: Tensor, slots: Tensor) -> None:
    kept = slots >= 0
    size = pool.shape[1]
    pool[slots[kept] // size, slots[kept] % size] = new[kept].to(pool.dtype)


def _launch(new: Tensor, pool: Tensor, slots: Tensor) -> None:
    if new.numel() == 0:
        return
    new = new if new.stride(-1) == 1 else new.contiguous()
    if pool.stride(-1) != 1:
        raise ValueError(f"the pool's last dimension must be contiguous; got strides {pool.stride()}")
    dim = new.shape[-1]
    load_kernels(KERNELS).paged_write_kernel[(new.shape[0], new.shape[1])](
        new,
        pool,
        slots.contiguous(),
        *new.stride()[:2],
        *pool.stride()[:3],
        D=dim,
        BLOCK_D=padded(dim),
        PAGE=pool.shape[1],
        num_warps=1 if dim <= 128 else 4,
    )
