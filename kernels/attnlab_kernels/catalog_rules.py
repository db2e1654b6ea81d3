"""The rules between a mechanism's parameters, and between them and the sizes of a run. No torch.

What one parameter may be is said by ``Parameter``. The modules hold the same rules; here they can be asked before
there is a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class BrokenRule:
    """A parameter whose value does not go with the others."""

    name: str
    rule: str
    value: Any
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSize:
    """What a bare module is made for and given."""

    dim: int
    num_heads: int
    tokens: int
    batch_size: int = 1
    phase: str = "prefill"


def broken_parameters(mechanism_id: str, parameters: Parameters) -> list[BrokenRule]:
    """Rules that all parameters of a mechanism, defaults filled in, break between themselves."""
    rule = _BETWEEN.get(mechanism_id)
    return [] if rule is None else list(rule(parameters))


def broken_sizes(mechanism_id: str, parameters: Parameters, size: RunSize) -> list[BrokenRule]:
    """Rules that parameters break with the sizes of a run; those between themselves are taken to hold."""
    rule = _WITH_SIZES.get(mechanism_id)
    return [] if rule is None else list(rule(parameters, size))


def _linear(own: Parameters) -> Iterator[BrokenRule]:
    random = own["variant"] == "kernel" and own["feature_map"] == "softmax_kernel"
    if own["num_features"] is not None and own["variant"] == "kernel" and not random:
        rule = f"must not be given: it is for feature_map softmax_kernel, not {own['feature_map']}"
        yield BrokenRule("num_features", rule, own["num_features"])


def _sparse(own: Parameters) -> Iterator[BrokenRule]:
    pattern, window = own["sparsity_pattern"], own["local_window"]
    if pattern == "longformer" and (window < 2 or window % 2):
        rule = "must be even and at least 2 for longformer, half on each side"
        yield BrokenRule("local_window", rule, window, _evens(window))
    if pattern == "bigbird" and own["sliding_blocks"] % 2 == 0:
        blocks = own["sliding_blocks"]
        rule = "must be odd, the query's own in the middle"
        yield BrokenRule("sliding_blocks", rule, blocks, (str(blocks - 1), str(blocks + 1)))
    if pattern == "fixed" and own["summary_tokens"] > own["stride"]:
        rule = f"must be at most stride ({own['stride']})"
        yield BrokenRule("summary_tokens", rule, own["summary_tokens"], _up_to(own["stride"]))


def _latent(own: Parameters) -> Iterator[BrokenRule]:
    width = own["qk_rope_head_dim"]
    if width % 2:
        yield BrokenRule("qk_rope_head_dim", "must be even: it turns in pairs", width, _evens(width))


def _neighborhood(own: Parameters) -> Iterator[BrokenRule]:
    if own["stride"] > own["kernel_size"]:
        rule = f"must be at most kernel_size ({own['kernel_size']})"
        yield BrokenRule("stride", rule, own["stride"], _up_to(own["kernel_size"]))


def _switch_head(own: Parameters) -> Iterator[BrokenRule]:
    if own["top_k"] > own["num_experts"]:
        rule = f"must be at most num_experts ({own['num_experts']})"
        yield BrokenRule("top_k", rule, own["top_k"], _up_to(own["num_experts"]))


def _linear_sizes(own: Parameters, size: RunSize) -> Iterator[BrokenRule]:
    if own["variant"] == "linformer" and size.tokens > own["max_seq_length"]:
        rule = f"must be at least the {size.tokens} tokens: Linformer learns a row for each"
        yield BrokenRule("max_seq_length", rule, own["max_seq_length"])


def blocks_needed(tokens: int, batch_size: int, block_size: int, *, decoding: bool = False) -> int:
    """Blocks of a pool that so many sequences fill.

    Args:
        decoding: each is decoded from a copy of its cache, which writes into a block of its own.
    """
    copied = batch_size if decoding and (tokens - 1) % block_size else 0
    return batch_size * -(-tokens // block_size) + copied


def _paged_sizes(own: Parameters, size: RunSize) -> Iterator[BrokenRule]:
    needed = blocks_needed(size.tokens, size.batch_size, own["block_size"], decoding=size.phase == "decode")
    if own["num_blocks"] < needed and size.phase != "train":
        rule = f"must be at least {needed}: {size.batch_size} x {size.tokens} tokens in blocks of {own['block_size']}"
        yield BrokenRule("num_blocks", rule, own["num_blocks"])


def _ring_sizes(own: Parameters, size: RunSize) -> Iterator[BrokenRule]:
    if own["ring_size"] > size.tokens:
        yield BrokenRule("ring_size", f"must be at most the {size.tokens} tokens", own["ring_size"])


def _differential_sizes(own: Parameters, size: RunSize) -> Iterator[BrokenRule]:
    if own["variant"] == "v1" and size.dim % (2 * size.num_heads):
        rule = f"must be v2, or dim ({size.dim}) a multiple of 2 num_heads ({2 * size.num_heads}): a head has two maps"
        yield BrokenRule("variant", rule, "v1", ("v2",))


def _neighborhood_sizes(own: Parameters, size: RunSize) -> Iterator[BrokenRule]:
    axes = (size.tokens,) if own["dims"] == 1 else image_sides(size.tokens, own["grid_height"])
    if axes is None:
        yield _no_image(own, size, 1)
    elif own["kernel_size"] * own["dilation"] > min(axes):
        shown = " x ".join(str(side) for side in axes)
        rule = f"times dilation ({own['dilation']}) must fit into every axis of {shown} tokens"
        yield BrokenRule("kernel_size", rule, own["kernel_size"])


def _efficient_sizes(own: Parameters, size: RunSize) -> Iterator[BrokenRule]:
    if (
        own["variant"] == "spatial_reduction"
        and image_sides(size.tokens, own["grid_height"], own["reduction"]) is None
    ):
        yield _no_image(own, size, own["reduction"])


def image_sides(tokens: int, height: int | None, multiple: int = 1) -> tuple[int, int] | None:
    """Height and width of the image that so many tokens form, sides multiples of ``multiple``; None if none do.

    Args:
        height: None looks for the one nearest to a square, no higher than wide.
    """
    heights = range(math.isqrt(tokens), 0, -1) if height is None else (height,)
    for rows in heights:
        columns, rest = divmod(tokens, rows)
        if rest == 0 and rows % multiple == 0 and columns % multiple == 0:
            return rows, columns
    return None


def _no_image(own: Parameters, size: RunSize, multiple: int) -> BrokenRule:
    height = own["grid_height"]
    asked = f"{size.tokens} tokens must form an image"
    sides = f", sides multiples of {multiple}" if multiple > 1 else ""
    if height is None:
        return BrokenRule("reduction", f"does not go with these lengths: {asked}{sides}", multiple)
    return BrokenRule("grid_height", f"does not go with these lengths: {asked} of this height{sides}", height)


def _evens(near: int) -> tuple[str, ...]:
    return tuple(str(value) for value in (near - 1, near + 1) if value >= 2)


def _up_to(limit: int) -> tuple[str, ...]:
    return (f"1 to {limit}",)


_BETWEEN: dict[str, Callable[[Parameters], Iterator[BrokenRule]]] = {
    "linear": _linear,
    "sparse": _sparse,
    "multi_head_latent": _latent,
    "neighborhood": _neighborhood,
    "switch_head": _switch_head,
}
_WITH_SIZES: dict[str, Callable[[Parameters, RunSize], Iterator[BrokenRule]]] = {
    "linear": _linear_sizes,
    "paged": _paged_sizes,
    "ring": _ring_sizes,
    "differential": _differential_sizes,
    "neighborhood": _neighborhood_sizes,
    "efficient": _efficient_sizes,
}
