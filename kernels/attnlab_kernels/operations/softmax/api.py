"""Softmax attention: the one call, the choice of implementation, and why.

``attend`` fixes the meaning; every implementation gives the reference's answer or refuses with a reason. Only
``implementation="auto"`` chooses, and it says what it chose and why. Nothing falls back in silence.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask, Window, mask_from_band
from attnlab_kernels.operations.softmax import lower, preference
from attnlab_kernels.operations.softmax.registry import IMPLEMENTATIONS
from attnlab_kernels.operations.softmax.support import PLAIN, Implementation, Modifiers, Support
from attnlab_kernels.output import AttentionOutput

__all__ = [
    "IMPLEMENTATIONS",
    "AttendCall",
    "Implementation",
    "Support",
    "Unsupported",
    "attend",
    "choose",
    "observed",
    "observing",
    "supports",
    "survey",
    "tell",
]


# kernels that take the maximum of the raw products, of which a scale of 0 or below makes a wrong shift
FOLD_SCALE = (
    "triton",
    "triton_hopper",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "flash_attn_hub",
    "flashinfer",
)
READ_DOCUMENTS = ("eager", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flex", "triton")


class Unsupported(ValueError):
    """The implementation that was asked for cannot run this call; the text says why."""


@dataclass(frozen=True, eq=False)
class AttendCall:
    """One finished call of ``attend``, as an observer sees it. Tensors are the caller's own: do not write."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    bias: Tensor | None
    output: Tensor
    lse: Tensor
    implementation: str
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi: Tensor | None = None


_observers = threading.local()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> AttentionOutput:
    """Softmax attention, ``softmax(scale * q k^T + bias, where mask) v``.

    With modifiers, in this order: the soft cap on the scaled scores, then ALiBi, then the bias, then the mask; sinks
    join the softmax as one more key without a value.

    Args:
        q: ``[B, Hq, Sq, D]``.
        k: ``[B, Hkv, Sk, D]``, Hq a multiple of Hkv; query head h reads key head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, Sk, Dv]``.
        mask: who may attend to whom (default: all); query row i sits at position ``Sk - Sq + i``.
        scale: default ``1 / sqrt(D)``.
        bias: added to the scaled scores, broadcasts to ``[B, Hq, Sq, Sk]``; minus infinity forbids a pair.
        softcap: a scaled score s becomes ``softcap * tanh(s / softcap)``; above 0.
        sinks: one finite score a query head, ``[Hq]``; rows then sum to less than 1, and the lse holds it too.
        alibi: one slope a query head, ``[Hq]``; ``slope * |p - j|`` is taken from the score of position p and key j.
        dropout: share of probabilities dropped (only eager does it).
        implementation: a key of ``IMPLEMENTATIONS``, or "auto".

    Returns:
        output ``[B, Hq, Sq, Dv]`` in q's dtype; lse ``[B, Hq, Sq]`` natural log, float32 (float64 for
        float64), detached; ``aux`` with the implementation that ran and the reason. A dead row is zero with lse -inf
        (with a sink, the sink's score).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown implementation.
        Unsupported: the named implementation cannot run this call.
    """
    mask = Full() if mask is None else mask
    modifiers = Modifiers(softcap, alibi, sinks)
    _check(q, k, v, mask, bias, dropout)
    _check_modifiers(q, modifiers)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tight = tighten(mask, q.shape[2], k.shape[2])
    need_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, bias, *modifiers.tensors)
    )
    call = {"bias": bias, "modifiers": modifiers}
    if implementation == "auto":
        name, reason = choose(q, k, v, mask=tight, scale=factor, **call, need_grad=need_grad, dropout=dropout)
    else:
        name = implementation
        support = _supports(
            name, q, k, v, mask=tight, scale=factor, **call, dropout=dropout, need_grad=need_grad
        )
        if not support:
            raise Unsupported(f"implementation {name!r} cannot run this call: {support.reason}")
        reason = "asked for" if not support.reason else f"asked for; {support.reason}"
    extra = {"dropout": dropout} if dropout else {}
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        # no kernel is called on nothing: the CPU flash operator divides by a length
        output = q.new_zeros(*q.shape[:3], v.shape[-1])
        output, lse = lower.add_sinks(output, q.new_full(q.shape[:3], -torch.inf), sinks)
    else:
        output, lse = IMPLEMENTATIONS[name].run(q, k, v, mask=tight, scale=factor, **call, **extra)
    lse = lse.detach() if q.dtype == torch.float64 else lse.detach().float()
    tell(AttendCall(q, k, v, mask, factor, bias, output, lse, name, softcap, sinks, alibi))
    return AttentionOutput(output, lse=lse, aux={"implementation": name, "reason": reason})


def supports(
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    dropout: float = 0.0,
    need_grad: bool = False,
) -> Support:
    """Whether this implementation gives the reference's answer for this call, or why not."""
    return _supports(
        implementation,
        q,
        k,
        v,
        mask=tighten(mask or Full(), q.shape[2], k.shape[2]),
        scale=scale,
        bias=bias,
        modifiers=Modifiers(softcap, alibi, sinks),
        dropout=dropout,
        need_grad=need_grad,
    )


