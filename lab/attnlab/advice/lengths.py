"""Advice for language models by context length: what to train with, what to serve with, what saves memory."""

from __future__ import annotations

from dataclasses import dataclass

K = 1024


@dataclass(frozen=True)
class LengthRow:
    """One range of context lengths; ``up_to`` is inclusive, None is without end. Mechanisms are catalog ids."""

    label: str
    up_to: int | None
    training: tuple[str, ...]
    inference: tuple[str, ...]
    memory: tuple[str, ...]
    note: str = ""


LENGTHS = (
    LengthRow(
        "under 4K",
        4 * K - 1,
        ("multi_head", "flash"),
        ("grouped_query", "flash"),
        ("multi_head",),
        "a cache this short needs no saving; grouped-query in use needs weights trained so",
    ),
    LengthRow(
        "4K to 16K", 16 * K, ("grouped_query", "flash"), ("grouped_query", "paged"), ("grouped_query",)
    ),
    LengthRow(
        "16K to 64K",
        64 * K,
        ("grouped_query", "sliding_window"),
        ("grouped_query", "paged"),
        ("multi_head_latent",),
        "a window in most layers, not in all of them",
    ),
    LengthRow(
        "64K to 256K",
        256 * K,
        ("sparse", "grouped_query"),
        ("paged", "chunked_prefill"),
        ("multi_head_latent",),
        "the decision tree gives ring from 128K on: exact, and for several devices; sparse is for one",
    ),
    LengthRow(
        "over 256K",
        None,
        ("ring", "grouped_query"),
        ("paged", "chunked_prefill", "ring"),
        ("multi_head_latent", "paged"),
        "often called not recommended for inference; it is done, with the cache spread over devices",
    ),
)


def length_row(context: int) -> LengthRow:
    """The row that a context of so many tokens falls into."""
    return next(row for row in LENGTHS if row.up_to is None or context <= row.up_to)
