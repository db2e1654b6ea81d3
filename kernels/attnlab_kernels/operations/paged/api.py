"""Attention of many sequences over the blocks of one pool, through block tables: decoding, prompts, or both at once.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
https://arxiv.org/abs/2309.06180. Slots that hold no token of a sequence are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask
from attnlab_kernels.operations.paged import gathered
from attnlab_kernels.operations.softmax import eager, sdpa, triton_forward
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.support import Modifiers, Support
from attnlab_kernels.output import AttentionOutput

IMPLEMENTATIONS = ("eager", "fused", "triton")


def attend_paged(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    query_starts: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    implementation: str = "auto",
) -> AttentionOutput:
    """Softmax attention of the newest tokens of each sequence to all its tokens in the pool; forward only.

    Args:
        q: ``[T, Hq, D]``, the sequences' new tokens end to end, whose keys and values are in the pool already.
        key_pool: ``[num_blocks, block_size, Hkv, D]``; value_pool the same with Dv.
        tables: int32 ``[S, most]``, physical blocks in logical order; what lies past a sequence's blocks is not read.
        lengths: int32 ``[S]``, tokens of each sequence, the new ones included.
        query_starts: int32 ``[S + 1]``, where each sequence's queries begin; default one query each (decoding).
        mask: of every sequence, aligned to its newest token; default causal.
        implementation: "eager" (gathers the blocks), "fused" (gathers them for SDPA's flash kernel, on a CPU),
            "triton", or "auto" (Triton on CUDA, fused on a CPU, eager for what these cannot run).

    Returns:
        output ``[T, Hq, Dv]``; lse ``[Hq, T]`` natural log; aux as ``attend``'s.

    Raises:
        ValueError: shapes, lengths or starts that do not fit; Unsupported: the implementation cannot run this call.
    """
    mask = Causal() if mask is None else mask
    modifiers = Modifiers(softcap, alibi, sinks)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    sequences = len(lengths)
    if query_starts is None:
        query_starts = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
    counts, held = query_starts.diff().tolist(), lengths.tolist()
    _check(q, key_pool, value_pool, tables, counts, held, int(query_starts[0]), mask)
    name, reason = _choose(implementation, q, key_pool, value_pool, mask, modifiers, factor)
    pools = (key_pool, value_pool)
    with torch.no_grad():
        if name != "triton":
            attend = eager.run if name == "eager" else sdpa.run_flash
            call = {"mask": mask, "scale": factor, "modifiers": modifiers}
            output, lse = gathered.run(attend, q, *pools, tables, counts, held, **call)
        else:
            starts = (query_starts.to(torch.int32).contiguous(), lengths.to(torch.int32).contiguous())
            size = triton_forward.Size(sequences, max(counts), max(held), key_pool.shape[2])
            output, lse = _run_triton(q, *pools, tables, starts, size, mask, factor, modifiers)
    return AttentionOutput(output, lse=lse, aux={"implementation": name, "reason": reason})


def _choose(
    implementation: str,
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    mask: Mask,
    modifiers: Modifiers,
    scale: float,
) -> tuple[str, str]:
    """What runs, and why; only the one in question is asked."""
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise Unsupported(
            f"implementation must be one of auto, {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    own = "triton" if q.device.type == "cuda" else "fused"
    name = own if implementation == "auto" else implementation
    if name == "eager":
        return name, "asked for"
    if name == "triton":
        support = triton_supports(q, key_pool, value_pool, modifiers, scale)
    else:
        support = fused_supports(q, value_pool, mask, modifiers)
    if implementation == "auto":
        why = support.reason or "gathers the blocks for the fused kernel"
        return name if support else "eager", f"auto: {own} on {q.device.type}, else eager ({why})"
    if not support:
        raise Unsupported(f"implementation {name!r} cannot run this call: {support.reason}")
    return name, "asked for"


def fused_supports(q: Tensor, value_pool: Tensor, mask: Mask, modifiers: Modifiers) -> Support:
    """Whether SDPA's flash kernel runs over gathered blocks of these pools."""
    if q.device.type != "cpu":
        return Support(False, f"fused gathers the blocks for the CPU kernel; on {q.device.type} use triton")
    if value_pool.dtype != q.dtype:
        return Support(False, f"queries and pools must share a dtype; got {q.dtype} and {value_pool.dtype}")
    query, value = (part.transpose(0, 1)[None] for part in (q[:1], value_pool[0]))
    return sdpa.supports_flash(
        query, value, value, mask=mask, bias=None, modifiers=modifiers, need_grad=False
    )


def triton_supports(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, modifiers: Modifiers, scale: float
) -> Support:
    """Whether our kernel runs over these pools."""
    if not scale > 0:
        return Support(False, f"triton folds the scale into its exponent and needs it above 0; got {scale}")
    if key_pool.stride(-1) != 1 or value_pool.stride(-1) != 1:
        return Support(False, "the pools' last dimension must be contiguous, a pool is never copied")
    if key_pool.dtype != q.dtype or value_pool.dtype != q.dtype:
        return Support(
            False,
            f"queries and pools must share a dtype; got {q.dtype}, {key_pool.dtype} and {value_pool.dtype}",
        )
    return triton_forward.supports(
        q.transpose(0, 1)[None],
        key_pool,
        value_pool,
        mask=Full(),
        bias=None,
        modifiers=modifiers,
        need_grad=False,
    )


def _run_triton(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    tables: Tensor,
    starts: tuple[Tensor, Tensor],
    size: triton_forward.Size,
    mask: Mask,
    scale: float,
    modifiers: Modifiers,
) -> tuple[Tensor, Tensor]:
    q = q if q.stride(-1) == 1 else q.contiguous()
    output = torch.empty(*q.shape[:2], value_pool.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.shape[0] == 0:
        return output, lse.T
    modified = modifiers.softcap is not None or modifiers.alibi is not None
    cut = triton_forward.plan(q, size, value_pool.shape[-1], modified, paged=True)
    strides = tuple((0, pool.stride(2), pool.stride(1), pool.stride(0)) for pool in (key_pool, value_pool))
    triton_forward.launch(
        *(q, key_pool, value_pool, output, lse, cut, size),
        mask=mask,
        scale=scale,
        modifiers=modifiers,
        key_strides=(strides[0], strides[1]),
        starts=starts,
        table=tables.to(torch.int32).contiguous(),
        page=key_pool.shape[1],
    )
    return output, lse.T


def _check(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    tables: Tensor,
    counts: list[int],
    held: list[int],
    first: int,
    mask: Mask,
) -> None:
    if q.dim() != 3 or key_pool.dim() != 4 or q.shape[2] != key_pool.shape[3]:
        raise ValueError(
            "shapes must be q [T, Hq, D] and key_pool [num_blocks, block_size, Hkv, D]; "
            f"got {tuple(q.shape)} and {tuple(key_pool.shape)}"
        )
    if value_pool.shape[:3] != key_pool.shape[:3]:
        raise ValueError(
            f"the pools must agree but for D; got {tuple(key_pool.shape)} and {tuple(value_pool.shape)}"
        )
    if key_pool.shape[2] == 0 or q.shape[1] % key_pool.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of key heads; got {q.shape[1]} and {key_pool.shape[2]}"
        )
    if not held or tables.dim() != 2 or len(tables) != len(held) or len(counts) != len(held):
        raise ValueError(
            f"tables, lengths and query_starts must describe the same sequences, at least one; got "
            f"{tuple(tables.shape)}, {len(held)} and {len(counts)}"
        )
    if first != 0 or sum(counts) != q.shape[0] or min(counts) < 0:
        raise ValueError(
            f"query_starts must rise from 0 to the {q.shape[0]} queries; the counts are {counts}"
        )
    room = tables.shape[1] * key_pool.shape[1]
    for count, length in zip(counts, held, strict=True):
        if not count <= length <= room:
            raise ValueError(
                f"lengths must be from a sequence's {count} queries to {room}, what a table holds; got {length}"
            )
    if mask.band().ranges is not None:
        raise ValueError(f"paged sequences have no padding to mask; got {mask.describe()}")
