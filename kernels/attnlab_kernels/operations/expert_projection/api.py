"""Expert projections: the calls, their implementations, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.operations.expert_projection import reference, triton_grouped
from attnlab_kernels.operations.expert_projection.reference import Routing, route
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.support import Support

__all__ = ["IMPLEMENTATIONS", "Choice", "Routing", "project_in", "project_out", "route", "supports"]


@dataclass(frozen=True)
class ProjectionImplementation:
    """One way to multiply with chosen experts; ``supports`` says yes, or why not."""

    project_in: Callable[[Tensor, Tensor, Routing], Tensor]
    project_out: Callable[[Tensor, Tensor, Routing], Tensor]
    supports: Callable[..., Support]


class Choice(NamedTuple):
    """What ran, and why."""

    implementation: str
    reason: str


def _any_call(x: Tensor, weight: Tensor, *, need_grad: bool) -> Support:
    return Support(True)


IMPLEMENTATIONS: dict[str, ProjectionImplementation] = {
    "dense": ProjectionImplementation(reference.dense_in, reference.dense_out, _any_call),
    "grouped": ProjectionImplementation(reference.grouped_in, reference.grouped_out, _any_call),
    "triton": ProjectionImplementation(
        triton_grouped.project_in, triton_grouped.project_out, triton_grouped.supports
    ),
}


def project_in(
    x: Tensor, weight: Tensor, routing: Routing, *, implementation: str = "auto"
) -> tuple[Tensor, Choice]:
    """From ``x [B, n, C]`` by ``weight [H, E, C, d]`` to heads ``[B, H, n, d]``, and what ran.

    Raises:
        ValueError: an unknown implementation.
        Unsupported: the named implementation cannot run this call.
    """
    choice = _choose(implementation, x, weight, routing)
    return IMPLEMENTATIONS[choice.implementation].project_in(x, weight, routing), choice


def project_out(
    heads: Tensor, weight: Tensor, routing: Routing, *, implementation: str = "auto"
) -> tuple[Tensor, Choice]:
    """From heads ``[B, H, n, d]`` by ``weight [H, E, d, C]`` to their sum ``[B, n, C]``; else as ``project_in``."""
    choice = _choose(implementation, heads, weight, routing)
    return IMPLEMENTATIONS[choice.implementation].project_out(heads, weight, routing), choice


def supports(implementation: str, x: Tensor, weight: Tensor, *, need_grad: bool = False) -> Support:
    """Whether this implementation runs the call, or why not."""
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation must be one of {choices}; got {implementation!r}")
    return IMPLEMENTATIONS[implementation].supports(x, weight, need_grad=need_grad)


def _choose(implementation: str, x: Tensor, weight: Tensor, routing: Routing) -> Choice:
    need_grad = torch.is_grad_enabled() and any(part.requires_grad for part in (x, weight, routing.gates))
    if implementation == "auto":
        if x.device.type == "cuda" and supports("triton", x, weight, need_grad=need_grad):
            return Choice("triton", "auto: our kernel runs this call")
        return Choice("grouped", "auto: multiplies with the chosen experts only")
    support = supports(implementation, x, weight, need_grad=need_grad)
    if not support:
        raise Unsupported(f"implementation {implementation!r} cannot run this call: {support.reason}")
    return Choice(implementation, f"asked for; {support.reason}" if support.reason else "asked for")
