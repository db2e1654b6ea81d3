"""One experiment, whole, out of a store and into another.

`dump_experiment` yields parts: a kind, rows of JSON values, for a chunk its bytes. `load_experiment` takes
the same parts in the same order and stores all of them or nothing, with new ids. It trusts nothing in them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Column, insert, select
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from attnlab_storage.database import Store
from attnlab_storage.fencing import record_event
from attnlab_storage.results import environment_id
from attnlab_storage.tables import (
    OUTCOMES,
    Attempt,
    Environment,
    Event,
    Experiment,
    LogChunk,
    Measurement,
    Run,
    RunInput,
    Tensor,
    TensorChunk,
    Trace,
)
from attnlab_storage.tensors import iter_chunks
from attnlab_storage.transfer_rules import TransferError, checked, expected_chunks, itemsize

__all__ = ["KINDS", "Loaded", "Part", "TransferError", "dump_experiment", "load_experiment"]

ROWS = 500
CHUNK_BYTES = 8 * 2**20
TABLES: dict[str, Any] = {
    "experiment": Experiment,
    "environment": Environment,
    "run": Run,
    "attempt": Attempt,
    "event": Event,
    "log": LogChunk,
    "input": RunInput,
    "trace": Trace,
    "measurement": Measurement,
    "tensor": Tensor,
}
KINDS = (*TABLES, "chunk")
# of the run's own story; what a run yielded is told for the attempt that counts only
_EVERY_ATTEMPT = ("attempt", "event", "log")
# what belongs to the place and not to the experiment
_LEFT_OUT = {
    "experiment": {"id", "deleted_at"},
    "environment": {"hash"},
    "run": {"experiment_id", "owner", "lease_until", "deleted_at"},
    "event": {"id"},
    "log": {"id"},
    "trace": {"id"},
    "measurement": {"id"},
}


class Part(NamedTuple):
    """Some rows of one of `KINDS`; ``data`` only with a chunk, whose row has tensor, head and block."""

    kind: str
    rows: list[dict[str, Any]]
    data: bytes | None = None


@dataclass(frozen=True)
class Loaded:
    """The ids that an imported experiment got; ``run_ids`` maps the ids in the parts to the new ones."""

    experiment_id: int
    run_ids: dict[int, int]


def dump_experiment(store: Store, experiment_id: int) -> Iterator[Part]:
    """Yields the experiment with its runs (deleted ones left out) from one snapshot of the store.

    Every value is JSON: a float that is not finite is its name as a string.

    Raises:
        TransferError: there is no such experiment.
    """
    mine = (Run.experiment_id == experiment_id, Run.deleted_at.is_(None))
    with store.read() as session:
        yield from _dump(session, "experiment", select(Experiment).where(Experiment.id == experiment_id))
        used = select(Run.environment_id).where(*mine)
        yield from _dump(session, "environment", select(Environment).where(Environment.id.in_(used)))
        yield from _dump(session, "run", select(Run).where(*mine).order_by(Run.id))
        for kind in list(TABLES)[3:]:
            table = TABLES[kind]
            query = select(table).join(Run, table.run_id == Run.id).where(*mine)
            if kind not in _EVERY_ATTEMPT:
                query = query.where(table.attempt == Run.attempt)
            yield from _dump(session, kind, query.order_by(*table.__table__.primary_key.columns))
        tensors = (
            select(Tensor.id).join(Run, Tensor.run_id == Run.id).where(*mine, Tensor.attempt == Run.attempt)
        )
        for tensor_id in session.scalars(tensors.order_by(Tensor.id)).all():
            for chunk in iter_chunks(session, tensor_id):
                row = {"tensor": tensor_id, "head": chunk.head, "block": chunk.block}
                yield Part("chunk", [row], chunk.data)


def load_experiment(store: Store, parts: Iterable[Part]) -> Loaded:
    """Stores an experiment, all or nothing. A run that had not ended becomes cancelled; its reason says so.

    Raises:
        TransferError: the parts are not a whole, valid experiment; nothing is stored.
    """
    with store.write() as session:
        loader = _Loader(session)
        try:
            for part in parts:
                loader.take(part)
            return loader.end()
        except (IntegrityError, DataError) as error:
            rule = str(error.orig).partition("\n")[0]
            raise TransferError(f"the experiment to import breaks a rule of the store: {rule}") from error


def _dump(session: Session, kind: str, query: Any) -> Iterator[Part]:
    columns = [getattr(TABLES[kind], column.key) for column in _columns(kind)]
    query = query.with_only_columns(*columns).execution_options(yield_per=ROWS)
    found = False
    with session.execute(query) as rows:
        for some in rows.mappings().partitions():
            found = True
            yield Part(kind, [{name: _plain(value) for name, value in row.items()} for row in some])
    if kind == "experiment" and not found:
        raise TransferError(
            "experiment must be the id of an experiment in the store, there is none with this id"
        )


def _columns(kind: str) -> list[Column[Any]]:
    return [column for column in TABLES[kind].__table__.columns if column.key not in _LEFT_OUT.get(kind, ())]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class _Loader:
    """Takes the parts in order and remembers which old id became which new one."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.experiment_id: int | None = None
        self.environments: dict[int, int] = {}
        self.runs: dict[int, Run] = {}
        self.tensors: dict[int, Tensor] = {}
        self.missing: dict[int, set[tuple[int, int]]] = {}
        self.chunks: list[dict[str, Any]] = []
        self.chunk_bytes = 0

    def take(self, part: Part) -> None:
        if part.kind not in KINDS:
            raise TransferError(
                f"part must be of a known kind, got {part.kind!r:.100}; choices: {', '.join(KINDS)}"
            )
        if (part.kind == "experiment") != (self.experiment_id is None):
            raise TransferError("the first part, and no other, must be the experiment")
        if part.kind == "chunk":
            for row in part.rows:
                self._chunk(row, part.data)
        else:
            rows = [checked(part.kind, _columns(part.kind), row) for row in part.rows]
            getattr(self, f"_{part.kind}", self._of_run(part.kind))(rows)

    def end(self) -> Loaded:
        self._flush()
        if self.experiment_id is None or not self.runs:
            raise TransferError("an experiment to import must have at least one run, got none")
        for old, missing in self.missing.items():
            if missing:
                head, block = min(missing)
                raise TransferError(f"tensor {old} must be whole, head {head} block {block} is missing")
        for old, run in self.runs.items():
            record_event(self.session, [run.id], "imported", from_run=old)
        return Loaded(self.experiment_id, {old: run.id for old, run in self.runs.items()})

    def _experiment(self, rows: list[dict[str, Any]]) -> None:
        if len(rows) != 1:
            raise TransferError(f"an experiment to import must be one row, got {len(rows)}")
        experiment = Experiment(**rows[0])
        self.session.add(experiment)
        self.session.flush()
        self.experiment_id = experiment.id

    def _environment(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.environments[row["id"]] = environment_id(self.session, row["document"])

    def _run(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            old, environment = row.pop("id"), row.pop("environment_id")
            if old in self.runs:
                raise TransferError(f"run {old} must be there once")
            if environment is not None and environment not in self.environments:
                raise TransferError(f"run {old} must name an environment that came before, got {environment}")
            if row["state"] not in OUTCOMES:
                row |= {"state": "cancelled", "reason": f"{row['state']:.20} when it was exported"}
                row["finished_at"] = row["finished_at"] or row["created_at"]
            environment_key = None if environment is None else self.environments[environment]
            self.runs[old] = Run(**row, experiment_id=self.experiment_id, environment_id=environment_key)
        self.session.add_all(self.runs.values())
        self.session.flush()

    def _tensor(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            old = row.pop("id")
            if old in self.tensors:
                raise TransferError(f"tensor {old} must be there once")
            self.missing[old] = expected_chunks(old, row)
            tensor = Tensor(**row | {"run_id": self._new_run(row["run_id"])})
            self.session.add(tensor)
            self.tensors[old] = tensor
        self.session.flush()

    def _of_run(self, kind: str) -> Any:
        def store_rows(rows: list[dict[str, Any]]) -> None:
            if rows:
                renamed = [row | {"run_id": self._new_run(row["run_id"])} for row in rows]
                self.session.execute(insert(TABLES[kind]), renamed)

        return store_rows

    def _new_run(self, old: int | None) -> int:
        if old not in self.runs:
            raise TransferError(f"run_id must be a run that came before, got {old}")
        return self.runs[old].id

    def _chunk(self, row: dict[str, Any], data: bytes | None) -> None:
        try:
            old, head, block = row["tensor"], row["head"], row["block"]
            tensor, place = self.tensors[old], (head, block)
            self.missing[old].remove(place)
        except (KeyError, TypeError):
            raise TransferError(
                f"a chunk must belong once to a tensor that came before, got {row!r:.200}"
            ) from None
        tokens = min(tensor.chunk_tokens, tensor.tokens - block * tensor.chunk_tokens)
        wanted = tokens * (tensor.head_dim or 1) * itemsize(tensor.dtype)
        if data is None or len(data) != wanted:
            got = "none" if data is None else len(data)
            raise TransferError(f"chunk {place} of tensor {old} must have {wanted} bytes, got {got}")
        self.chunks.append({"tensor_id": tensor.id, "head": head, "block": block, "data": data})
        self.chunk_bytes += wanted
        if self.chunk_bytes >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.chunks:
            self.session.execute(insert(TensorChunk.__table__), self.chunks)  # type: ignore[arg-type]
        self.chunks, self.chunk_bytes = [], 0
