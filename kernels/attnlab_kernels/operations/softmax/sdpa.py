"""PyTorch's scaled-dot-product kernels, each forced: the aten operator itself is called, nothing dispatches.

Every operator here also returns the log-sum-exp (natural log), except math, which returns the probabilities.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers, Support, fused_refusal

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
# pairs of a head that one call with a dense tile does faster than two calls and their merge
SMALL_TILE = 2**17

# (q, k, v, causal, bias, scale) -> (output, lse), causal only for square blocks
Call = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Added:
    """What a dense tile adds to the scores."""

    mask: Mask
    bias: Tensor | None
    alibi: Tensor | None


@dataclass(frozen=True)
class Kernel:
    """One aten operator behind the common call."""

    name: str
    call: Call


def run(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    bias: Tensor | None = None,
    modifiers: Modifiers = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Attend block by block as ``lower.plan`` cuts the mask; one block needs no copy of anything."""
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    need_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    blocks = lower.plan(
        mask,
        num_queries=num_queries,
        num_keys=num_keys,
        batch_size=batch,
        has_bias=bias is not None or modifiers.alibi is not None,
        merge=_merges(q, k, need_grad),
    )
    added = Added(mask, bias, modifiers.alibi)
    groups: dict[tuple[int, int, int, int], list[lower.Block]] = {}
    for block in blocks:
        key = (block.batch.start, block.batch.stop, block.rows.start, block.rows.stop)
        groups.setdefault(key, []).append(block)
    if list(groups) == [(0, batch, 0, num_queries)]:
        done = lower.merge([_attend(kernel, q, k, v, block, scale, added) for block in blocks])
        return lower.add_sinks(*done, modifiers.sinks)
    if batch == 1 and num_queries == num_keys and _are_equal_runs(blocks, num_queries):
        return lower.add_sinks(*_attend_runs(kernel, q, k, v, blocks, scale), modifiers.sinks)
    # token after token, as the fused kernels write
    out = q.new_zeros(batch, num_queries, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_full((batch, heads, num_queries), -torch.inf, dtype=_lse_dtype(q))
    for parts in groups.values():
        place = (parts[0].batch, slice(None), parts[0].rows)
        out[place], lse[place] = lower.merge(
            [_attend(kernel, q, k, v, block, scale, added) for block in parts]
        )
    return lower.add_sinks(out, lse, modifiers.sinks)


def _attend(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: lower.Block,
    scale: float,
    added: Added,
) -> tuple[Tensor, Tensor]:
    queries = q[block.batch, :, block.rows]
    keys, values = k[block.batch, :, block.keys], v[block.batch, :, block.keys]
    if block.kind != "masked":
        return kernel.call(queries, keys, values, block.kind == "causal", None, scale)
    exact = kernel.name == "sdpa_math" or (kernel.name == "sdpa_flash" and q.device.type == "cpu")
    dtype = lower.tile_dtype(q) if exact else q.dtype
    distance = k.shape[2] - q.shape[2]
    tile = lower.band_tile(added.mask, block.rows, block.keys, distance, dtype, q.device)
    if added.alibi is not None:
        tile = tile + lower.alibi_tile(added.alibi, block.rows, block.keys, q.shape[2], k.shape[2]).to(dtype)
    if added.bias is None:
        return kernel.call(queries, keys, values, False, tile, scale)
    tile = lower.bias_tile(added.bias, block.batch, block.rows, block.keys).to(dtype) + tile
    out, lse = kernel.call(queries, keys, values, False, tile, scale)
    # kernels disagree on the log-sum-exp of a row that the bias forbids altogether
    dead = torch.isneginf(tile).all(dim=-1)
    return out.masked_fill(dead[..., None], 0), lse.masked_fill(dead, -torch.inf)


def _are_equal_runs(blocks: tuple[lower.Block, ...], tokens: int) -> bool:
    """Whether they are squares of one kind and length, side by side on the diagonal: packed documents of one length."""
    if not blocks or tokens % len(blocks):
        return False
    length = tokens // len(blocks)
    starts = range(0, tokens, length)
    return all(
        block.kind == blocks[0].kind != "masked" and block.rows == block.keys == slice(start, start + length)
        for block, start in zip(blocks, starts, strict=True)
    )


def _attend_runs(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[lower.Block, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Equal runs of one sequence as a batch of one call."""
    query, key, value = (part[0].unflatten(1, (len(blocks), -1)).transpose(0, 1) for part in (q, k, v))
    out, lse = kernel.call(query, key, value, blocks[0].kind == "causal", None, scale)
    return out.transpose(0, 1).flatten(1, 2)[None], lse.transpose(0, 1).flatten(1, 2)[None]


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _call_math(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    # half types go up to float32, as inside the operator; here that lets the probabilities out unrounded
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    stacked = q.to(wide).reshape(batch, kv_heads, group * rows, dim)
    keys, values = k.to(wide), v.to(wide)
    if causal:
        allowed = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
        bias = torch.zeros(rows, rows, dtype=wide, device=q.device).masked_fill_(~allowed, -torch.inf)
    if bias is not None:
        bias = bias.to(wide).expand(batch, heads, rows, k.shape[2]).reshape(batch, kv_heads, group * rows, -1)
    out, probabilities = aten._scaled_dot_product_attention_math(stacked, keys, values, bias, scale=scale)
    with torch.no_grad():
        # log p = score - lse holds for every key; the most likely one is the best conditioned
        top, index = probabilities.max(dim=-1, keepdim=True)
        best = keys.gather(2, index.expand(*index.shape[:3], dim))
        score = (stacked * best).sum(dim=-1, keepdim=True) * scale
        if bias is not None:
            score = score + bias.gather(-1, index)
        lse = torch.where(top > 0, score - top.log(), -torch.inf)
    return out.reshape(batch, heads, rows, -1).to(q.dtype), lse.reshape(batch, heads, rows)


def _call_flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]


def _call_efficient(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    shape = (batch * kv_heads, heads // kv_heads)
    # the kernel knows no grouped heads: each key head becomes a batch element, repeated with stride 0
    keys = k.reshape(shape[0], 1, num_keys, dim).expand(*shape, -1, -1)
    values = v.reshape(shape[0], 1, num_keys, -1).expand(*shape, -1, -1)
    if bias is not None:
        # rows of the bias must start at multiples of 16 elements
        padded = functional.pad(bias, (0, -num_keys % 16))
        bias = padded.expand(batch, heads, rows, -1).reshape(*shape, rows, -1)[..., :num_keys]
    out, lse = aten._scaled_dot_product_efficient_attention(
        q.reshape(*shape, rows, dim), keys, values, bias, True, 0.0, causal, scale=scale
    )[:2]
    return out.reshape(batch, heads, rows, -1), lse[..., :rows].reshape(batch, heads, rows)


def _call_cudnn(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    return out, lse.reshape(q.shape[:3])


MATH = Kernel("sdpa_math", _call_math)
FLASH = Kernel("sdpa_flash", _call_flash)
EFFICIENT = Kernel("sdpa_efficient", _call_efficient)
CUDNN = Kernel("sdpa_cudnn", _call_cudnn)

run_math = partial(run, MATH)
run_flash = partial(run, FLASH)
run_efficient = partial(run, EFFICIENT)
run_cudnn = partial(run, CUDNN)


def supports_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """Anything the reference runs but a soft cap, on any device."""
    refusal = fused_refusal(modifiers, need_grad)
    if refusal:
        return Support(False, refusal)
    return Support(True, "forms all Sq x Sk probabilities in memory")


def supports_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """CPU: any float type, masks through a dense tile. CUDA: half types, full or causal."""
    if v.shape[-1] != q.shape[-1]:
        return Support(False, f"flash needs Dv equal to D; got D = {q.shape[-1]} and Dv = {v.shape[-1]}")
    refusal = _refusal(bias, modifiers, need_grad)
    dense = _dense(_blocks(q, k, mask, bias, modifiers, need_grad))
    if q.device.type == "cpu":
        return Support(not refusal, refusal or _dense_note(dense))
    if dense:
        return Support(
            False,
            "flash on CUDA takes no dense mask: no window, no bias, no ALiBi, no gradient with Sq != Sk",
        )
    if q.dtype not in HALF:
        return Support(False, f"flash on CUDA needs float16 or bfloat16; got {_name(q)}")
    if refusal:
        return Support(False, refusal)
    if q.shape[-1] % 8:
        return Support(False, f"flash on CUDA needs D to be a multiple of 8; got {q.shape[-1]}")
    return _ask_torch("flash", q, k, v)


def supports_efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """CUDA only, float32 and half types, masks through a dense tile."""
    if q.device.type != "cuda":
        return Support(
            False, f"memory-efficient attention has no {q.device.type} kernel, it needs a CUDA device"
        )
    alignment = 8 if q.dtype in HALF else 4
    if q.shape[-1] % alignment or v.shape[-1] % alignment:
        return Support(
            False,
            f"memory-efficient attention needs D and Dv to be multiples of {alignment} in {_name(q)}; "
            f"got {q.shape[-1]} and {v.shape[-1]}",
        )
    if q.dtype == torch.float64:
        return Support(False, "memory-efficient attention needs float32, float16 or bfloat16; got float64")
    dense = _dense(_blocks(q, k, mask, bias, modifiers, need_grad))
    refusal = _refusal(bias, modifiers, need_grad) or _half_alibi(q, modifiers)
    if refusal:
        return Support(False, refusal)
    return _ask_torch("efficient", q, k, v, _dense_note(dense))


def supports_cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """CUDA only, half types, masks through a dense tile."""
    if q.device.type != "cuda":
        return Support(False, f"cuDNN attention has no {q.device.type} kernel, it needs a CUDA device")
    if q.dtype not in HALF:
        return Support(False, f"cuDNN attention needs float16 or bfloat16; got {_name(q)}")
    blocks = _blocks(q, k, mask, bias, modifiers, need_grad)
    refusal = _refusal(bias, modifiers, need_grad) or _half_alibi(q, modifiers)
    if refusal:
        return Support(False, refusal)
    if any(block.keys.stop - block.keys.start == 1 for block in blocks):
        return Support(
            False, f"cuDNN attention takes no single key, which a part of {mask.describe()} has here"
        )
    return _ask_torch("cudnn", q, k, v, _dense_note(_dense(blocks)))


def _blocks(
    q: Tensor, k: Tensor, mask: Mask, bias: Tensor | None, modifiers: Modifiers, need_grad: bool
) -> Sequence[lower.Block]:
    return lower.plan(
        mask,
        num_queries=q.shape[2],
        num_keys=k.shape[2],
        batch_size=q.shape[0],
        has_bias=bias is not None or modifiers.alibi is not None,
        merge=_merges(q, k, need_grad),
    )


def _dense(blocks: Sequence[lower.Block]) -> bool:
    return any(block.kind == "masked" for block in blocks)


def _merges(q: Tensor, k: Tensor, need_grad: bool) -> bool:
    """Whether rows may be computed in parts: a merge has no gradient, and on a CPU it costs more than a small tile."""
    small = q.device.type == "cpu" and q.shape[2] * k.shape[2] <= SMALL_TILE
    return not (need_grad or small)


def _dense_note(dense: bool) -> str:
    return "the mask is lowered to a dense Sq x Sk tile, so cost does not follow it" if dense else ""


def _refusal(bias: Tensor | None, modifiers: Modifiers, need_grad: bool) -> str:
    if need_grad and bias is not None and bias.requires_grad:
        return "the fused kernel gives no gradient for a bias; use eager or sdpa_math"
    return fused_refusal(modifiers, need_grad)


def _half_alibi(q: Tensor, modifiers: Modifiers) -> str:
    if modifiers.alibi is None or q.dtype not in HALF:
        return ""
    return f"the fused kernel takes a bias in {_name(q)}, which rounds ALiBi's distances; use triton or flex"


def _ask_torch(backend: str, q: Tensor, k: Tensor, v: Tensor, note: str = "") -> Support:
    """PyTorch's own verdict, with its own words where it refuses."""
    from torch.backends import cuda

    grouped = q.shape[1] != k.shape[1]
    if backend == "efficient" and grouped:
        # judged as it is called, with key heads repeated
        k, v = (t[:, :1].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    params = cuda.SDPAParams(q, k, v, None, 0.0, False, grouped and backend != "efficient")
    check = getattr(cuda, f"can_use_{backend}_attention")
    if check(params, debug=False):
        return Support(True, note)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(params, debug=True)
    words = "; ".join(str(item.message).split(" (Triggered")[0] for item in caught)
    return Support(False, f"PyTorch refuses {backend} attention: {words or 'no reason given'}")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
