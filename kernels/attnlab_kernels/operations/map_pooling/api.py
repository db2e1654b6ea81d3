"""Pooled maps and statistics of attention maps from queries, keys and log-sum-exp: the calls, and who runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.map_pooling import reference, streamed, triton_maps
from attnlab_kernels.operations.map_pooling.results import MapStatistics, PooledMap
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.support import Support

__all__ = [
    "IMPLEMENTATIONS",
    "MapImplementation",
    "MapStatistics",
    "PooledMap",
    "map_statistics",
    "pooled_map",
]


@dataclass(frozen=True)
class MapImplementation:
    """One way to read maps; ``supports(q, k, bias=..., cell=...)`` says yes, or why not."""

    statistics: Callable[..., MapStatistics]
    pool: Callable[..., PooledMap]
    supports: Callable[..., Support]


def _any_call(q: Tensor, k: Tensor, *, bias: Tensor | None, cell: tuple[int, int] | None) -> Support:
    return Support(True)


IMPLEMENTATIONS: dict[str, MapImplementation] = {
    "eager": MapImplementation(reference.statistics, reference.pool, _any_call),
    "streamed": MapImplementation(streamed.statistics, streamed.pool, _any_call),
    "triton": MapImplementation(triton_maps.statistics, triton_maps.pool, triton_maps.supports),
}


def map_statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    sinks: int = 1,
    implementation: str = "auto",
) -> tuple[MapStatistics, str]:
    """Numbers of every row and column of softmax maps ``P = exp(scale q k^T + bias - lse)``, and who computed them.

    Args:
        q: ``[B, Hq, Sq, D]``; k ``[B, Hkv, Sk, D]``, Hq a multiple of Hkv.
        lse: ``[B, Hq, Sq]`` natural log-sum-exp of the rows, minus infinity for a dead one.
        mask: of the call that gave ``lse`` (default: all pairs).
        scale: default ``1 / sqrt(D)``.
        bias: of that call, broadcasts to ``[B, Hq, Sq, Sk]``.
        sinks: how many of the first existing keys ``sink_mass`` counts.
        implementation: a key of ``IMPLEMENTATIONS``, or "auto".

    Raises:
        ValueError: shapes that do not fit, sinks below 1, or an unknown implementation.
        Unsupported: the named implementation cannot run this call.
    """
    mask = Full() if mask is None else mask
    _check(q, k, lse)
    if sinks < 1:
        raise ValueError(f"sinks must be at least 1 key; got {sinks}")
    name = _choose(implementation, q, k, bias, None)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        run = IMPLEMENTATIONS[name].statistics
        return run(q, k, lse, mask=mask, scale=factor, bias=bias, sinks=sinks), name


def pooled_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    cell: tuple[int, int],
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[PooledMap, str]:
    """Maximum and mean of the maps under cells of ``cell`` = (rows, columns) pairs; else as ``map_statistics``."""
    mask = Full() if mask is None else mask
    _check(q, k, lse)
    if min(cell) < 1:
        raise ValueError(f"cell must be at least 1 row and 1 column; got {cell}")
    name = _choose(implementation, q, k, bias, cell)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        return IMPLEMENTATIONS[name].pool(q, k, lse, mask=mask, scale=factor, bias=bias, cell=cell), name


def supports(
    implementation: str,
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    cell: tuple[int, int] | None = None,
) -> Support:
    """Whether this implementation reads these maps, or why not; ``cell`` for a pooled map."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}; got {implementation!r}"
        )
    return IMPLEMENTATIONS[implementation].supports(q, k, bias=bias, cell=cell)


def _choose(
    implementation: str, q: Tensor, k: Tensor, bias: Tensor | None, cell: tuple[int, int] | None
) -> str:
    if implementation == "auto":
        fused = q.device.type == "cuda" and IMPLEMENTATIONS["triton"].supports(q, k, bias=bias, cell=cell)
        return "triton" if fused else "streamed"
    support = supports(implementation, q, k, bias=bias, cell=cell)
    if not support:
        raise Unsupported(f"implementation {implementation!r} cannot run this call: {support.reason}")
    return implementation


def _check(q: Tensor, k: Tensor, lse: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape[::3] != q.shape[::3] or lse.shape != q.shape[:3]:
        raise ValueError(
            "shapes must be q [B, Hq, Sq, D], k [B, Hkv, Sk, D], lse [B, Hq, Sq]; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(lse.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {q.shape[1]} and {k.shape[1]}")
