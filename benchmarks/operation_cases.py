"""The cases of ``operations.py``: each operation on one shape, what a user would reach for, and all that we have."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attnlab_kernels.masks import Causal, Documents, Full, Mask, Window
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.differential import api as differential
from attnlab_kernels.operations.linear import api as linear
from attnlab_kernels.operations.neighborhood import api as neighborhood
from attnlab_kernels.operations.paged import api as paged
from attnlab_kernels.operations.softmax import api as softmax
from attnlab_kernels.operations.sparse import api as sparse
from attnlab_kernels.patterns import BigBird, Fixed, Local, Longformer, Pattern, Strided

Call = Callable[[], Tensor]
PAGE, CHUNK, SEQUENCES = 16, 256, 4


@dataclass
class Case:
    """One operation on one shape; ``right`` names the baseline that all others have to agree with."""

    name: str
    limit: float
    right: str
    theirs: dict[str, Call]
    ours: dict[str, Call]
    absent: dict[str, str] = field(default_factory=dict)
    """baselines that cannot run here, and why"""


Build = Callable[[str], Case]


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The grid, or what was asked for of it; tensors, masks and compiled kernels are made when their case is due."""
    for length in options.lengths:
        for name, build in planned(options, length, device):
            if not options.cases or any(word in name for word in options.cases):
                yield build(name)


def planned(options: argparse.Namespace, length: int, device: torch.device) -> Iterator[tuple[str, Build]]:
    """The cases of this length by name, not built yet."""

    def made(tokens: int = length) -> list[Tensor]:
        size = (1, options.heads, tokens, options.head_dim)
        return [torch.randn(size, device=device, dtype=getattr(torch, options.dtype)) for _ in range(3)]

    words, flex, side = f"{length:,} tokens", options.flex, int(length**0.5)
    for mask in masks(length):
        yield (
            f"{mask.describe()}, {words}",
            lambda name, mask=mask: softmax_case(name, mask, length, made(), flex),
        )
    last = f"causal, {words}, the last {CHUNK}"
    yield last, lambda name: softmax_case(name, Causal(), CHUNK, made(), flex)
    for pattern in patterns():
        yield f"{pattern.describe()}, {words}", lambda name, it=pattern: sparse_case(name, it, made(), flex)
    pixels = f"neighborhood 7 x 7, {side} x {side} pixels"
    yield pixels, lambda name: neighborhood_case(name, side, made(side * side), flex)
    yield f"linear, causal, {words}", lambda name: linear_case(name, made())
    yield f"paged, a prompt, {words}", lambda name: paged_case(name, False, made())
    decode = f"paged, decoding {SEQUENCES} sequences, {words}"
    yield decode, lambda name: paged_case(name, True, made(SEQUENCES * length))
    yield f"differential, causal, {words}", lambda name: differential_case(name, made(), made())


