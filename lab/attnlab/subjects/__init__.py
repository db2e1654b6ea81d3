"""What a run looks at: a transformers model or a bare module, behind one interface that the probes use."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from attnlab_storage.results import InputRow, MeasurementRow

from ..hook import LayerCall

__all__ = ["Caching", "Listener", "Stepping", "Subject"]

Listener = Callable[[LayerCall], None]


class Subject(Protocol):
    """One point of the grid, loaded and ready.

    Everything but ``input_row`` happens inside ``ready()``.
    """

    device: torch.device
    layers: int
    """attentions in one forward"""
    kind: str
    """what the mechanism does to the model's numbers: ``exact`` or ``approximate``; ``none`` for a bare module"""
    identity: dict[str, Any]
    tokens: int

    def input_row(self) -> InputRow:
        """What went in."""
        ...

    def trace_detail(self, call: LayerCall) -> dict[str, Any]:
        """What the trace of an attention says of its axes: role, stream of the queries, stream of the keys.

        Empty where both are the one sequence of ``input_row``.
        """
        ...

    def check(self) -> list[MeasurementRow]:
        """Compare with the subject's own attention on a prefix; CheckFailed if it computes something else."""
        ...

    def ready(self) -> AbstractContextManager[None]:
        """Put our kernels in place and leave them again."""
        ...

    def prepare(self) -> None:
        """Undo what a step has changed (a cache that grew)."""
        ...

    def step(self, listener: Listener | None = None) -> Tensor:
        """Run one forward of the phase; the listener hears of each attention. Returns the final states."""
        ...

    def loss(self, hidden: Tensor) -> Iterable[MeasurementRow]:
        """Measure what the swap costs in the subject's own terms, from what a step returned."""
        ...


@runtime_checkable
class Caching(Protocol):
    """A subject whose decoding cache can be weighed."""

    def cache_bytes(self) -> int:
        """Bytes that the cache holds before a decoding step, the whole batch together."""
        ...


@runtime_checkable
class Stepping(Protocol):
    """A subject that can decode several tokens one after another."""

    steps: int
    """how many; 0 where nothing is decoded"""

    def walk(self, listener: Listener) -> None:
        """Decode the last ``steps`` tokens over the growing cache; the listener hears every attention of each step."""
        ...
