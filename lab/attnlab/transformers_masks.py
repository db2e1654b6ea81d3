"""What transformers asks of a mask, described: never a dense tensor, never a guess.

transformers hands a mask function a nest of closures over (batch, head, query, key), a padding tensor and
offsets. Each closure that is known here becomes a Mask; the result is then compared with the closure itself
on sampled cells, so a change of meaning in a later release is an error and not a wrong map.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import masking_utils

from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax.api import Unsupported

SAMPLES = 24
Limits = tuple[int | None, int | None]


@dataclass(frozen=True)
class MaskCarrier:
    """What our mask function returns; transformers passes it on to the attention function unchanged."""

    mask: Mask
    num_keys: int
    """keys that hold tokens; a static cache holds empty ones after them"""


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **_ignored: Any,
) -> MaskCarrier:
    """Return the description of the mask that transformers wants (signature of its mask functions).

    Raises:
        Unsupported: the mask is none that can be described, with the reason.
    """
    mask = _pattern(mask_function)
    num_keys = _aligned_keys(mask, int(q_offset) - kv_offset, q_length, kv_length)
    _compare(mask, mask_function, q_length, num_keys, int(q_offset), kv_offset)
    if attention_mask is not None:
        mask = mask & _padding(attention_mask, kv_offset, num_keys)
    return MaskCarrier(mask, num_keys)


def _pattern(function: Callable[..., Any]) -> Mask:
    left, right = _limits(function)
    if left is None and right is None:
        return Full()
    if left is None and right == 0:
        return Causal()
    if left is None or right is None:
        raise Unsupported("mask: a window that is open on one side cannot be described")
    return Window(left, right)


def _limits(function: Callable[..., Any]) -> Limits:
    """How many keys before and after its own position a query sees; None is no limit."""
    if function is masking_utils.causal_mask_function:
        return None, 0
    if function is masking_utils.bidirectional_mask_function:
        return None, None
    name = getattr(function, "__qualname__", repr(function)).removesuffix(".<locals>.inner_mask")
    match name, _closed_over(function):
        case "and_masks.<locals>.and_mask", {"mask_functions": parts}:
            lefts, rights = zip(*map(_limits, parts), strict=True)
            return _smallest(lefts), _smallest(rights)
        case "sliding_window_overlay", {"sliding_window": int(window)}:
            return window - 1, None
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(window)}:
            return window, window
    raise Unsupported(f"mask: transformers asks for {name}, which this lab cannot describe")


def _closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _smallest(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _aligned_keys(mask: Mask, shift: int, num_queries: int, kv_length: int) -> int:
    """Return how many keys to keep so that the last query is the newest token, as our masks mean it.

    A static cache is longer than what was written to it; a mask that never looks ahead never sees the rest.
    """
    if isinstance(mask, Full):
        return kv_length
    num_keys = shift + num_queries
    if num_keys == kv_length or (num_keys < kv_length and shift >= 0 and mask.band().right == 0):
        return num_keys
    raise Unsupported(
        f"mask: {mask.describe()} cannot be aligned for {num_queries} queries over {kv_length} keys with the "
        f"first query at key {shift}"
    )


def _compare(
    mask: Mask, function: Callable[..., Any], num_queries: int, num_keys: int, q_offset: int, kv_offset: int
) -> None:
    if isinstance(mask, Full | Causal):
        return
    rows = np.unique(np.linspace(0, num_queries - 1, SAMPLES).astype(int))
    edges = {row + num_keys - num_queries + step for row in rows for limit in _edges(mask) for step in limit}
    cols = np.array(sorted(edges & set(range(num_keys)) | {0, num_keys - 1}))
    zero = torch.zeros(1, dtype=torch.long)
    theirs = function(
        zero, zero, torch.as_tensor(rows)[:, None] + q_offset, torch.as_tensor(cols)[None] + kv_offset
    )
    ours = mask.allowed(rows, cols, num_queries=num_queries, num_keys=num_keys)
    if not np.array_equal(theirs.expand(ours.shape).numpy(), ours):
        raise Unsupported(f"mask: transformers means something else by this mask than {mask.describe()}")


def _edges(mask: Mask) -> Iterable[tuple[int, ...]]:
    band = mask.band()
    left, right = band.left or 0, band.right or 0
    return (-left - 1, -left, 1 - left), (0,), (right - 1, right, right + 1)


def _padding(attention_mask: torch.Tensor, kv_offset: int, num_keys: int) -> Mask:
    """Describe a [B, S] bool tensor: the real tokens of each batch element must lie in one range."""
    real = attention_mask[:, kv_offset : kv_offset + num_keys].cpu().numpy().astype(bool)
    if real.all() and real.shape[1] == num_keys:
        return Full()
    ranges = []
    for element, row in enumerate(real):
        places = np.flatnonzero(row)
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if stop - start != len(places):
            raise Unsupported(f"attention_mask: the real tokens of batch element {element} are not one range")
        ranges.append((start, stop))
    return Padding(tuple(ranges))
