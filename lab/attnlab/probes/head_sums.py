"""Sums over the rows of a layer's maps, a block of rows at a time: what the statistics of its heads are made of."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..views.statistics import COVERED, HEAVY_COLUMNS, LOCAL_BAND, TOP_KEYS
from .token_facts import TokenFacts


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of all heads, over the keys that any of the rows may attend to.

    Attributes:
        weights: float [Hq, rows, keys], not negative, 0 where forbidden.
        allowed: bool [rows, keys].
        start: number of the first row.
        low: number of the first key.
    """

    weights: Tensor
    allowed: np.ndarray
    start: int
    low: int


class HeadSums:
    """Adds up blocks; ``means`` gives each statistic, ``curves`` the rows and columns.

    Args:
        shape: (heads, queries, keys).
        first: the first real key, which a sink sits on.
        tokens: what is known of the tokens, if anything.
        value_norm: [Hq, keys] norms of the values, if there are any.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        first: int,
        tokens: TokenFacts | None,
        value_norm: Tensor | None,
        device: torch.device,
    ) -> None:
        self.heads, self.queries, self.keys = shape
        self.first = first
        self.tokens = tokens
        self.value_norm = value_norm
        self.device = device
        self.totals: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.row_entropy = torch.zeros(self.heads, self.queries, dtype=torch.float64, device=device)
        self.column_mass = torch.zeros(self.heads, self.keys, dtype=torch.float64, device=device)
        self.live = np.zeros(self.queries, bool)
        self._copied = torch.zeros(self.heads, self.keys, dtype=torch.bool, device=device)

    def add(self, block: Block) -> None:
        """Take in some rows; each row of a head is divided by its own sum."""
        live = np.asarray(block.allowed.any(axis=1))
        self.live[block.start : block.start + live.size] = live
        if not live.any():
            return
        rows = torch.from_numpy(np.flatnonzero(live)).to(self.device)
        allowed = block.allowed[live]
        weights = block.weights if live.all() else block.weights[:, rows]
        total = weights.sum(-1)
        place = rows + block.start
        scale = 1 / torch.where(total > 0, total, 1)
        self._spread(weights, scale, allowed, place)
        self._places(weights, scale, allowed, place, block.low)
        self._patterns(weights, scale, allowed, place, block.low)
        self._sorted(weights, scale, allowed)
        self._values(weights, scale, block.low)
        if self.tokens is not None and self.tokens.needle and self.tokens.answer:
            self._needle(weights, scale, place, block.low)

    def means(self) -> dict[str, Tensor]:
        """Mean of each statistic that any row has: float64 [Hq]."""
        found = {name: total / self.rows[name] for name, total in self.totals.items() if self.rows[name]}
        if self.rows.get("entropy"):
            heavy = self.column_mass.topk(min(HEAVY_COLUMNS, self.keys), dim=1).values.sum(1)
            found["heavy_hitter_mass"] = heavy / self.rows["entropy"]
        if "needle_mass" in found and self.tokens is not None and self.tokens.needle:
            start, stop = self.tokens.needle
            found["retrieval"] = self._copied[:, start:stop].double().mean(1)
        return found

    def heavy_columns(self, head: int) -> tuple[list[int], list[float]]:
        """The heaviest columns of a head, the heaviest first, and the mean weight that each receives."""
        mass, columns = self.column_mass[head].topk(min(HEAVY_COLUMNS, self.keys))
        return columns.tolist(), (mass / max(1, self.rows.get("entropy", 0))).tolist()

    def _count(self, name: str, values: Tensor, rows: int | None = None) -> None:
        """Add values [Hq, rows]."""
        if values.shape[1] == 0:
            return
        added = values.sum(1, dtype=torch.float64)
        self.totals[name] = self.totals.get(name, 0) + added
        self.rows[name] = self.rows.get(name, 0) + values.shape[1]

    def _spread(self, weights: Tensor, scale: Tensor, allowed: np.ndarray, place: Tensor) -> None:
        tiny = torch.finfo(weights.dtype).tiny
        # with p = w / s: H = ln s - sum w ln w / s
        raw = -torch.linalg.vecdot(weights, weights.clamp_min(tiny).log_())
        entropy = (raw * scale - scale.log()).clamp_min_(0).double()
        squares = torch.linalg.vecdot(weights, weights).double() * scale.double().square()
        sizes = torch.from_numpy(allowed.sum(1)).to(self.device).double()
        several = sizes > 1
        self.row_entropy[:, place] = entropy
        self._count("entropy", entropy)
        self._count("normalized_entropy", entropy[:, several] / sizes[several].log())
        self._count("effective_tokens", entropy.exp())
        self._count("participation_ratio", 1 / squares)
        self._count("max_weight", weights.amax(-1) * scale)
        root = sizes[several].sqrt()
        self._count("hoyer", (root - squares[:, several].rsqrt()) / (root - 1))

    def _places(self, weights: Tensor, scale: Tensor, allowed: np.ndarray, place: Tensor, low: int) -> None:
        """Weights at one key a row: the first, the one before, the row's own. And the sums of the columns."""
        high = low + weights.shape[2]
        if low <= self.first < high:
            self._count("sink_mass", weights[:, :, self.first - low] * scale)
        else:
            self._count("sink_mass", torch.zeros_like(scale))
        position = place + self.keys - self.queries
        for name, key in (("previous_token", position - 1), ("self_token", position)):
            inside = ((key >= low) & (key < high)).cpu().numpy()
            index = np.where(inside, key.cpu().numpy() - low, 0)
            there = torch.from_numpy(inside & allowed[np.arange(len(index)), index]).to(self.device)
            index = (key[there] - low).expand(self.heads, -1)[..., None]
            self._count(name, weights[:, there].gather(2, index)[..., 0] * scale[:, there])
        # a vector times a matrix: no scaled copy of the block
        self.column_mass[:, low:high] += torch.bmm(scale[:, None], weights)[:, 0].double()

    def _patterns(self, weights: Tensor, scale: Tensor, allowed: np.ndarray, place: Tensor, low: int) -> None:
        """Sums of the weights times a matrix that all heads share: [rows, patterns, keys]."""
        position = (place + self.keys - self.queries).cpu().numpy()[:, None]
        keys = np.arange(low, low + weights.shape[2])[None]
        distance = np.abs(position - keys)
        patterns = {"mean_distance": distance, "local_mass": distance < LOCAL_BAND}
        if self.tokens is not None:
            ids = self.tokens.ids
            own = ids[position]
            before = ids[np.maximum(keys - 1, 0)]
            patterns["duplicate_token"] = (ids[keys] == own) & (keys < position)
            patterns["induction"] = (before == own) & (keys >= 1) & (keys <= position)
        stacked = torch.from_numpy(np.stack([matrix.astype(np.float32) for matrix in patterns.values()], 1))
        stacked = stacked.to(weights.device, weights.dtype)
        found = torch.bmm(weights.transpose(0, 1), stacked.transpose(1, 2)) * scale.T[..., None]
        for column, (name, matrix) in enumerate(patterns.items()):
            having = slice(None)
            if name in ("duplicate_token", "induction"):
                having = torch.from_numpy(np.flatnonzero((matrix & allowed).any(1))).to(self.device)
            self._count(name, found[having, :, column].T)

    def _sorted(self, weights: Tensor, scale: Tensor, allowed: np.ndarray) -> None:
        """What needs the weights of a row in order."""
        ordered = _sort(weights)
        width = ordered.shape[2]
        sizes = torch.from_numpy(allowed.sum(1)).to(self.device, torch.float64)
        rank = torch.arange(1, width + 1, dtype=weights.dtype, device=weights.device)
        # forbidden keys are zeros, so they come first and count as no rank
        ranked = (ordered @ rank).double() * scale - (width - sizes)
        self._count("gini", 2 * ranked / sizes - (sizes + 1) / sizes)
        self._count("top_mass", ordered[..., -TOP_KEYS:].sum(-1) * scale)
        # what stays below when the largest are taken away one by one
        left = ordered.cumsum(-1)
        spare = (1 - COVERED) / scale
        skipped = torch.searchsorted(left, spare[..., None], right=True)[..., 0]
        self._count("coverage_keys", (width - skipped).double())

    def _values(self, weights: Tensor, scale: Tensor, low: int) -> None:
        if self.value_norm is None:
            return
        high = low + weights.shape[2]
        norms = self.value_norm[:, low:high].to(weights.dtype)
        weighted = torch.bmm(weights, norms[..., None])[..., 0] * scale
        self._count("value_weighted_norm", weighted)
        share = torch.zeros_like(weighted)
        if low <= self.first < high:
            first = weights[:, :, self.first - low] * scale * norms[:, self.first - low, None]
            share = first / weighted.clamp_min(torch.finfo(weights.dtype).tiny)
        self._count("value_weighted_sink", share)

    def _needle(self, weights: Tensor, scale: Tensor, place: Tensor, low: int) -> None:
        assert self.tokens is not None
        assert self.tokens.needle is not None
        assert self.tokens.answer is not None
        start, stop = self.tokens.answer
        position = place + self.keys - self.queries
        # a row predicts the token after its own
        asked = torch.nonzero((position + 1 >= start) & (position + 1 < stop))[:, 0]
        if not len(asked):
            return
        first, last = (min(max(edge - low, 0), weights.shape[2]) for edge in self.tokens.needle)
        chosen = weights[:, asked]
        self._count("needle_mass", chosen[..., first:last].sum(-1) * scale[:, asked])
        top = chosen.argmax(-1) + low
        ids = torch.from_numpy(self.tokens.ids).to(self.device)
        right = ids[top] == ids[position[asked] + 1]
        for head in range(self.heads):
            self._copied[head, top[head, right[head]]] = True


def _sort(weights: Tensor) -> Tensor:
    """Ascending along the keys. On the CPU by numpy, which sorts floats some twenty times as fast."""
    if weights.device.type != "cpu":
        return weights.sort(-1).values
    return torch.from_numpy(np.sort(weights.detach().numpy(), axis=-1))
