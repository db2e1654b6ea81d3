"""The same numbers from another home or in another order: pages, a ring of ranks, chunks of a prompt, of everything."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnlab_kernels.operations.paged.reference import gather, walk
from attnlab_kernels.operations.ring.attention import ring_attend
from attnlab_kernels.operations.ring.link import Ring
from attnlab_kernels.operations.ring.shards import join, split
from attnlab_kernels.operations.softmax import chunked
from attnlab_kernels.operations.softmax.api import Unsupported, attend
from attnlab_kernels.operations.softmax.support import Modifiers
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.paged_cache import OutOfBlocks, PagedKV

from .softmax import (
    Attended,
    ModelCall,
    Swap,
    causal_band,
    element_mask,
    only_auto,
    softmax_attended,
    softmax_reference,
)


@dataclass(eq=False)
class PagedSwap(Swap):
    """Keys and values go into the blocks of a pool and are found again through a table (Kwon et al. 2023).

    A sequence keeps its blocks from one forward to the next: what a decoded token adds is one append. One query
    walks the blocks; a prompt gathers them and attends by ``implementation``. Each attention has a pool of its own,
    which holds no more blocks than the tokens at hand need, and never more than ``num_blocks``.
    """

    block_size: int = 16
    num_blocks: int = 1024
    _pages: dict[str, PagedKV] = field(default_factory=dict, init=False, repr=False)

    def attend(self, call: ModelCall) -> Attended:
        call.plain("paged")
        call = self.pooled(call)
        key, value = call.key, call.value
        if key.shape != value.shape:
            raise Unsupported(
                f"paged: keys and values must be of one size; {call.name} has {key.shape[3]} and {value.shape[3]}"
            )
        made = self._run(call)
        attended = softmax_attended(call, key, value, call.mask, made, again=lambda: self._run(call))
        table = self._pages[call.name].table(0)
        reference = softmax_reference(call, key, value)
        return attended.told("paged", reference, block_size=self.block_size, block_table=table)

    def _run(self, call: ModelCall) -> AttentionOutput:
        try:
            pages = self._filled(call)
        except OutOfBlocks as error:
            raise Unsupported(f"paged: num_blocks: {error}") from error
        results = [self._sequence(call, pages, index) for index in range(call.query.shape[0])]
        outputs, sums = (torch.stack(part) for part in zip(*(pair[:2] for pair in results), strict=True))
        return AttentionOutput(outputs, lse=sums, aux=results[0][2])

    def _filled(self, call: ModelCall) -> PagedKV:
        batch, heads, tokens, size = call.key.shape
        names = range(batch)
        needed = batch * -(-tokens // self.block_size)
        pages = self._pages.get(call.name)
        if (
            pages is None
            or pages.sequences != tuple(names)
            or pages.pool.num_blocks < min(needed, self.num_blocks)
        ):
            pages = PagedKV(min(self.num_blocks, needed + batch), self.block_size, heads, size)
            self._pages[call.name] = pages
            for name in names:
                pages.open(name)
        # what this forward has made is new; a forward that is repeated forgets what it wrote the first time
        past = 0 if call.cross else min(tokens - call.query.shape[2], pages.length(0))
        for name in names:
            pages.crop(name, max(past, 0))
        rows = [
            [tensor[b, :, max(past, 0) :].transpose(0, 1) for b in names] for tensor in (call.key, call.value)
        ]
        pages.append(0, list(names), *rows)
        return pages

    def _sequence(
        self, call: ModelCall, pages: PagedKV, index: int
    ) -> tuple[Tensor, Tensor, dict[str, object]]:
        table, length, query = pages.table(index), pages.length(index), call.query[index]
        pools, mask = pages.pools(), element_mask(call.mask, index)
        if query.shape[1] == 1 and self.implementation == "auto":
            output, lse = walk(query, *pools, table, length, mask=mask, scale=call.scale)
            return (
                output,
                lse,
                {"implementation": "paged walk", "reason": "auto: one query, block after block"},
            )
        key, value = (gather(pool, table, length)[None] for pool in pools)
        made = attend(
            query[None], key, value, mask=mask, scale=call.scale, implementation=self.implementation
        )
        assert made.lse is not None
        name = str(made.aux["implementation"])
        reason = f"blocks gathered to one piece; {made.aux['reason']}"
        return made.output[0], made.lse[0], {"implementation": name, "reason": reason}


@dataclass(eq=False)
class RingSwap(Swap):
    """Shards of the tokens on simulated ranks; keys and values go round, parts merge by log-sum-exp."""

    ring_size: int = 4
    layout: str = "contiguous"
    block_size: int | None = None
    """keys of a rank that meet its guests at a time; None: all"""

    def attend(self, call: ModelCall) -> Attended:
        call.plain("ring")
        only_auto("ring", self.implementation, "ring")
        causal = causal_band(call, "ring")
        call = self.pooled(call)
        made = self._run(call, causal)
        attended = softmax_attended(
            call, call.key, call.value, call.mask, made, again=lambda: self._run(call, causal)
        )
        reference = softmax_reference(call, call.key, call.value)
        return attended.told("ring", reference, ring_size=self.ring_size, layout=self.layout)

    def _run(self, call: ModelCall, causal: bool) -> AttentionOutput:
        length, tokens = call.query.shape[2], call.key.shape[2]
        cut = {"size": self.ring_size, "layout": self.layout}
        queries, positions = split(call.query, dim=2, **cut)
        keys, places = split(call.key, dim=2, **cut)
        values, _ = split(call.value, dim=2, **cut)
        ranges = call.mask.band().ranges
        if ranges is not None:
            limits = torch.tensor(ranges, device=places.device)[None]
            kept = (places[:, None] >= limits[..., :1]) & (places[:, None] < limits[..., 1:])
            places = torch.where(kept, places[:, None], -1)
        # the last query is the last key, and no position is below 0
        ahead, behind = max(tokens - length, 0), max(length - tokens, 0)
        positions = torch.where(positions < 0, positions, positions + ahead)
        places = torch.where(places < 0, places, places + behind)
        ring = Ring(self.ring_size)
        ran = ring_attend(
            queries,
            keys,
            values,
            positions,
            places,
            ring=ring,
            scale=call.scale,
            causal=causal,
            block_size=self.block_size,
        )
        output, lse = (join(part, length=length, layout=self.layout, dim=2) for part in (ran.output, ran.lse))
        met = sum(not tile.skipped for tile in ran.tiles)
        reason = f"{self.ring_size} ranks simulated in this process, {met} of {len(ran.tiles)} tiles met"
        return AttentionOutput(output, lse=lse, aux={"implementation": "ring", "reason": reason})


@dataclass(eq=False)
class ChunkedPrefillSwap(Swap):
    """The queries of a prompt in chunks, each over the keys so far (Agrawal et al. 2023); decoding is one chunk."""

    chunk_size: int = 512

    def attend(self, call: ModelCall) -> Attended:
        if call.cross or call.mask.band().right != 0:
            raise Unsupported(
                f"chunked_prefill: a chunk cannot attend to chunks that have not come yet; {call.name} is not causal"
            )
        call.plain("chunked_prefill")
        call = self.pooled(call)
        made = self._run(call)
        attended = softmax_attended(
            call, call.key, call.value, call.mask, made, again=lambda: self._run(call)
        )
        count = call.query.shape[2]
        chunks = [[start, min(start + self.chunk_size, count)] for start in range(0, count, self.chunk_size)]
        return attended.told("chunked", softmax_reference(call, call.key, call.value), chunks=chunks)

    def _run(self, call: ModelCall) -> AttentionOutput:
        count, past = call.query.shape[2], call.key.shape[2] - call.query.shape[2]
        parts = []
        for start in range(0, count, self.chunk_size):
            stop = min(start + self.chunk_size, count)
            key, value = call.key[:, :, : past + stop], call.value[:, :, : past + stop]
            query = call.query[:, :, start:stop]
            parts.append(
                attend(
                    query, key, value, mask=call.mask, scale=call.scale, implementation=self.implementation
                )
            )
        output = torch.cat([part.output for part in parts], dim=2)
        lse = torch.cat([part.lse for part in parts if part.lse is not None], dim=2)
        # dict.fromkeys: each name once, in order
        name = ", ".join(dict.fromkeys(str(part.aux["implementation"]) for part in parts))
        reason = f"{len(parts)} chunks of at most {self.chunk_size} queries; {parts[-1].aux['reason']}"
        return AttentionOutput(output, lse=lse, aux={"implementation": name, "reason": reason})


@dataclass(eq=False)
class MemoryEfficientSwap(Swap):
    """Chunks of queries meet chunks of keys and merge by a running maximum (Rabe and Staats 2021)."""

    chunk_size: int = 128

    def attend(self, call: ModelCall) -> Attended:
        only_auto("efficient", self.implementation, "chunked")
        made = self._run(call)
        return softmax_attended(call, call.key, call.value, call.mask, made, again=lambda: self._run(call))

    def _run(self, call: ModelCall) -> AttentionOutput:
        others = dict(call.extras)
        bias = others.pop("bias", None)
        output, lse = chunked.run(
            call.query,
            call.key,
            call.value,
            mask=call.mask,
            scale=call.scale,
            chunk=self.chunk_size,
            bias=bias,
            modifiers=Modifiers(**others),
        )
        lse = lse if lse.dtype == torch.float64 else lse.float()
        reason = f"chunks of {self.chunk_size} queries and keys"
        return AttentionOutput(output, lse=lse, aux={"implementation": "chunked", "reason": reason})
