"""What the lists hold: frozen copies of what stood in the store."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunRow:
    """A run as it stands, with the name and tags of its experiment."""

    id: int
    experiment_id: int
    experiment_name: str
    tags: list[str]
    position: int
    mechanism: str
    parameters: dict[str, Any]
    implementation: str
    sequence_length: int
    dtype: str
    batch_size: int
    phase: str
    model: str | None
    kind: str
    gpus: int
    state: str
    reason: str | None
    error_kind: str | None
    error_detail: str | None
    priority: int
    run_after: float
    attempt: int
    max_attempts: int
    owner: str | None
    lease_until: float | None
    cancel_requested_at: float | None
    timeout_seconds: float
    phase_name: str | None
    progress_done: float | None
    progress_total: float | None
    progress_at: float | None
    environment_id: int | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    deleted_at: float | None
    latency_ms: float | None
    peak_memory_bytes: int | None
    summary: dict[str, Any] | None

    @property
    def ended(self) -> bool:
        """Whether the run has an outcome."""
        return self.state not in ("queued", "running")


@dataclass(frozen=True)
class RunPage:
    """One page of runs; ``next`` is the ``after`` of the page that follows, None on the last."""

    rows: list[RunRow]
    next: str | None


@dataclass(frozen=True)
class ExperimentRow:
    """An experiment, with how many of its runs are in which state."""

    id: int
    name: str
    spec: dict[str, Any]
    spec_hash: str
    note: str
    tags: list[str]
    pinned: bool
    created_by: str | None
    created_at: float
    deleted_at: float | None
    states: dict[str, int]

    @property
    def runs(self) -> int:
        """How many runs it has."""
        return sum(self.states.values())

    @property
    def ended(self) -> bool:
        """Whether every run has an outcome."""
        return not (self.states.get("queued") or self.states.get("running"))


@dataclass(frozen=True)
class ExperimentPage:
    """One page of experiments; ``next`` is the ``after`` of the page that follows, None on the last."""

    rows: list[ExperimentRow]
    next: str | None
