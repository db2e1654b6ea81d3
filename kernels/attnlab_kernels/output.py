"""The one result type of every operation and mechanism."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """What attention gives back; fields that were not asked for are ``None``."""

    output: Tensor
    """``[B, Hq, Sq, Dv]`` from an operation, ``[B, Sq, dim]`` from a module."""
    attentions: Tensor | None = None
    """``[B, Hq, Sq, Sk]`` probabilities, only with ``output_attentions=True``."""
    cache: Any = None
    """The cache that now holds these tokens, see ``caches``."""
    lse: Tensor | None = None
    """``[B, Hq, Sq]`` natural log of each row's sum of exponentials; minus infinity for a dead row."""
    aux: dict[str, Any] = field(default_factory=dict)
    """What ran and why, and what only one mechanism knows (routing, auxiliary loss)."""
