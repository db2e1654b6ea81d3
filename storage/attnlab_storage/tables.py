"""The tables. Times are float epoch seconds (UTC) on the database's clock; JSON columns hold plain documents.

What a run yields (measurements, traces, input, tensors, log) carries the attempt that wrote it; readers show
the rows of ``run.attempt`` only.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from attnlab_storage.columns import CleanText, Number, Samples

LIVE_STATES = ("queued", "running")
OUTCOMES = ("succeeded", "failed", "out_of_memory", "unsupported", "timed_out", "cancelled")
STATES = LIVE_STATES + OUTCOMES

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
# SQLite counts only in a column declared INTEGER; PostgreSQL gets room for billions of rows
RowId = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """The declarative base; its naming convention lets every constraint be migrated."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as a class attribute
        str: CleanText,
        int: Integer,
        float: Double,
        bool: Boolean,
        bytes: LargeBinary,
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        list[float]: Samples,
    }


def _key() -> Mapped[int]:
    return mapped_column(RowId, primary_key=True)


def _parent(target: str, *, index: bool = False, primary_key: bool = False) -> Mapped[int]:
    return mapped_column(RowId, ForeignKey(target, ondelete="CASCADE"), index=index, primary_key=primary_key)


class Experiment(Base):
    """A spec as it was submitted; its grid became the runs."""

    __tablename__ = "experiment"

    id: Mapped[int] = _key()
    name: Mapped[str]
    spec_hash: Mapped[str] = mapped_column(index=True)
    note: Mapped[str] = mapped_column(server_default="")
    tags: Mapped[list[str]] = mapped_column(server_default="[]")
    pinned: Mapped[bool] = mapped_column(server_default=text("false"))
    created_by: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(index=True)
    deleted_at: Mapped[float | None]
    spec: Mapped[dict[str, Any]]  # the longest column stands last: a search need not read it


# the columns of a run that lists filter and sort by
LISTED = (
    "id",
    "experiment_id",
    "state",
    "mechanism",
    "implementation",
    "sequence_length",
    "dtype",
    "batch_size",
    "model",
    "created_at",
    "started_at",
    "finished_at",
    "latency_ms",
    "peak_memory_bytes",
)


def _listed(column: str) -> Index:
    """An index of the runs that are not deleted, which lists read without looking at the runs."""
    shown = text("deleted_at IS NULL")
    # with deleted_at, although always NULL, SQLite answers from the index alone
    columns = dict.fromkeys((column, "id", "deleted_at"))
    return Index(f"ix_run_{column}", *columns, sqlite_where=shown, postgresql_where=shown)


class Run(Base):
    """One point of an experiment's grid: where it stands in the queue, and how it ended."""

    __tablename__ = "run"

    id: Mapped[int] = _key()
    experiment_id: Mapped[int] = _parent("experiment.id")
    position: Mapped[int]
    mechanism: Mapped[str]
    implementation: Mapped[str]
    sequence_length: Mapped[int]
    dtype: Mapped[str]
    batch_size: Mapped[int]
    phase: Mapped[str]
    model: Mapped[str | None]
    kind: Mapped[str]
    gpus: Mapped[int]
    state: Mapped[str]
    priority: Mapped[int]
    run_after: Mapped[float]
    attempt: Mapped[int]
    max_attempts: Mapped[int]
    owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    timeout_seconds: Mapped[float]
    phase_name: Mapped[str | None]
    progress_done: Mapped[float | None]
    progress_total: Mapped[float | None]
    progress_at: Mapped[float | None]
    environment_id: Mapped[int | None] = mapped_column(RowId, ForeignKey("environment.id"), index=True)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    deleted_at: Mapped[float | None]
    latency_ms: Mapped[float | None]
    peak_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    # the long columns stand last: a scan that filters on the short ones need not read them
    reason: Mapped[str | None]
    error_kind: Mapped[str | None]
    parameters: Mapped[dict[str, Any]]
    summary: Mapped[dict[str, Any] | None]
    error_detail: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(state) for state in STATES)})", name="state"),
        CheckConstraint("kind IN ('inspect', 'bench')", name="kind"),
        CheckConstraint("attempt <= max_attempts", name="attempts"),
        CheckConstraint(
            "state <> 'running' OR (owner IS NOT NULL AND lease_until IS NOT NULL)", name="owned"
        ),
        Index("ix_run_experiment", "experiment_id"),
        Index("ix_run_queue", "state", text("priority DESC"), "id"),
        *(_listed(column) for column in LISTED),
    )


