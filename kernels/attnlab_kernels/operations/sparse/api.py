"""Sparse attention: the one call, its implementations, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.operations.sparse import fused, reference, triton_lists
from attnlab_kernels.operations.sparse.reference import Result
from attnlab_kernels.operations.sparse.tilings import describe
from attnlab_kernels.patterns import Pattern

__all__ = ["IMPLEMENTATIONS", "SparseResult", "check_implementation", "sparse_attend", "supports"]


class SparseResult(NamedTuple):
    """What ran, and why."""

    result: Result
    implementation: str
    reason: str


def _any_call(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, dropout: float) -> Support:
    return Support(True, "the reference: gathers the keys of each tile")


IMPLEMENTATIONS: dict[str, Callable[..., Support]] = {
    "tiled": _any_call,
    "fused": fused.supports,
    "triton": triton_lists.supports,
}
"""what each says of a call: yes, or why not"""


def sparse_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    start: int | None = None,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> SparseResult:
    """Attend along a pattern; the arguments are those of ``reference.run``.

    Args:
        implementation: a key of ``IMPLEMENTATIONS``, or "auto": our kernel on a GPU, fused tiles on a CPU, else the
            reference.

    Raises:
        ValueError: an unknown implementation; PatternError: shapes that do not fit.
        Unsupported: the named implementation cannot run this call.
    """
    check_implementation(implementation)
    named: dict[str, Any] = {"start": start, "scale": scale, "mask": mask}
    own = "triton" if q.device.type == "cuda" else "fused"
    name = own if implementation == "auto" else implementation
    support = supports(name, q, k, v, bias=bias, dropout=dropout)
    if not support and implementation != "auto":
        raise Unsupported(f"implementation {name!r} cannot run this call: {support.reason}")
    if not support:
        name, reason = "tiled", f"auto: the reference, for {support.reason}"
    else:
        reason = f"{'auto' if implementation == 'auto' else 'asked for'}: {support.reason}"
    if name == "tiled":
        result = reference.run(q, k, v, pattern, bias=bias, dropout=dropout, **named)
    else:
        result = (triton_lists if name == "triton" else fused).run(q, k, v, pattern, **named)
    if name == "fused":
        reason += f"; {describe(fused.tiling_of(q, k, pattern, start=start, mask=mask))}"
    return SparseResult(result, name, reason)


def supports(
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Support:
    """Whether this implementation runs the call, or why not."""
    check_implementation(implementation)
    return IMPLEMENTATIONS[implementation](q, k, v, bias=bias, dropout=dropout)


def check_implementation(name: str) -> None:
    """ValueError if there is none of this name."""
    if name not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}; got {name!r}"
        )
