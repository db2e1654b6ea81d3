"""Differential attention: the one call, its implementations, and the choice between them.

``maps`` forms the signed map (the reference), ``pair`` makes two softmax calls, ``triton`` one pass of our kernel.
Any implementation of softmax attention can be named too: ``pair`` then makes its two calls with that one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.differential import reference, triton_forward
from attnlab_kernels.operations.differential.reference import Difference, Pair
from attnlab_kernels.operations.softmax import api as softmax
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.support import Support

__all__ = ["IMPLEMENTATIONS", "Difference", "Pair", "difference_attend", "supports"]


def _any_call(
    query: Pair, key: Pair, value: Tensor, weight: Tensor, *, bias: Tensor | None, need_grad: bool
) -> Support:
    return Support(True)


IMPLEMENTATIONS: dict[str, Callable[..., Support]] = {
    "maps": _any_call,
    "pair": _any_call,
    "difference_triton": triton_forward.supports,
}
"""what each says of a call: yes, or why not"""


def difference_attend(
    query: Pair,
    key: Pair,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Difference:
    """``(softmax(q1 k1) - weight * softmax(q2 k2)) v``.

    Args:
        query: two ``[B, h, n, d]``; key two ``[B, hkv, m, d]``, query head i reads key head ``i // (h // hkv)``.
        value: ``[B, hkv, m, dv]``.
        weight: a number or ``[B, h, n]``.
        scale: default ``1 / sqrt(d)``.
        bias: added to the scores of both maps.
        implementation: a key of ``IMPLEMENTATIONS`` or of softmax attention's (two calls of that one), or "auto".

    Raises:
        ValueError: an unknown implementation.
        Unsupported: the named implementation cannot run this call.
    """
    mask = Full() if mask is None else mask
    factor = query.first.shape[-1] ** -0.5 if scale is None else float(scale)
    name, reason = _choose(implementation, query, key, value, weight, mask, bias)
    named = {"mask": mask, "scale": factor, "bias": bias}
    if name == "difference_triton":
        output, lse = triton_forward.run(query, key, value, weight, **named)
        return Difference(output, lse, name, reason)
    if name == "maps":
        output, _ = reference.run(query, key, value, weight, **named)
        lse = Pair(*(_lse(q, k, mask, factor, bias) for q, k in zip(query, key, strict=True)))
        return Difference(output, lse, name, reason)
    inner = "auto" if implementation in ("auto", "pair") else implementation
    return reference.compose(query, key, value, weight, implementation=inner, **named)


def supports(
    implementation: str,
    query: Pair,
    key: Pair,
    value: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    need_grad: bool = False,
) -> Support:
    """Whether this implementation runs the call, or why not; softmax implementations speak for themselves."""
    if implementation not in IMPLEMENTATIONS:
        raise Unsupported(
            f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}; got {implementation!r}"
        )
    return IMPLEMENTATIONS[implementation](query, key, value, weight, bias=bias, need_grad=need_grad)


def _choose(
    implementation: str,
    query: Pair,
    key: Pair,
    value: Tensor,
    weight: Tensor,
    mask: Mask,
    bias: Tensor | None,
) -> tuple[str, str]:
    tensors = (*query, *key, value, weight)
    need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if implementation == "auto":
        fused = triton_forward.supports(query, key, value, weight, bias=bias, need_grad=need_grad)
        if softmax.observed():
            return "pair", "auto: two softmax calls, which somebody observes"
        if mask.form().documents is not None:
            return "pair", "auto: two softmax calls, which read document ids"
        if value.device.type == "cuda" and fused:
            return "difference_triton", "auto: our kernel reads the values once"
        return "pair", "auto: two softmax calls"
    if implementation in IMPLEMENTATIONS:
        support = supports(implementation, query, key, value, weight, bias=bias, need_grad=need_grad)
        if not support:
            raise Unsupported(f"implementation {implementation!r} cannot run this call: {support.reason}")
        return implementation, f"asked for; {support.reason}" if support.reason else "asked for"
    if implementation not in softmax.IMPLEMENTATIONS:
        choices = ", ".join(("auto", *IMPLEMENTATIONS, *softmax.IMPLEMENTATIONS))
        raise Unsupported(f"implementation must be one of {choices}; got {implementation!r}")
    return "pair", f"two calls of {implementation}"


def _lse(query: Tensor, key: Tensor, mask: Mask, scale: float, bias: Tensor | None) -> Tensor:
    with torch.no_grad():
        found = softmax.attend(query, key, key, mask=mask, scale=scale, bias=bias, implementation="eager").lse
    assert found is not None
    return found
