"""What a model does to its scaled scores besides the mask: soft cap, ALiBi, a bias, sinks. Of batch element 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage.results import TraceRow

from ..views.trace_map import SCORE_BIAS, score_facts

DENSE_BIAS_CELLS = 1 << 22
"""largest bias that is kept whole; one of the distance alone is kept as a table, however long"""


@dataclass(frozen=True, eq=False)
class ScoreRules:
    """The order is that of ``attend``: soft cap, ALiBi, bias; a sink joins the sum."""

    num_queries: int
    num_keys: int
    softcap: float | None = None
    alibi: Tensor | None = None
    """[Hq]"""
    sinks: Tensor | None = None
    """[Hq]"""
    bias: Tensor | None = None
    """[Hq, Sq, Sk]"""
    table: Tensor | None = None
    """[Hq, Sq + Sk - 1]: a bias of the distance ``j - p`` alone, from ``-(Sk - 1)`` on"""

    def detail(self) -> dict[str, Any]:
        """As JSON, the tensors of ``stored`` aside."""
        told: dict[str, Any] = {}
        if self.softcap is not None:
            told["softcap"] = self.softcap
        for name in ("alibi", "sinks"):
            tensor = getattr(self, name)
            if tensor is not None:
                told[name] = tensor.double().tolist()
        if self.table is not None or self.bias is not None:
            told["bias"] = "dense" if self.table is None else "by_distance"
        return told

    def stored(self) -> dict[str, Tensor]:
        """The tensor with a head axis that a trace keeps beside its queries and keys, by name."""
        kept = self.bias if self.table is None else self.table
        return {} if kept is None else {SCORE_BIAS: kept}

    def apply(self, scores: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Change scaled scores [Hq, rows, cols] in place."""
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.alibi is None and self.table is None and self.bias is None:
            return scores
        distance = cols - (rows[:, None] + self.num_keys - self.num_queries)
        if self.alibi is not None:
            scores -= self.alibi.to(scores)[:, None, None] * distance.abs()
        if self.table is not None:
            scores += self.table.to(scores)[:, distance + self.num_keys - 1]
        elif self.bias is not None:
            scores += self.bias.to(scores.device)[:, rows][:, :, cols].to(scores)
        return scores

    def with_sinks(self, lse: Tensor) -> Tensor:
        """The log-sum-exp [Hq, rows] with each head's sink in its sum."""
        if self.sinks is None:
            return lse
        return torch.logaddexp(lse, self.sinks.to(lse)[:, None])

    def of_head(self, head: int) -> ScoreRules:
        """The rules of one head, its axis kept."""
        kept = slice(head, head + 1)
        parts = {name: getattr(self, name) for name in ("alibi", "sinks", "bias", "table")}
        own = {name: part if part is None else part[kept] for name, part in parts.items()}
        return ScoreRules(self.num_queries, self.num_keys, self.softcap, **own)


def rules_of(extras: Mapping[str, Any], heads: int, num_queries: int, num_keys: int) -> ScoreRules:
    """The rules of what a model gives ``attend`` besides tensors, mask and scale.

    Raises:
        Unsupported: a bias that is too large to keep.
    """
    bias = extras.get("bias")
    plain = {name: extras.get(name) for name in ("softcap", "alibi", "sinks")}
    if bias is None:
        return ScoreRules(num_queries, num_keys, **plain)
    bias = bias[(0,) * (bias.ndim - 3)] if bias.ndim > 3 else bias
    bias = bias.expand(heads, num_queries, num_keys)
    if torch.equal(bias[:, 1:, 1:], bias[:, :-1, :-1]):
        # from the last query back to the first over the first key, then along the first row
        table = torch.cat([bias[:, :, 0].flip(1), bias[:, 0, 1:]], dim=1)
        return ScoreRules(num_queries, num_keys, table=table, **plain)
    if bias.numel() > DENSE_BIAS_CELLS:
        raise Unsupported(
            f"record: a bias of {heads} x {num_queries} x {num_keys} is no function of the distance and has more "
            f"than the {DENSE_BIAS_CELLS:,} numbers that a trace may keep of one"
        )
    return ScoreRules(num_queries, num_keys, bias=bias, **plain)


def rules_of_trace(row: TraceRow, stored: Callable[[str, int], np.ndarray]) -> ScoreRules:
    """The same from what was stored; ``stored`` gives a tensor by its name and number of heads."""
    told = score_facts(row)
    kept = {
        name: torch.tensor(told[name], dtype=torch.float64) for name in ("alibi", "sinks") if name in told
    }
    if "bias" in told:
        name = "bias" if told["bias"] == "dense" else "table"
        kept[name] = torch.from_numpy(stored(SCORE_BIAS, row.heads))
    return ScoreRules(row.num_queries, row.num_keys, told.get("softcap"), **kept)
