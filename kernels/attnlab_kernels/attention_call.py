"""What every mechanism tells those who listen: one attention, with the few tensors that its map follows from.

A mechanism made of several calls of an operation gathers them with ``composing`` and announces the whole, so whoever
listens hears each attention once, as what it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.api import AttendCall, attend, observing

Run = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One finished attention. Tensors are the mechanism's own: do not write.

    ``kind`` says what the map is, see ``trace_maps``; the softmax kinds are ``exp(scale q k - normaliser)``.
    """

    kind: str
    query: Tensor
    """``[B, H, n, D]``, or what stands in its place (features)"""
    key: Tensor
    """``[B, Hkv, m, D]``; m slots or cells where the mechanism attends to those"""
    value: Tensor
    """``[B, Hkv, m, Dv]``"""
    output: Tensor
    """``[B, H, n, Dv]``, the map times the values: before any norm or output projection"""
    normaliser: Tensor
    """``[B, H, n]``: natural log-sum-exp, or the denominator of linear attention"""
    mask: Mask
    scale: float
    implementation: str
    run: Run
    """computes ``output`` once more from ``operands``"""
    reference: Run
    """computes it by the operation's plain reference"""
    operands: tuple[Tensor, ...]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """more tensors of the map, ``[B, heads, ..]``"""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """more facts of the map, as JSON"""
    row_values: tuple[Tensor, ...] = ()
    """values ``[B, Hkv, m', Dv]`` of the first rows, where these have their own"""
    unmapped: str = ""
    """why no map can be made of this call"""
    modifiers: Mapping[str, Any] = field(default_factory=dict)
    """softcap, alibi, bias and sinks of a softmax, as ``attend`` takes them"""

    def retold(self, kind: str, **detail: Any) -> AttentionCall:
        """The same call as another kind, with more facts."""
        return replace(self, kind=kind, detail={**self.detail, **detail})


def softmax_call(call: AttendCall, run: Run | None = None, kind: str = "softmax") -> AttentionCall:
    """A softmax attention; ``run`` where it did not go through ``attend``."""

    names = ("bias", "softcap", "sinks", "alibi")
    modifiers = {name: getattr(call, name) for name in names if getattr(call, name) is not None}

    def plain(implementation: str) -> Run:
        def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rules = {"mask": call.mask, "scale": call.scale, **modifiers}
            return attend(query, key, value, implementation=implementation, **rules).output

        return attended

    return AttentionCall(
        kind,
        call.q,
        call.k,
        call.v,
        call.output,
        call.lse,
        call.mask,
        call.scale,
        call.implementation,
        run or plain(call.implementation),
        plain("eager"),
        (call.q, call.k, call.v),
        modifiers=modifiers,
    )


Hearer = Callable[[AttentionCall], None]
_state = threading.local()


def _hearers() -> tuple[Hearer, ...]:
    return getattr(_state, "hearers", ())


@contextmanager
def hearing(callback: Hearer) -> Iterator[None]:
    """Call ``callback`` after every attention of this thread, inside the block."""

    def hear(call: AttentionCall) -> None:
        callback(call)

    def attended(call: AttendCall) -> None:
        if any(hearer is hear for hearer in _hearers()):
            callback(softmax_call(call))

    before = _hearers()
    _state.hearers = (*before, hear)
    try:
        with observing(attended):
            yield
    finally:
        _state.hearers = before


@contextmanager
def composing() -> Iterator[list[AttentionCall]]:
    """Keep the attentions inside the block from those who listen, and list them; nothing if nobody listens."""
    parts: list[AttentionCall] = []
    if not _hearers():
        yield parts
        return
    before = _hearers()
    _state.hearers = ()
    try:
        with hearing(parts.append):
            yield parts
    finally:
        _state.hearers = before


def heard() -> bool:
    """Whether anybody listens."""
    return bool(_hearers())


def announce(call: AttentionCall) -> None:
    """Give a finished attention to those who listen."""
    for hearer in _hearers():
        hearer(call)


def batched(parts: list[AttentionCall]) -> AttentionCall:
    """One call of what was computed one batch element at a time; only the first, if they differ in shape."""
    first = parts[0]
    if any(part.query.shape != first.query.shape or part.key.shape != first.key.shape for part in parts):
        return first

    def each(name: str) -> Run:
        def run(*operands: Tensor) -> Tensor:
            rows = zip(*(operand.split(1) for operand in operands), strict=True)
            return torch.cat([getattr(part, name)(*row) for part, row in zip(parts, rows, strict=True)])

        return run

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return replace(
        first,
        **{name: joined(name) for name in ("query", "key", "value", "output", "normaliser")},
        operands=tuple(torch.cat(tensors) for tensors in zip(*(p.operands for p in parts), strict=True)),
        run=each("run"),
        reference=each("reference"),
    )


def chained(parts: list[AttentionCall]) -> AttentionCall | None:
    """One call of a sequence that was computed in chunks; None where a chunk no longer has the earlier keys."""
    last = parts[-1]
    softmax = all(part.kind not in ("linear", "difference", "sparse") for part in parts)
    total = sum(part.query.shape[2] for part in parts)
    if not softmax or any(part.extra for part in parts) or last.key.shape[2] != total:
        return None

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=2)

    def by_chunk(name: str) -> Run:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            made, start = [], 0
            for part in parts:
                stop = start + part.query.shape[2]
                made.append(
                    getattr(part, name)(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
                )
                start = stop
            return torch.cat(made, dim=2)

        return run

    query = joined("query")
    biased = "bias" in last.modifiers
    return replace(
        last,
        unmapped="its scores have a bias, which is known by chunks only" if biased else last.unmapped,
        query=query,
        output=joined("output"),
        normaliser=joined("normaliser"),
        operands=(query, last.key, last.value),
        run=by_chunk("run"),
        reference=by_chunk("reference"),
    )
