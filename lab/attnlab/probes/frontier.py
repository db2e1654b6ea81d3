"""The longest sequence that fits into a stated memory: doubled until one does not, then bisected."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FITS = "fits"


@dataclass(frozen=True)
class Trial:
    """One length in a process of its own.

    Attributes:
        tokens: the sequence length.
        outcome: ``fits``, or why it did not: ``out_of_memory``, ``timed_out``, ``failed``, ``unsupported``.
        reason: one sentence, with the bytes asked for where an allocation failed.
        peak_bytes: most that the process held beyond what it began with; None where it did not live to say.
        seconds: from its start to its end.
        kernels: what ran in it; only of a trial that was asked to name them.
        implementations: of its attentions, in the order they were first used.
        provenance: launches and builds of these kernels.
    """

    tokens: int
    outcome: str
    reason: str
    peak_bytes: int | None
    seconds: float
    kernels: list[str] = field(default_factory=list)
    implementations: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.outcome == FITS


Attempt = Callable[[int], Trial]


def find_frontier(attempt: Attempt, *, first: int, up_to: int, resolution: int) -> list[Trial]:
    """Try lengths until the longest that fits and the first that does not lie ``resolution`` apart.

    It is taken that a length does not fit where a shorter one does not.

    Args:
        attempt: tries one length.
        first: where to start; halved while it does not fit.
        up_to: the longest that is tried.
        resolution: tokens.

    Returns:
        Every trial, in the order they were made.
    """
    trials: list[Trial] = []

    def fits(tokens: int) -> bool:
        trials.append(attempt(tokens))
        return trials[-1].fits

    low, high = 0, up_to + 1  # low fits, high does not; one token alone is never tried
    tokens = min(first, up_to)
    while high - low > 1 and high == up_to + 1:
        if fits(tokens):
            low = tokens
            if low == up_to:
                return trials
            tokens = min(2 * tokens, up_to)
        else:
            high = tokens
    while high - max(low, 1) > max(1, resolution):
        middle = (max(low, 1) + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return trials


def frontier_detail(trials: list[Trial], memory_bytes: int, resolution: int) -> dict[str, Any]:
    """Return what is kept: the longest that fits (0 if none), the first that does not, and every trial."""
    fitting = [trial.tokens for trial in trials if trial.fits]
    failing = [trial for trial in trials if not trial.fits]
    first = min(failing, key=lambda trial: trial.tokens, default=None)
    return {
        "fits": max(fitting, default=0),
        "fails": None
        if first is None
        else {"tokens": first.tokens, "outcome": first.outcome, "reason": first.reason},
        "memory_bytes": memory_bytes,
        "resolution": resolution,
        "trials": [
            {
                "tokens": trial.tokens,
                "outcome": trial.outcome,
                "reason": trial.reason,
                "peak_bytes": trial.peak_bytes,
                "seconds": round(trial.seconds, 3),
            }
            for trial in sorted(trials, key=lambda trial: trial.tokens)
        ],
    }
