"""What happened while requests were served: each request's times and each step's counts, as plain records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .workload import Request


@dataclass
class Served:
    """One request and when what happened to it, in seconds after the first arrival."""

    request: Request
    started: float = 0.0
    """begin of the first step that computed any of its tokens"""
    tokens_at: list[float] = field(default_factory=list)
    """when each token of its answer was there"""
    preemptions: int = 0
    reused: int = 0
    """prompt tokens that were shared and not computed, the first time it began"""
    computed: int = 0
    """tokens that went through the model, those computed again included"""

    @property
    def finished(self) -> float:
        return self.tokens_at[-1]


class Step(NamedTuple):
    """One step of the engine. Tokens of the cache are counted at its end, before anything is given back."""

    start: float
    end: float
    prompt_tokens: int
    decode_tokens: int
    running: int
    """sequences that had a token in it"""
    waiting: int
    used: int
    """tokens that the cache holds"""
    reserved: int
    """tokens that the room set aside could hold"""
    stranded: int
    """tokens of free room while the first in the queue does not fit"""
    preempted: int


@dataclass
class Timeline:
    """One pass over a workload."""

    total_tokens: int
    """what the cache could hold"""
    requests: list[Served] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return self.steps[-1].end if self.steps else 0.0