class Attempt(Base):
    """One claim of a run: who held it, from when to when, how it ended (an outcome, or ``requeued``)."""

    __tablename__ = "attempt"

    run_id: Mapped[int] = _parent("run.id", primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    owner: Mapped[str]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    outcome: Mapped[str | None]
    error_kind: Mapped[str | None]
    reason: Mapped[str | None]


class Event(Base):
    """The audit trail, append-only; an event of the whole queue has no run."""

    __tablename__ = "event"

    id: Mapped[int] = _key()
    run_id: Mapped[int | None] = mapped_column(RowId, ForeignKey("run.id", ondelete="CASCADE"), index=True)
    attempt: Mapped[int | None]
    at: Mapped[float]
    kind: Mapped[str]
    detail: Mapped[dict[str, Any] | None]


class LogChunk(Base):
    """A piece of what a run printed, in the order of the ids."""

    __tablename__ = "log_chunk"

    id: Mapped[int] = _key()
    run_id: Mapped[int] = _parent("run.id")
    attempt: Mapped[int]
    at: Mapped[float]
    text: Mapped[str]

    __table_args__ = (Index("ix_log_chunk_run", "run_id", "attempt", "id"),)


class Measurement(Base):
    """One measured number, with its samples where it is a median."""

    __tablename__ = "measurement"

    id: Mapped[int] = _key()
    run_id: Mapped[int] = _parent("run.id")
    attempt: Mapped[int]
    name: Mapped[str]
    layer: Mapped[int | None]
    head: Mapped[int | None]
    value: Mapped[float | None] = mapped_column(Number)
    unit: Mapped[str]
    samples: Mapped[list[float] | None]
    detail: Mapped[dict[str, Any] | None]

    __table_args__ = (
        Index("ix_measurement_run", "run_id", "attempt", "name", "layer", "head"),
        # heads by a number, over all runs; with every column that the search reads
        Index(
            "ix_measurement_head",
            *("name", "value", "run_id", "layer", "head", "attempt"),
            sqlite_where=text("head IS NOT NULL"),
            postgresql_where=text("head IS NOT NULL"),
        ),
    )


class Trace(Base):
    """What one layer's attention was: everything but the tensors that a map is rebuilt from."""

    __tablename__ = "trace"

    id: Mapped[int] = _key()
    run_id: Mapped[int] = _parent("run.id")
    attempt: Mapped[int]
    layer: Mapped[int]
    name: Mapped[str]
    kind: Mapped[str]
    scale: Mapped[float]
    mask: Mapped[dict[str, Any]]
    heads: Mapped[int]
    kv_heads: Mapped[int]
    num_queries: Mapped[int]
    num_keys: Mapped[int]
    head_dim: Mapped[int]
    dtype: Mapped[str]
    row_sum_defect: Mapped[float | None] = mapped_column(Number)
    output_defect: Mapped[float | None] = mapped_column(Number)
    detail: Mapped[dict[str, Any] | None]

    __table_args__ = (UniqueConstraint("run_id", "attempt", "layer", "name"),)


class RunInput(Base):
    """What went in. Text and tokens are JSON, which keeps every character (NUL too) on both databases."""

    __tablename__ = "run_input"

    run_id: Mapped[int] = _parent("run.id", primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str | None] = mapped_column(JSON(none_as_null=True))
    query_tokens: Mapped[list[str]]
    key_tokens: Mapped[list[str]]
    detail: Mapped[dict[str, Any] | None]


class Tensor(Base):
    """A tensor ``[heads, tokens, head_dim]`` (or ``[heads, tokens]``, head_dim NULL) kept as chunk rows."""

    __tablename__ = "tensor"

    id: Mapped[int] = _key()
    run_id: Mapped[int] = _parent("run.id")
    attempt: Mapped[int]
    layer: Mapped[int]
    name: Mapped[str]
    heads: Mapped[int]
    tokens: Mapped[int]
    head_dim: Mapped[int | None]
    dtype: Mapped[str]
    codec: Mapped[str]
    chunk_tokens: Mapped[int]
    nbytes: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (UniqueConstraint("run_id", "attempt", "layer", "name"),)


class TensorChunk(Base):
    """One head's block of tokens, raw little-endian bytes in C order."""

    __tablename__ = "tensor_chunk"

    tensor_id: Mapped[int] = _parent("tensor.id", primary_key=True)
    head: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    block: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes]


class Environment(Base):
    """The machine and the software that a run was done with; equal ones are one row."""

    __tablename__ = "environment"

    id: Mapped[int] = _key()
    hash: Mapped[str] = mapped_column(unique=True)
    document: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Dispatcher(Base):
    """A dispatcher that is or was alive, and the cluster it sees."""

    __tablename__ = "dispatcher"

    owner: Mapped[str] = mapped_column(primary_key=True)
    started_at: Mapped[float]
    heartbeat_at: Mapped[float]
    cluster: Mapped[dict[str, Any]]


class Setting(Base):
    """One value that all processes share, such as whether the queue is paused."""

    __tablename__ = "setting"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[dict[str, Any]]


class Revision(Base):
    """The change counter of live pages, in shards so that writers do not queue up for one row."""

    __tablename__ = "revision"

    shard: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)