def _supports(
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None,
    bias: Tensor | None,
    modifiers: Modifiers,
    dropout: float,
    need_grad: bool,
) -> Support:
    if implementation not in IMPLEMENTATIONS:
        raise Unsupported(
            f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}; got {implementation!r}"
        )
    if dropout and implementation != "eager":
        return Support(False, f"only eager drops probabilities; got dropout {dropout}")
    call = {"mask": mask, "bias": bias, "modifiers": modifiers}
    return _asked(implementation, q, k, v, scale=scale, **call, need_grad=need_grad)


def _asked(
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    """Its own verdict, once it is known that it can read the mask and apply the scale."""
    folds = implementation in FOLD_SCALE or (implementation == "sdpa_flash" and q.is_cuda)
    if folds and scale is not None and not scale > 0:
        return Support(
            False, f"{implementation} folds the scale into its exponent and needs it above 0; got {scale}"
        )
    if mask.form().documents is not None and implementation not in READ_DOCUMENTS:
        return Support(
            False, f"it reads no document ids; got {mask.describe()}; use {', '.join(READ_DOCUMENTS)}"
        )
    return IMPLEMENTATIONS[implementation].supports(
        q, k, v, mask=mask, bias=bias, modifiers=modifiers, need_grad=need_grad
    )


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    bias: Tensor | None = None,
    modifiers: Modifiers = PLAIN,
    dropout: float = 0.0,
    need_grad: bool = False,
) -> tuple[str, str]:
    """What auto runs for this call, and why: the first that supports it, and who was passed over."""
    if dropout:
        return "eager", "auto: only eager drops probabilities"
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    order, source = preference.order(q.device.type, capability, mask)
    call = {"bias": bias, "modifiers": modifiers}
    passed: list[str] = []
    for name in order:
        support = _asked(name, q, k, v, mask=mask, scale=scale, **call, need_grad=need_grad)
        if support:
            skipped = f" (passed over {'; '.join(passed)})" if passed else ""
            return name, f"auto: first of {', '.join(order)} that runs this call ({source}){skipped}"
        passed.append(f"{name}: {support.reason}")
    raise AssertionError("eager runs every call")


@contextmanager
def observing(callback: Callable[[AttendCall], None]) -> Iterator[None]:
    """Call ``callback`` after every ``attend`` of this thread, inside the block."""
    stack: list[Callable[[AttendCall], None]] = [*getattr(_observers, "stack", ()), callback]
    _observers.stack = stack
    try:
        yield
    finally:
        _observers.stack = [entry for entry in stack if entry is not callback]


def observed() -> bool:
    """Whether this thread has an observer, who sees softmax calls and nothing that fuses two of them."""
    return bool(getattr(_observers, "stack", ()))


def tell(call: AttendCall) -> None:
    """Give a finished call to this thread's observers; for softmax attention that does not go through ``attend``."""
    for observer in tuple(getattr(_observers, "stack", ())):
        observer(call)


def survey(device: str = "cpu") -> list[dict[str, Any]]:
    """What can run on this device, with the reason for what cannot: asked with one small call each."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    q = torch.zeros(1, 4, 128, 64, dtype=dtype, device=device)
    k = torch.zeros(1, 2, 128, 64, dtype=dtype, device=device)
    rows = []
    for implementation in IMPLEMENTATIONS.values():
        mask = Window(31) if implementation.name == "banded" else Causal()
        support = implementation.supports(q, k, k, mask=mask, bias=None, modifiers=PLAIN, need_grad=False)
        rows.append(
            {
                "name": implementation.name,
                "label": implementation.label,
                "available": support.ok,
                "reason": support.reason,
                "requires": implementation.requires,
            }
        )
    return rows


def tighten(mask: Mask, num_queries: int, num_keys: int) -> Mask:
    """The same allowed pairs without limits that these lengths never reach (a window as long as the keys)."""
    band = mask.form()
    if band.left is None or band.left < num_keys - 1:
        return mask
    if band.right is not None and band.right >= num_queries - 1:
        band = replace(band, right=None)
    if band.right not in (0, None):
        return mask
    return mask_from_band(replace(band, left=None))


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, dim]; got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"q, k and v must share one float dtype and device; {name} is {tensor.dtype} "
                f"on {tensor.device}, q is {q.dtype} on {q.device}"
            )
    batch, heads, num_queries, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "shapes must be q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {heads} and {k.shape[1]}")
    described = mask.form().batch_size
    if described not in (1, batch):
        raise ValueError(f"mask must describe 1 or {batch} sequences, as q has; got {described}")
    if bias is not None:
        target = (batch, heads, num_queries, k.shape[2])
        sizes = zip(reversed(bias.shape), reversed(target), strict=False)
        if bias.dim() > 4 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(f"bias must broadcast to {target}; got shape {tuple(bias.shape)}")
    if not 0 <= dropout < 1 or math.isnan(dropout):
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")


def _check_modifiers(q: Tensor, modifiers: Modifiers) -> None:
    softcap = modifiers.softcap
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number above 0; got {softcap}")
    for name, tensor in (("sinks", modifiers.sinks), ("alibi", modifiers.alibi)):
        if tensor is None:
            continue
        if tensor.shape != q.shape[1:2] or tensor.device != q.device or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be one float for each of {q.shape[1]} query heads on {q.device}; got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
