"""Tensors as rows: one head's block of tokens a row, raw little-endian bytes, no copy on the way in.

A tensor is ``[H, S, D]`` (query, key) or ``[H, S]`` (lse, value_norm). bfloat16 is its bits in uint16.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from psycopg.rows import namedtuple_row
from sqlalchemy import BigInteger, bindparam, cast, func, insert, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from attnlab_storage.database import Store
from attnlab_storage.fencing import Claim
from attnlab_storage.tables import OUTCOMES, Run, Tensor, TensorChunk

# stored dtype -> dtype of the array that is written and of the bytes in the rows
DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
CODEC = "raw"
MOST_TOKENS = 2**31 - 1
DERIVED_CHUNK = 2**17  # numbers of a row of a derived tensor: half a megabyte
AT_ONCE_BYTES = 4 << 20  # that a statement inserts: pieces of a view are copied, and the whole may be large


class TensorError(ValueError):
    """A tensor cannot be stored or read as asked; the text names argument, rule, value and choices."""


@dataclass(frozen=True)
class TensorInfo:
    """What is stored: heads, tokens and head_dim (None for ``[H, S]``), and in how many bytes."""

    id: int
    name: str
    layer: int
    heads: int
    tokens: int
    head_dim: int | None
    dtype: str
    codec: str
    chunk_tokens: int
    nbytes: int


@dataclass(frozen=True)
class Chunk:
    """One row of a tensor: tokens ``block * chunk_tokens`` onwards of one head."""

    head: int
    block: int
    data: bytes


def write_tensor(
    session: Session,
    claim: Claim,
    name: str,
    layer: int,
    array: np.ndarray,
    *,
    dtype: str = "float32",
    chunk_tokens: int = 2048,
) -> int:
    """Stores a tensor inside `results.recording`; a layer and name may be stored once an attempt.

    Args:
        array: ``[H, S, D]`` or ``[H, S]``, of the stored dtype; bfloat16 as a uint16 view of its bits.
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        How many bytes it takes.
    """
    return _insert(session, claim.run_id, claim.attempt, name, layer, array, dtype, chunk_tokens)


def keep_derived(
    store: Store,
    run_id: int,
    attempt: int,
    name: str,
    layer: int,
    array: np.ndarray,
    *,
    dtype: str = "float32",
) -> bool:
    """Stores what was worked out later from an ended run's tensors, such as an overview of a map.

    Returns False, and stores nothing, where the run has moved on to another attempt, has not ended or is gone, or
    where somebody else has stored it meanwhile.
    """
    with store.write() as session:
        ended = select(Run.id).where(Run.id == run_id, Run.attempt == attempt, Run.state.in_(OUTCOMES))
        mine = (
            Tensor.run_id == run_id,
            Tensor.attempt == attempt,
            Tensor.layer == layer,
            Tensor.name == name,
        )
        if session.scalar(ended) is None or session.scalar(select(Tensor.id).where(*mine)) is not None:
            return False
        _insert(session, run_id, attempt, name, layer, array, dtype, DERIVED_CHUNK)
    return True


def read_tensor(
    store: Store,
    run_id: int,
    name: str,
    layer: int,
    head: int,
    start: int | None = None,
    stop: int | None = None,
) -> np.ndarray:
    """Tokens ``start`` to ``stop`` of one head, ``[stop - start, D]`` or ``[stop - start]``.

    float64 stays float64, everything else comes as float32.

    Raises:
        TensorError: the run's current attempt has no such tensor, or no such head or tokens.
    """
    begin, end = 0 if start is None else start, MOST_TOKENS if stop is None else stop
    place = {"run_id": run_id, "name": name, "layer": layer, "head": head, "start": begin, "stop": end}
    with store.read() as session, contextlib.closing(_fetch(session, place)) as rows:
        first = next(rows, None)
        if first is None or not 0 <= begin <= (first.tokens if stop is None else end) <= first.tokens:
            return _none(session, run_id, name, layer, head, start, stop)
        return _filled(first, rows, begin, min(end, first.tokens))


def _filled(first: Any, rest: Iterator[Any], start: int, stop: int) -> np.ndarray:
    """Tokens ``start`` to ``stop``; a row is put in its place and forgotten: all rows together are as large again."""
    shape = (stop - start,) if first.head_dim is None else (stop - start, first.head_dim)
    values, found = np.empty(shape, "<f8" if first.dtype == "float64" else "<f4"), 0
    for row in itertools.chain([first], rest):
        data = np.frombuffer(row.data, DTYPES[first.dtype]).reshape(-1, *shape[1:])
        at = row.block * first.chunk_tokens
        low, high = max(start, at), min(stop, at + len(data))
        _decode(data[low - at : high - at], values[low - start : high - start], first.dtype)
        found += high - low
    if found < stop - start:
        raise TensorError(f"tokens {start}:{stop} must all be stored, found only {found} of them")
    return values


def tensor_info(store: Store, run_id: int) -> list[TensorInfo]:
    """Every tensor of the run's current attempt, by layer and name."""
    query = select(*_INFO).join(Run, _COUNTS).where(Run.id == run_id)
    with store.read() as session:
        rows = session.execute(query.order_by(Tensor.layer, Tensor.name)).all()
    return [TensorInfo(*row) for row in rows]


