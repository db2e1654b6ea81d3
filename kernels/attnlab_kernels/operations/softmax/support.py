"""The answer to "can this implementation run this call": yes, or no, and why in words a page can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attnlab_kernels.masks import Mask


@dataclass(frozen=True)
class Support:
    """``ok`` and a sentence; for a yes the sentence says what the caller should know (or is empty)."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, eq=False)
class Modifiers:
    """What is done to a scaled score ``s = scale * q . k`` before the softmax, in this order, and what joins its sum.

    ``softcap``: ``s`` becomes ``softcap * tanh(s / softcap)`` (Gemma 2, https://arxiv.org/abs/2408.00118).
    ``alibi``: ``slope * |p - j|`` is taken away, one slope a query head ``[Hq]``, p the position ``Sk - Sq + i``
    (Press et al., https://arxiv.org/abs/2108.12409). The call's bias is added after both.
    ``sinks``: a learned score ``[Hq]`` that takes part in the softmax and has no value, so rows sum to less than 1
    and the log-sum-exp holds it too (gpt-oss, https://arxiv.org/abs/2508.10925).
    """

    softcap: float | None = None
    alibi: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that can ask for a gradient."""
        return [tensor for tensor in (self.alibi, self.sinks) if tensor is not None]


PLAIN = Modifiers()


def fused_refusal(modifiers: Modifiers, need_grad: bool) -> str:
    """Why a kernel that knows no modifiers cannot be helped: ALiBi becomes a bias, sinks join afterwards."""
    if modifiers.softcap is not None:
        return f"the fused kernel has no soft cap; got softcap {modifiers.softcap}; use eager, flex or triton"
    if need_grad and modifiers.alibi is not None and modifiers.alibi.requires_grad:
        return "the fused kernel gives no gradient for slopes; use eager"
    if need_grad and modifiers.sinks is not None:
        return "sinks join after the fused kernel, without a gradient; use eager or triton"
    return ""


class Run(Protocol):
    """What every implementation is: ``(output [B, Hq, Sq, Dv], lse [B, Hq, Sq])``; no argument is changed."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask,
        scale: float,
        bias: Tensor | None = None,
        modifiers: Modifiers = PLAIN,
    ) -> tuple[Tensor, Tensor]: ...


class Supports(Protocol):
    """Whether ``Run`` would give the reference's answer for this call."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask,
        bias: Tensor | None,
        modifiers: Modifiers,
        need_grad: bool,
    ) -> Support: ...


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operation."""

    name: str
    label: str
    run: Callable[..., tuple[Tensor, Tensor]]
    supports: Supports
    requires: str
    """What a machine needs for it, in words."""
    arrange: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None = None
    """q, k and v in the layout that its kernel takes, and what it copies of the output; None: ours is its own"""
