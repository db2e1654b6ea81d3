"""The tensors of a served cache, and where a step's tokens go in them: read once a step, used by every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.block_tables import BlockTables
from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.paged.api import attend_paged
from attnlab_kernels.operations.paged.write import write_cache
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.scheduler import Work

from .engine import CacheShape


@dataclass(frozen=True)
class StepPlan:
    """A batch as tensors: S sequences with T new tokens end to end."""

    positions: Tensor
    """int64 ``[T]``, of each token in its own sequence"""
    slots: Tensor
    """int64 ``[T]``, counted over the pool"""
    tables: Tensor
    """int32 ``[S, most]``"""
    lengths: Tensor
    """int32 ``[S]``, tokens of each sequence, the new ones included"""
    query_starts: Tensor
    """int32 ``[S + 1]``"""

    @classmethod
    def of(cls, batch: Sequence[Work], tables: BlockTables, device: torch.device) -> StepPlan:
        """The plan of a batch whose blocks are held."""
        ends = [work.start + work.tokens for work in batch]
        blocks = [
            tables.table(work.seq_id)[: tables.blocks_for(end)] for work, end in zip(batch, ends, strict=True)
        ]
        most = max(len(row) for row in blocks)
        starts = [0]
        for work in batch:
            starts.append(starts[-1] + work.tokens)
        places = [place for work, end in zip(batch, ends, strict=True) for place in range(work.start, end)]
        slots = [
            slot
            for work, end in zip(batch, ends, strict=True)
            for slot in tables.slots(work.seq_id, work.start, end)
        ]
        integers = {"dtype": torch.int32, "device": device}
        return cls(
            torch.tensor(places, device=device),
            torch.tensor(slots, device=device),
            torch.tensor([row + [0] * (most - len(row)) for row in blocks], **integers),
            torch.tensor(ends, **integers),
            torch.tensor(starts, **integers),
        )


class Row(NamedTuple):
    """What one layer keeps of a token: numbers of the key heads, and of the values where they are not part of them."""

    heads: int
    key_dim: int
    value_dim: int
    """0: the values are the first numbers of the keys, as with latents"""

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


class LayerPool:
    """Keys and values of one layer, ``[num_blocks, block_size, Hkv, D]``; slots without a token hold anything."""

    def __init__(self, row: Row, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        # not zeros: what no token was written to must never be read
        sizes = (shape.num_blocks, shape.block_size, row.heads)
        self.keys = torch.empty(*sizes, row.key_dim, dtype=dtype, device=device)
        self.values = (
            torch.empty(*sizes, row.value_dim, dtype=dtype, device=device) if row.value_dim else None
        )
        self.latest: dict[str, Callable[[], object]] | None = None
        """where it is a dict: the last attention of a step with a prompt and of one without, to be run again"""

    def write(self, plan: StepPlan, keys: Tensor, values: Tensor | None = None) -> None:
        """Put new keys ``[T, Hkv, D]`` and values ``[T, Hkv, Dv]`` into their slots."""
        if values is None:
            write_cache(keys, keys[..., :0], self.keys, self.keys[..., :0], plan.slots)
        else:
            assert self.values is not None
            write_cache(keys, values, self.keys, self.values, plan.slots)

    def attend(
        self,
        plan: StepPlan,
        query: Tensor,
        *,
        scale: float,
        mask: Mask | None = None,
        value_dim: int | None = None,
        implementation: str = "auto",
        **extras: Any,
    ) -> AttentionOutput:
        """Attention of ``[T, Hq, D]`` to its own sequence; ``value_dim`` where the keys hold the values."""
        values = self.keys[..., :value_dim] if self.values is None else self.values
        attention = partial(
            attend_paged,
            query,
            self.keys,
            values,
            plan.tables,
            plan.lengths,
            query_starts=plan.query_starts,
            mask=mask,
            scale=scale,
            implementation=implementation,
            **extras,
        )
        if self.latest is not None:
            self.latest["decode" if len(query) == len(plan.lengths) else "prompt"] = attention
        return attention()


def open_pools(
    rows: Sequence[Row], shape: CacheShape, dtype: torch.dtype, device: torch.device
) -> list[LayerPool]:
    """A pool of each layer; that of the middle one keeps its latest attention."""
    pools = [LayerPool(row, shape, dtype, device) for row in rows]
    pools[len(pools) // 2].latest = {}
    return pools


def latest_attention(pools: Sequence[LayerPool]) -> dict[str, Callable[[], object]]:
    """What the middle layer computed last, by the kind of its step: ``prompt``, ``decode``."""
    return dict(pools[len(pools) // 2].latest or {})