def stored_bytes(store: Store, run_id: int) -> int:
    """How many bytes the tensors of the run's current attempt take."""
    with store.read() as session:
        return session.scalar(select(func.sum(Tensor.nbytes)).join(Run, _COUNTS).where(Run.id == run_id)) or 0


def iter_chunks(session: Session, tensor_id: int) -> Iterator[Chunk]:
    """The rows of a tensor as they are stored, by head and block."""
    columns = (TensorChunk.head, TensorChunk.block, TensorChunk.data)
    query = select(*columns).where(TensorChunk.tensor_id == tensor_id)
    query = query.order_by(TensorChunk.head, TensorChunk.block).execution_options(yield_per=16)
    with session.execute(query) as rows:
        for row in rows:
            yield Chunk(*row)


_COUNTS = (Tensor.run_id == Run.id) & (Tensor.attempt == Run.attempt)
_INFO = [getattr(Tensor, name) for name in TensorInfo.__dataclass_fields__]


_first_token = cast(TensorChunk.block, BigInteger) * Tensor.chunk_tokens
# built once: making one takes longer than reading or writing the row
_NEW_TENSOR = insert(Tensor.__table__).returning(Tensor.id)  # type: ignore[arg-type]
_NEW_CHUNKS = insert(TensorChunk.__table__)  # type: ignore[arg-type]
_READ = (
    select(
        Tensor.tokens,
        Tensor.head_dim,
        Tensor.dtype,
        Tensor.chunk_tokens,
        TensorChunk.block,
        TensorChunk.data,
    )
    .join(Run, _COUNTS)
    .join(TensorChunk, TensorChunk.tensor_id == Tensor.id)
    .where(
        Run.id == bindparam("run_id"),
        Tensor.layer == bindparam("layer"),
        Tensor.name == bindparam("name"),
        TensorChunk.head == bindparam("head"),
        _first_token < bindparam("stop"),
        _first_token + Tensor.chunk_tokens > bindparam("start"),
    )
    .order_by(TensorChunk.block)
)
_READ_POSTGRES = str(_READ.compile(dialect=postgresql.psycopg.dialect()))


def _fetch(session: Session, values: dict[str, Any]) -> Generator[Any, None, None]:
    connection = session.connection()
    if connection.dialect.name != "postgresql":
        with connection.execute(_READ, values) as rows:
            yield from rows
        return
    # as text the bytes would come in hexadecimal
    cursor = connection.connection.cursor(binary=True, row_factory=namedtuple_row)
    with contextlib.closing(cursor):
        cursor.execute(_READ_POSTGRES, values)
        while (row := cursor.fetchone()) is not None:
            yield row


