"""Neighborhood attention: the one call, and the choice of implementation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.neighborhood import fused, natten, reference, triton_forward
from attnlab_kernels.operations.neighborhood.reference import Result
from attnlab_kernels.operations.softmax.api import Unsupported

IMPLEMENTATIONS = ("fused", "natten", "tiled", "triton")


class NeighborhoodResult(NamedTuple):
    """What ran, and why."""

    result: Result
    implementation: str
    reason: str


def neighborhood_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    dropout: float = 0.0,
    need_windows: bool = False,
    implementation: str = "auto",
) -> NeighborhoodResult:
    """Attend from every pixel to its window; the arguments are those of ``reference.run``.

    Args:
        implementation: "tiled" (the reference), "fused" (a CPU), "triton" (our kernel, one or two axes), "natten" (the
            package, where it is installed) or "auto", which takes none of another package.

    Raises:
        Unsupported: an unknown implementation, or one that cannot run this call; NeighborhoodError: shapes.
    """
    check_implementation(implementation)
    reference.check(q, k, v, neighborhood, bias, visible)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "natten":
        rest = {"bias": bias, "visible": visible, "dropout": dropout, "need_windows": need_windows}
        theirs = natten.supports(q, k, v, **rest)
        if not theirs:
            raise Unsupported(f"implementation 'natten' cannot run this call: {theirs.reason}")
        result = natten.run(q, k, v, neighborhood, scale=factor)
        return NeighborhoodResult(result, "natten", f"asked for; {theirs.reason}")
    if implementation == "triton" or (implementation == "auto" and q.device.type == "cuda"):
        rest = {"bias": bias, "dropout": dropout, "need_windows": need_windows}
        kernel = triton_forward.supports(q, v, neighborhood, **rest)
        if implementation == "triton" and not kernel:
            raise Unsupported(f"implementation 'triton' cannot run this call: {kernel.reason}")
        if kernel:
            result = triton_forward.run(q, k, v, neighborhood, scale=factor, visible=visible)
            why = "auto: our kernel" if implementation == "auto" else f"asked for; {kernel.reason}"
            return NeighborhoodResult(result, "triton", why)
    support = fused.supports(q, v, bias=bias, visible=visible, dropout=dropout, need_windows=need_windows)
    if implementation == "fused" and not support:
        raise Unsupported(f"implementation 'fused' cannot run this call: {support.reason}")
    if implementation != "tiled" and support:
        reason = "asked for" if implementation == "fused" else f"auto: {support.reason}"
        return NeighborhoodResult(fused.run(q, k, v, neighborhood, scale=factor, bias=bias), "fused", reason)
    result = reference.run(
        q,
        k,
        v,
        neighborhood,
        scale=factor,
        bias=bias,
        visible=visible,
        dropout=dropout,
        need_windows=need_windows,
    )
    reason = "asked for" if implementation == "tiled" else f"auto: the reference, for {support.reason}"
    return NeighborhoodResult(result, "tiled", reason)


def check_implementation(name: str) -> None:
    """Unsupported if there is none of this name."""
    if name not in ("auto", *IMPLEMENTATIONS):
        raise Unsupported(
            f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}; got {name!r}"
        )
