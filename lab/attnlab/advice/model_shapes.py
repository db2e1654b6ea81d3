"""Shapes of models, and the bytes of their caches by the catalog's formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnlab.advice.tree import AdviceError
from attnlab_kernels.catalog import MECHANISMS, Mechanism

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
LARGEST = 10**9
PAGE_TOKENS, TABLE_ENTRY = 16, 4


@dataclass(frozen=True)
class ModelShape:
    """What a key-value cache follows from, and for how many tokens and sequences.

    Raises AdviceError: a count below 1 or beyond reason, KV heads that do not divide the heads, an unknown dtype.
    """

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    context: int = 8192
    """tokens of a sequence"""
    batch: int = 1
    """sequences held at once"""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim", "context", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
                raise AdviceError(f"{name} must be a whole number from 1 to {LARGEST:,}; got {value!r}")
        if self.heads % self.kv_heads:
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise AdviceError(
                f"kv_heads must divide heads ({self.heads}); got {self.kv_heads}; choices are {', '.join(divisors)}"
            )
        if self.dtype not in BYTES_PER_ELEMENT:
            raise AdviceError(f"dtype must be one of {', '.join(BYTES_PER_ELEMENT)}; got {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class KnownShape:
    """A published model's attention; ``shape.context`` is the longest that it was made for."""

    title: str
    shape: ModelShape


KNOWN_SHAPES: dict[str, KnownShape] = {
    "smollm2-135m": KnownShape("SmolLM2 135M", ModelShape(30, 9, 3, 64, "bfloat16", 8192)),
    "gpt-2": KnownShape("GPT-2", ModelShape(12, 12, 12, 64, "float16", 1024)),
    "llama-2-7b": KnownShape("Llama 2 7B", ModelShape(32, 32, 32, 128, "float16", 4096)),
    "llama-3-8b": KnownShape("Llama 3 8B", ModelShape(32, 32, 8, 128, "bfloat16", 8192)),
    "llama-3.1-70b": KnownShape("Llama 3.1 70B", ModelShape(80, 64, 8, 128, "bfloat16", 131_072)),
    "mistral-7b": KnownShape("Mistral 7B v0.1", ModelShape(32, 32, 8, 128, "bfloat16", 32_768)),
    "qwen2.5-7b": KnownShape("Qwen2.5 7B", ModelShape(28, 28, 4, 128, "bfloat16", 131_072)),
    "deepseek-v3": KnownShape(
        "DeepSeek-V3, as plain multi-head", ModelShape(61, 128, 128, 128, "bfloat16", 131_072)
    ),
}


@dataclass(frozen=True)
class CacheLine:
    """The cache of one mechanism, or of a recommendation, for a shape."""

    mechanism: str
    title: str
    bytes_per_sequence: int
    bytes_in_all: int
    share: float
    """of multi-head's"""
    formula: str
    recommended: bool = False


def cache_bytes(mechanism: Mechanism, shape: ModelShape, parameters: Mapping[str, Any] | None = None) -> int:
    """Bytes of one sequence's cache by the catalog's formula."""
    return mechanism.cache_bytes(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tokens=shape.context,
        layers=shape.layers,
        bytes_per_element=BYTES_PER_ELEMENT[shape.dtype],
        **(parameters or {}),
    )


def paged_latent_bytes(shape: ModelShape) -> int:
    """A latent cache in pages of 16 tokens, a table of 4 bytes a page. No mechanism of the lab runs it."""
    pages = -(-shape.context // PAGE_TOKENS)
    whole = replace(shape, context=pages * PAGE_TOKENS)
    return cache_bytes(MECHANISMS["multi_head_latent"], whole) + TABLE_ENTRY * pages


def grouped(shape: ModelShape) -> ModelShape:
    """The shape with fewer key heads: its own where it has fewer, else a quarter of the heads."""
    if shape.kv_heads < shape.heads:
        return shape
    fewer = next(n for n in range(max(1, shape.heads // 4), 0, -1) if shape.heads % n == 0)
    return replace(shape, kv_heads=fewer)


def cache_lines(shape: ModelShape, recommended: str | None, others: tuple[str, ...] = ()) -> list[CacheLine]:
    """Multi-head's cache, the recommended one, and what stands beside them, the largest first."""
    shown = ("multi_head", "grouped_query", "paged", "multi_head_latent", "sliding_window", "linear")
    wanted: list[str] = [*shown, *others, *([recommended] if recommended else [])]
    plain = cache_bytes(MECHANISMS["multi_head"], shape)
    lines = []
    for name in dict.fromkeys(wanted):
        record = MECHANISMS[name]
        used = shape if name == "multi_head" else grouped(shape)
        size = cache_bytes(record, used)
        if size:
            lines.append(
                _line(name, record.title, size, plain, shape, record.cache_formula, name == recommended)
            )
    size = paged_latent_bytes(shape)
    formula = "⌈n / 16⌉ · 16 · L · (r + d_rope) · b + 4 · ⌈n / 16⌉"
    lines.append(
        _line(
            "paged + multi_head_latent",
            "Paged latent (computed; no mechanism here runs it)",
            size,
            plain,
            shape,
            formula,
            False,
        )
    )
    return sorted(lines, key=lambda line: -line.bytes_per_sequence)


def _line(
    name: str, title: str, size: int, plain: int, shape: ModelShape, formula: str, recommended: bool
) -> CacheLine:
    return CacheLine(name, title, size, size * shape.batch, size / plain, formula, recommended)
