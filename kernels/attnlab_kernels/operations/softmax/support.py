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


class Run(Protocol):
    """What every implementation is: ``(output [B, Hq, Sq, Dv], lse [B, Hq, Sq])``; no argument is changed."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class Supports(Protocol):
    """Whether ``Run`` would give the reference's answer for this call."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, bias: Tensor | None, need_grad: bool
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
