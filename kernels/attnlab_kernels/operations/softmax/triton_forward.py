"""Our own flash-attention forward in Triton: the launcher. ``triton_kernel`` is loaded on first use."""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.support import Support


def run(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def supports(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, bias: Tensor | None, need_grad: bool) -> Support:
    return Support(False, "not here yet")
