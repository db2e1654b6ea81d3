"""What a claim is: the number that is quoted, and which runs would show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Quantity = Literal[
    "cache_bytes", "attention_peak_memory_bytes", "latency_ms", "tokens_per_second", "reaches", "runs_out"
]
RATIOS = ("cache_bytes", "attention_peak_memory_bytes", "latency_ms", "tokens_per_second")


@dataclass(frozen=True)
class Which:
    """Tells a run of a preset from the others.

    Attributes:
        parameters: those that count; the rest may be anything.
        implementation: as asked for.
        length: position among the lengths of the mechanism's runs, 0 the shortest, -1 the longest; None: any.
        batch: likewise among the batch sizes.
    """

    mechanism: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    implementation: str | None = None
    length: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Claim:
    """One number that is quoted.

    Attributes:
        says: the claim in words.
        quantity: what is measured. Of bytes the ratio to the baseline's, of time a token the baseline's over the run's
            (so that more is faster), of tokens that a server writes a second the run's over the baseline's; of
            ``reaches`` and ``runs_out`` the tokens at which a run succeeds or runs out.
        low, high: what is claimed; equal where it is one number.
        device: the GPU that it was said of; None: of none in particular.
        how: how it is measured here.
        quoted: as it stands in the table, where the number here is derived from it.
        note: what the number hides.
        open: why nothing here can show it.
    """

    id: str
    says: str
    quantity: Quantity
    low: float
    high: float
    which: Which
    against: Which | None
    how: str
    source: str
    device: str | None = None
    quoted: str = ""
    note: str = ""
    open: str = ""

    @property
    def across_lengths(self) -> bool:
        """Whether run and baseline are of different lengths on purpose."""
        return self.against is not None and self.which.length != self.against.length

    @property
    def is_ratio(self) -> bool:
        return self.quantity in RATIOS