def _none(
    session: Session, run_id: int, name: str, layer: int, head: int, start: int | None, stop: int | None
) -> np.ndarray:
    """No tokens of a tensor that is there; else the error that says what is wrong."""
    info = _info(session, run_id, name, layer)
    start, stop = 0 if start is None else start, info.tokens if stop is None else stop
    if not 0 <= head < info.heads:
        raise TensorError(f"head must be from 0 to {info.heads - 1}, got {head}")
    if not 0 <= start <= stop <= info.tokens:
        raise TensorError(f"tokens must be a range within 0:{info.tokens}, got {start}:{stop}")
    return np.empty((0,) if info.head_dim is None else (0, info.head_dim), "<f4")


def _info(session: Session, run_id: int, name: str, layer: int) -> TensorInfo:
    query = (
        select(*_INFO).join(Run, _COUNTS).where(Run.id == run_id, Tensor.layer == layer, Tensor.name == name)
    )
    row = session.execute(query).one_or_none()
    if row is not None:
        return TensorInfo(*row)
    query = select(Tensor.layer, Tensor.name).join(Run, _COUNTS).where(Run.id == run_id)
    there = sorted(session.execute(query))
    layers, names = sorted({layer for layer, _ in there}), sorted({name for _, name in there})
    choices = (
        f"layers {layers[0]} to {layers[-1]}, names {', '.join(names)}"
        if there
        else "none, nothing is stored"
    )
    raise TensorError(f"run {run_id} has no tensor {name!r} of layer {layer}; choices: {choices}")


def _insert(
    session: Session,
    run_id: int,
    attempt: int,
    name: str,
    layer: int,
    array: np.ndarray,
    dtype: str,
    chunk_tokens: int,
) -> int:
    _check(array, dtype, chunk_tokens)
    heads, tokens = array.shape[:2]
    facts = {"heads": heads, "tokens": tokens, "head_dim": array.shape[2] if array.ndim == 3 else None}
    facts |= {"dtype": dtype, "codec": CODEC, "chunk_tokens": chunk_tokens, "nbytes": array.nbytes}
    place = {"run_id": run_id, "attempt": attempt, "layer": layer, "name": name}
    tensor_id = session.execute(_NEW_TENSOR, place | facts).scalar_one()
    heads_at_once = max(1, AT_ONCE_BYTES // array[0].nbytes)
    for first in range(0, heads, heads_at_once):
        places = itertools.product(
            range(first, min(first + heads_at_once, heads)), range(0, tokens, chunk_tokens)
        )
        rows = [
            {
                "tensor_id": tensor_id,
                "head": head,
                "block": start // chunk_tokens,
                "data": _bytes(array[head, start : start + chunk_tokens]),
            }
            for head, start in places
        ]
        session.execute(_NEW_CHUNKS, rows)
    return array.nbytes


def _check(array: np.ndarray, dtype: str, chunk_tokens: int) -> None:
    if dtype not in DTYPES:
        raise TensorError(f"dtype must be a stored dtype, got {dtype!r}; choices: {', '.join(DTYPES)}")
    if array.dtype != np.dtype(DTYPES[dtype]):
        raise TensorError(
            f"array must be {np.dtype(DTYPES[dtype])} to be stored as {dtype}, got {array.dtype}"
        )
    if array.ndim not in (2, 3):
        raise TensorError(
            f"array must be [heads, tokens, head_dim] or [heads, tokens], got shape {array.shape}"
        )
    if array.size == 0:
        raise TensorError(f"array must hold numbers, got shape {array.shape}")
    if chunk_tokens < 1:
        raise TensorError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _bytes(array: np.ndarray) -> Any:
    return np.ascontiguousarray(array).data.cast("B") if array.size else b""


def _decode(data: np.ndarray, values: np.ndarray, dtype: str) -> None:
    if dtype == "bfloat16":
        bits = values.view("<u4")
        bits[...] = data
        bits <<= 16
    else:
        values[...] = data