def masks(length: int) -> list[Mask]:
    """Dense ones first."""
    return [Full(), Causal(), Window(255), Causal() & Documents([length // 4] * 4)]


def patterns() -> list[Pattern]:
    return [
        Local(True, 256),
        Strided(True, 64),
        Fixed(True, 64, 4),
        Longformer(True, 256, 16),
        BigBird(True, 64, 3),
    ]


def softmax_case(name: str, mask: Mask, queries: int, tensors: list[Tensor], flex: bool) -> Case:
    """Self-attention, or the last ``queries`` of a prompt."""
    q, k, v = tensors
    tokens = k.shape[2]
    q = q[:, :, -queries:].contiguous()
    theirs: dict[str, Call]
    if mask == Full() or (mask == Causal() and queries == tokens):
        right, limit = "sdpa", 1.1
        theirs = {right: partial(scaled_dot_product_attention, q, k, v, is_causal=mask == Causal())}
    else:
        right, limit = "sdpa, dense mask", 1.1 if mask == Causal() else 1.0
        rows = np.arange(queries), np.arange(tokens)
        dense = torch.from_numpy(mask.allowed(*rows, num_queries=queries, num_keys=tokens)).to(q.device)
        theirs = {right: partial(scaled_dot_product_attention, q, k, v, attn_mask=dense)}
    if flex:
        from attnlab_kernels.operations.softmax.flex import block_mask

        theirs["compiled flex"] = compiled_flex(q, k, v, block_mask(mask, 1, queries, tokens, q.device))

    def ours(name: str) -> Tensor:
        return softmax.attend(q, k, v, mask=mask, implementation=name).output

    names = [name for name in softmax.IMPLEMENTATIONS if name not in ("eager", "sdpa_math", "flex")]
    return Case(name, limit, right, theirs, each(ours, names))


def sparse_case(name: str, pattern: Pattern, tensors: list[Tensor], flex: bool) -> Case:
    q, k, v = tensors
    tokens, heads = q.shape[2], q.shape[1]
    rows = np.arange(tokens)
    count = heads if isinstance(pattern, BigBird) else 1
    parts = [pattern.allowed(rows, rows, num_keys=tokens, head=head) for head in range(count)]
    dense = torch.from_numpy(np.stack(parts)).to(q.device)

    def ours(name: str) -> Tensor:
        return sparse.sparse_attend(q, k, v, pattern, implementation=name).result.output

    theirs = masked(q, k, v, dense, flex)
    return Case(name, 1.0, "sdpa, dense mask", theirs, each(ours, sparse.IMPLEMENTATIONS))


def neighborhood_case(name: str, side: int, tensors: list[Tensor], flex: bool) -> Case:
    windows = Neighborhood((side, side), (7, 7), (1, 1), (1, 1), (False, False))
    pixels = np.arange(side * side)
    dense = torch.from_numpy(windows.allowed(pixels, pixels)).to(tensors[0].device)
    q, k, v = tensors
    grids = [part.unflatten(2, (side, side)) for part in tensors]
    theirs, absent = masked(q, k, v, dense[None], flex), {}
    try:
        from natten.functional import na2d  # pyright: ignore[reportMissingImports]
    except ImportError:
        absent["natten"] = "not installed"
    else:
        swapped = [part.permute(0, 2, 3, 1, 4) for part in grids]
        theirs["natten"] = lambda: na2d(*swapped, kernel_size=7).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def ours(name: str) -> Tensor:
        made = neighborhood.neighborhood_attend(grids[0], grids[1], grids[2], windows, implementation=name)
        return made.result.output.flatten(2, 3)

    names = [name for name in neighborhood.IMPLEMENTATIONS if name != "natten"]
    return Case(name, 1.0, "sdpa, dense mask", theirs, each(ours, names), absent)


def linear_case(name: str, tensors: list[Tensor]) -> Case:
    q, k, v = (part.abs() for part in tensors)

    def product() -> Tensor:
        scores = torch.tril(q @ k.transpose(-1, -2))
        return scores @ v / scores.sum(-1, keepdim=True)

    def ours(name: str) -> Tensor:
        return linear.linear_attend(q, k, v, causal=True, form=name).output

    theirs, absent = {"masked product": product}, {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fla says that Triton is slow on a CPU
            from fla.ops.linear_attn.naive import naive_chunk_linear_attn
    except ImportError:
        absent["fla, naive chunks"] = "not installed"
    else:
        # [B, n, H, D]
        turned = [part.transpose(1, 2).contiguous() for part in (q, k, v)]

        def chunks() -> Tensor:
            # annotated as a pair, it is a tensor
            made = naive_chunk_linear_attn(*turned, scale=1.0, normalize=True)
            return made.transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]

        theirs["fla, naive chunks"] = chunks
    return Case(name, 1.0, "masked product", theirs, each(ours, linear.IMPLEMENTATIONS), absent)


def paged_case(name: str, decode: bool, tensors: list[Tensor]) -> Case:
    """One prompt, or a step of several sequences, over blocks in any order against gathering them for SDPA."""
    q, key, value = (part[0].transpose(0, 1) for part in tensors)  # [T, H, D]
    pools = [part.contiguous().unflatten(0, (-1, PAGE)) for part in (key, value)]
    count = SEQUENCES if decode else 1
    tables = torch.randperm(len(pools[0])).reshape(count, -1).to(q.device)
    tokens = tables.shape[1] * PAGE
    lengths = torch.full((count,), tokens, dtype=torch.int32, device=q.device)
    fresh = 1 if decode else tokens
    q = q[: count * fresh].contiguous()
    starts = torch.arange(count + 1, dtype=torch.int32, device=q.device) * fresh

    def gathered() -> Tensor:
        k, v = (pool[tables].flatten(1, 2).transpose(1, 2) for pool in pools)
        query = q.unflatten(0, (count, fresh)).transpose(1, 2)
        return scaled_dot_product_attention(query, k, v, is_causal=not decode).transpose(1, 2).flatten(0, 1)

    def ours(name: str) -> Tensor:
        called = (q, pools[0], pools[1], tables.int(), lengths)
        return paged.attend_paged(*called, query_starts=starts, implementation=name).output

    return Case(name, 1.1, "gather, sdpa", {"gather, sdpa": gathered}, each(ours, paged.IMPLEMENTATIONS))


def differential_case(name: str, tensors: list[Tensor], others: list[Tensor]) -> Case:
    (q, k, v), (q2, k2, _) = tensors, others
    query, key = differential.Pair(q, q2), differential.Pair(k, k2)
    weight = torch.tensor(0.3, device=q.device)

    def twice() -> Tensor:
        first, second = (scaled_dot_product_attention(a, b, v, is_causal=True) for a, b in ((q, k), (q2, k2)))
        return first - 0.3 * second

    def ours(name: str) -> Tensor:
        made = differential.difference_attend(query, key, v, weight, mask=Causal(), implementation=name)
        return made.output

    names = [name for name in differential.IMPLEMENTATIONS if name != "maps"]
    return Case(name, 1.1, "two calls of sdpa", {"two calls of sdpa": twice}, each(ours, names))


def masked(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, flex: bool) -> dict[str, Call]:
    """SDPA with this mask bool ``[1 | H, n, n]``, and FlexAttention that looks its pairs up in it."""
    theirs: dict[str, Call] = {
        "sdpa, dense mask": partial(scaled_dot_product_attention, q, k, v, attn_mask=dense[None])
    }
    if flex:
        heads, tokens = dense.shape[:2]

        def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return dense[head, row, column]

        def seen_by_all(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return dense[row, column]

        # a number among the indices is C++ that does not compile
        dense = dense if heads > 1 else dense[0]
        mask = seen if heads > 1 else seen_by_all
        blocks = create_block_mask(mask, None, heads if heads > 1 else None, tokens, tokens, q.device.type)
        theirs["compiled flex"] = compiled_flex(q, k, v, blocks)
    return theirs


def compiled_flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask | None) -> Call:
    """FlexAttention through torch.compile, with the blocks of the mask made beforehand."""
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=blocks)  # pyright: ignore[reportReturnType]


def each(call: Callable[[str], Tensor], names: Iterable[str]) -> dict[str, Call]:
    """What ``auto`` runs, and every implementation by its name."""
    return {name: partial(call, name) for name in ("auto", *names)}
