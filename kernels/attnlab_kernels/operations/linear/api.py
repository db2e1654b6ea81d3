"""Linear attention: the one call, its forms, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.operations.linear import fla, triton_chunked
from attnlab_kernels.operations.linear.chunked import chunked
from attnlab_kernels.operations.linear.reference import LinearSums, Raw, parallel, recurrent
from attnlab_kernels.operations.linear.segments import FeatureMaps, segmented
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.support import Support


@dataclass(frozen=True)
class LinearImplementation:
    """One way to compute the sums; ``native`` ones take the inputs in their own dtype, the others in float32."""

    run: Callable[..., Raw]
    supports: Callable[..., Support]
    native: bool = False


def _any_call(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, chunk: int) -> Support:
    return Support(True)


IMPLEMENTATIONS: dict[str, LinearImplementation] = {
    "parallel": LinearImplementation(parallel, _any_call),
    "recurrent": LinearImplementation(recurrent, _any_call),
    "chunked": LinearImplementation(chunked, _any_call),
    "triton": LinearImplementation(triton_chunked.run, triton_chunked.supports, native=True),
    "fla": LinearImplementation(fla.run, fla.supports, native=True),
}
# the plain ones, which run everything
FORMS = ("parallel", "recurrent", "chunked")


class LinearResult(NamedTuple):
    """What ``linear_attend`` gives back."""

    output: Tensor
    """``[B, H, n, Dv]`` in the values' dtype; zero where no key was seen"""
    denominator: Tensor | None
    """``[B, H, n]`` float32 or wider, epsilon included; None without normalisation"""
    sums: LinearSums
    """over the past and these keys, float32 or wider"""
    form: str
    reason: str


def linear_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    eps: float = 1e-6,
    normalize: bool = True,
    past: LinearSums | None = None,
    form: str = "auto",
    chunk: int = 64,
    maps: FeatureMaps | None = None,
) -> LinearResult:
    """``O_i = q_i S_i / (q_i z_i + eps)`` with ``S_i = sum_j k_j v_j^T`` and ``z_i = sum_j k_j``, features given.

    Sums are float32 (float64 for float64 inputs): in bfloat16 a normaliser stops growing at 256.

    Args:
        query: features ``[B, H, n, f]``; a masked key has features of zero.
        key: features ``[B, H, m, f]``.
        value: ``[B, H, m, Dv]``.
        causal: the sums run over keys up to the query's own; needs n = m.
        eps: added to the denominator.
        normalize: False leaves the denominator out.
        past: sums over earlier keys.
        form: "parallel" (quadratic reference), "recurrent", "chunked", "triton", "fla" or "auto".
        chunk: tokens of a chunk.
        maps: what makes features of ``query`` and of ``key``, each token by itself; None: they are features already.

    Raises:
        ValueError: shapes that do not fit, an unknown form, eps below 0 or a chunk below 1.
        Unsupported: the named form cannot run this call.
    """
    _check(query, key, value, causal, eps, chunk)
    in_segments = causal and query.device.type == "cpu" and not _needs_gradient(query, key, value, past)
    if maps is not None and not (in_segments and form in ("auto", "chunked")):
        query, key, maps = maps[0](query), maps[1](key), None
    name, reason = _choose(form, query, key, value, causal, chunk)
    if name == "chunked" and in_segments and query.shape[2]:
        parts = segmented(query, key, value, maps, past, chunk=chunk, eps=eps if normalize else None)
        return LinearResult(*parts, name, reason)
    if maps is not None:
        query, key = maps[0](query), maps[1](key)
    wide = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    values = value
    if not IMPLEMENTATIONS[name].native:
        query, key, values = query.to(wide), key.to(wide), value.to(wide)
    if past is None:
        batch, heads, _, features = key.shape
        past = LinearSums(
            key.new_zeros(batch, heads, features, value.shape[-1], dtype=wide),
            key.new_zeros(batch, heads, features, dtype=wide),
        )
    past = LinearSums(past.state.to(wide), past.normaliser.to(wide))
    if 0 in (query.shape[2], key.shape[2]):
        name, reason = "parallel", "nothing to sum"
        query, key, values = query.to(wide), key.to(wide), value.to(wide)
    raw = IMPLEMENTATIONS[name].run(query, key, values, causal=causal, past=past, chunk=chunk)
    if not normalize:
        return LinearResult(raw.numerator.to(value.dtype), None, raw.sums, name, reason)
    denominator = raw.denominator + eps
    empty = denominator == 0
    # in place where no gradient needs the numerator: one tensor of this size less to make
    divide = raw.numerator.div if raw.numerator.requires_grad else raw.numerator.div_
    output = divide(denominator.masked_fill(empty, 1)[..., None])  # nothing seen: 0 / 1
    return LinearResult(output.to(value.dtype), denominator, raw.sums, name, reason)


def supports(
    form: str, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, chunk: int = 64
) -> Support:
    """Whether this form runs the call, or why not."""
    if form not in IMPLEMENTATIONS:
        raise ValueError(f"form must be one of {', '.join(('auto', *IMPLEMENTATIONS))}; got {form!r}")
    return IMPLEMENTATIONS[form].supports(query, key, value, causal=causal, chunk=chunk)


def _choose(
    form: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, chunk: int
) -> tuple[str, str]:
    if form != "auto":
        support = supports(form, query, key, value, causal=causal, chunk=chunk)
        if not support:
            raise Unsupported(f"form {form!r} cannot run this call: {support.reason}")
        return form, f"asked for; {support.reason}" if support.reason else "asked for"
    if query.shape[2] == 1 and causal:
        return "recurrent", "auto: one token"
    if query.device.type == "cuda" and supports("triton", query, key, value, causal=causal, chunk=chunk):
        return "triton", "auto: our kernel runs this call"
    return "chunked", "auto: linear in the number of tokens"


def _needs_gradient(query: Tensor, key: Tensor, value: Tensor, past: LinearSums | None) -> bool:
    return torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value, *(past or ())))


def _check(query: Tensor, key: Tensor, value: Tensor, causal: bool, eps: float, chunk: int) -> None:
    fits = query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2]
    if not fits or query.shape[3] != key.shape[3] or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "shapes must be query [B, H, n, f], key [B, H, m, f], value [B, H, m, Dv]; "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"causal needs as many queries as keys (earlier keys go into past); got {query.shape[2]} and {key.shape[2]}"
        )
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token; got {chunk}")
