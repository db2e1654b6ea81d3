"""A small map of each mechanism on one and the same input, computed exactly by its effective map. No torch.

48 tokens (or a few pixels) of a made-up sequence: near tokens are alike, every eighth is a heading that many look
back to. Queries and keys are the same for all, so the pictures differ by the mechanism alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlab_kernels.difference_map import DifferenceMap
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.expert_map import ExpertMap
from attnlab_kernels.linear_map import LinearMap
from attnlab_kernels.masks import Causal, Full, Mask, Window
from attnlab_kernels.neighborhood import Neighborhood, NeighborhoodMap
from attnlab_kernels.patterns import LocalGlobal
from attnlab_kernels.ring_map import RingMap
from attnlab_kernels.sparse_map import SparseMap

TOKENS, SIDE, WIDTH = 48, 7, 16
SCALE = WIDTH**-0.5
WHOLE = slice(None)
Floats = NDArray[np.float64]


class SampleMap(NamedTuple):
    """``weights`` float32 [queries, keys]; ``signed`` where some are below zero; ``lines`` are cuts between tokens."""

    weights: NDArray[np.float32]
    signed: bool
    words: str
    lines: tuple[int, ...] = ()


def sample_map(mechanism: str) -> SampleMap:
    """The map of a mechanism of the catalog. Raises KeyError."""
    return _MAKERS[mechanism]()


@cache
def tokens(count: int = TOKENS, seed: int = 0) -> tuple[Floats, Floats]:
    """Queries and keys ``[count, 16]`` of one head."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, count + 8, WIDTH))
    smooth = np.stack([noise[:, shift : shift + count] for shift in range(5)]).sum(axis=0) / 5**0.5
    query, key = 1.2 * smooth[0], 0.6 * smooth[1] + smooth[0]
    heading = rng.standard_normal(WIDTH)
    key[::8] = 1.2 * heading
    query += 0.5 * heading
    return query, key


def softmax_map(mask: Mask, query: Floats, key: Floats) -> SoftmaxMap:
    """The map of softmax attention, its log-sum-exp worked out here."""
    rows, cols = np.arange(len(query)), np.arange(len(key))
    scores = query @ key.T * SCALE
    allowed = mask.allowed(rows, cols, num_queries=len(query), num_keys=len(key))
    return SoftmaxMap(query, key, _lse(np.where(allowed, scores, -np.inf)), SCALE, mask)


def _lse(scores: Floats) -> Floats:
    peak = scores.max(axis=1)
    return peak + np.log(np.exp(scores - peak[:, None]).sum(axis=1))


def _softmax(mask: Mask, words: str, lines: tuple[int, ...] = ()) -> Callable[[], SampleMap]:
    return lambda: SampleMap(softmax_map(mask, *tokens()).tile(WHOLE, WHOLE), False, words, lines)


def _cross() -> SampleMap:
    query, _ = tokens()
    _, context = tokens(30, seed=1)
    context = context + 0.8 * np.linspace(0, 1, 30)[:, None] * query[-1]
    made = softmax_map(Full(), query, context)
    return SampleMap(made.tile(WHOLE, WHOLE), False, "48 queries over a context of 30, no triangle")


def _linear() -> SampleMap:
    query, key = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in tokens())
    below = np.tril(query @ key.T).sum(axis=1) + 1e-6
    made = LinearMap(query, key, below, Causal())
    return SampleMap(
        made.tile(WHOLE, WHOLE), False, "elu + 1 features: rows sum to 1, no single token stands out"
    )


def _sparse() -> SampleMap:
    query, key = tokens()
    pattern = LocalGlobal(True, window=8, global_tokens=2)
    rows = np.arange(TOKENS)
    scores = np.where(pattern.allowed(rows, rows, num_keys=TOKENS), query @ key.T * SCALE, -np.inf)
    made = SparseMap(query, key, _lse(scores), SCALE, pattern)
    return SampleMap(made.tile(WHOLE, WHOLE), False, "a window of 8 and two global tokens")


def _efficient() -> SampleMap:
    query, key = tokens(64)
    coarse = key.reshape(4, 2, 4, 2, WIDTH).mean(axis=(1, 3)).reshape(16, WIDTH)
    made = softmax_map(Full(), query, 1.5 * coarse)
    return SampleMap(
        made.tile(WHOLE, WHOLE),
        False,
        "spatial reduction: 8 × 8 queries over 4 × 4 keys",
    )


def _ring() -> SampleMap:
    query, key = tokens()
    owner = np.arange(TOKENS) // (TOKENS // 4)
    made = RingMap(softmax_map(Causal(), query, key), owner, owner, 4)
    return SampleMap(made.tile(WHOLE, WHOLE), False, "the causal map, in shards of 4 ranks", (12, 24, 36))


def _differential() -> SampleMap:
    query, key = tokens()
    heading = key[0]
    other = softmax_map(Causal(), np.broadcast_to(0.7 * heading, query.shape).copy(), key)
    made = DifferenceMap(softmax_map(Causal(), query, key), other, 0.6)
    return SampleMap(
        made.tile(WHOLE, WHOLE), True, "one map less 0.6 of another: red is taken away, rows sum to 0.4"
    )


def _neighborhood() -> SampleMap:
    query, key = tokens(SIDE**2)
    area = Neighborhood((SIDE, SIDE), (3, 3), (1, 1), (1, 1), (False, False))
    rows = np.arange(SIDE**2)
    scores = np.where(area.allowed(rows, rows), query @ key.T * SCALE, -np.inf)
    made = NeighborhoodMap(query, key, _lse(scores), SCALE, area)
    return SampleMap(
        made.tile(WHOLE, WHOLE),
        False,
        "7 × 7 pixels, 3 × 3 neighbours: a corner also sees nine",
        tuple(range(7, 49, 7)),
    )


def _experts() -> SampleMap:
    query, key = tokens()
    gates = 1 / (1 + np.exp(-np.stack([key[:, :4], query[:, :4]])))
    chosen = gates * (gates >= np.sort(gates, axis=2)[:, :, -2:-1])
    made = ExpertMap(softmax_map(Causal(), query, key), chosen[0], chosen[1])
    contribution = made.contribution(WHOLE, WHOLE, source=0, destination=1)
    return SampleMap(
        contribution,
        False,
        "value expert 0 into output expert 1: gates pick rows and columns",
    )


_CAUSAL = _softmax(Causal(), "the causal map: each query over all tokens before it")
_MAKERS: dict[str, Callable[[], SampleMap]] = {
    "multi_head": _CAUSAL,
    "self": _softmax(Full(), "not causal: every token over every other"),
    "cross": _cross,
    "flash": _softmax(Causal(), "the same map as multi-head's, met in tiles", (16, 32)),
    "linear": _linear,
    "sparse": _sparse,
    "sliding_window": _softmax(Window(11), "the last 12 keys of each query"),
    "efficient": _efficient,
    "grouped_query": _softmax(Causal(), "one query head's map; its keys are shared by the group"),
    "multi_head_latent": _softmax(Causal(), "one head's map, from keys rebuilt from the latent"),
    "paged": _softmax(Causal(), "in logical order, pages of 16 tokens", (16, 32)),
    "flash_attention_3": _softmax(Causal(), "the same map as FlashAttention's, on Hopper", (16, 32)),
    "ring": _ring,
    "differential": _differential,
    "neighborhood": _neighborhood,
    "switch_head": _experts,
    "chunked_prefill": _softmax(Causal(), "the same map, in row blocks of 16 tokens", (16, 32)),
}
