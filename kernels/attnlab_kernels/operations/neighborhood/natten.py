"""NATTEN's neighborhood attention (package natten), through its own choice of kernel.

Hassani et al., https://github.com/SHI-Labs/NATTEN. Its CUDA kernels were not run where this was written: on a CPU it
goes through FlexAttention, which forms all scores. It takes ``[B, *space, heads, dim]``, contiguous.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.neighborhood.reference import Result
from attnlab_kernels.operations.softmax.external import version
from attnlab_kernels.operations.softmax.support import Support

REQUIRES = "natten 0.20 or newer; its kernels need an NVIDIA GPU from Pascal (sm60)"
CALLS = {1: "na1d", 2: "na2d", 3: "na3d"}


def arrange(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous ``[B, *space, H, D]`` of ``[B, H, *space, D]``: what its kernels read."""
    return tuple(tensor.movedim(1, -2).contiguous() for tensor in tensors)


def run(q: Tensor, k: Tensor, v: Tensor, neighborhood: Neighborhood, *, scale: float) -> Result:
    """Attend from every pixel ``[B, H, *space, D]`` to its window.

    Its log-sum-exp was seen to be natural through FlexAttention; of its CUDA kernels that was not checked.
    """
    call = getattr(import_module("natten"), CALLS[len(neighborhood.space)])
    output, lse = call(
        *arrange(q, k, v),
        kernel_size=neighborhood.kernel_size,
        stride=neighborhood.stride,
        dilation=neighborhood.dilation,
        is_causal=neighborhood.causal,
        scale=scale,
        return_lse=True,
    )
    return Result(output.movedim(-2, 1), lse.movedim(-1, 1), None)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    visible: Tensor | None,
    dropout: float,
    need_windows: bool,
) -> Support:
    """What it has a kernel for, as it says itself; every pixel visible, no bias, no dropout, no weights by slot."""
    asked = {
        "takes no table of relative positions": bias is not None,
        "hides no pixels": visible is not None,
        "drops no probabilities": bool(dropout),
        "keeps no weights by window slot": need_windows,
    }
    for words, is_asked in asked.items():
        if is_asked:
            return Support(False, f"natten {words}")
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v)):
        return Support(False, "natten has no gradient on a CPU: FlexAttention has none there")
    try:
        import_module("natten")
        choose = import_module("natten.backends").choose_backend
        backend = choose(*(tensor.movedim(1, -2) for tensor in (q, k, v)), torch_compile=False)
    except Exception as error:  # of a package that was built for another torch it may be anything
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Support(False, f"natten cannot run this call: {words}")
    return Support(True, f"{version('natten')}, {backend}")
