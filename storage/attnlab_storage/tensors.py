"""Tensors as rows: one head's block of tokens a row, raw little-endian bytes, no copy on the way in.

A tensor is ``[H, S, D]`` (query, key) or ``[H, S]`` (lse, value_norm). bfloat16 is its bits in uint16.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from attnlab_storage.database import Store
from attnlab_storage.fencing import Claim
from attnlab_storage.tables import Run, Tensor, TensorChunk

# stored dtype -> dtype of the array that is written and of the bytes in the rows
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
CODEC = "raw"


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
        dtype: float32, float16 or bfloat16.

    Returns:
        How many bytes it takes.
    """
    _check(array, dtype, chunk_tokens)
    heads, tokens = array.shape[:2]
    tensor = Tensor(
        run_id=claim.run_id,
        attempt=claim.attempt,
        layer=layer,
        name=name,
        heads=heads,
        tokens=tokens,
        head_dim=array.shape[2] if array.ndim == 3 else None,
        dtype=dtype,
        codec=CODEC,
        chunk_tokens=chunk_tokens,
        nbytes=array.nbytes,
    )
    session.add(tensor)
    session.flush()
    array = np.ascontiguousarray(array)
    rows = [
        {
            "tensor_id": tensor.id,
            "head": head,
            "block": block,
            "data": _bytes(array[head, start : start + chunk_tokens]),
        }
        for head in range(heads)
        for block, start in enumerate(range(0, tokens, chunk_tokens))
    ]
    session.execute(insert(TensorChunk.__table__), rows)  # type: ignore[arg-type]
    return array.nbytes


def read_tensor(
    store: Store,
    run_id: int,
    name: str,
    layer: int,
    head: int,
    start: int | None = None,
    stop: int | None = None,
) -> np.ndarray:
    """Tokens ``start`` to ``stop`` of one head as float32, ``[stop - start, D]`` or ``[stop - start]``.

    Raises:
        TensorError: the run's current attempt has no such tensor, or no such head or tokens.
    """
    with store.read() as session:
        info = _info(session, run_id, name, layer)
        start, stop = 0 if start is None else start, info.tokens if stop is None else stop
        if not 0 <= head < info.heads:
            raise TensorError(f"head must be from 0 to {info.heads - 1}, got {head}")
        if not 0 <= start <= stop <= info.tokens:
            raise TensorError(f"tokens must be a range within 0:{info.tokens}, got {start}:{stop}")
        first, last = start // info.chunk_tokens, -(-stop // info.chunk_tokens)
        query = (
            select(TensorChunk.data)
            .where(TensorChunk.tensor_id == info.id, TensorChunk.head == head)
            .where(TensorChunk.block >= first, TensorChunk.block < last)
            .order_by(TensorChunk.block)
        )
        pieces = [np.frombuffer(data, DTYPES[info.dtype]) for data in session.scalars(query)]
    values = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, DTYPES[info.dtype]), *pieces])
    if info.head_dim is not None:
        values = values.reshape(-1, info.head_dim)
    return _decoded(values[start - first * info.chunk_tokens :][: stop - start], info.dtype)


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
    for row in session.execute(query):
        yield Chunk(*row)


_COUNTS = (Tensor.run_id == Run.id) & (Tensor.attempt == Run.attempt)
_INFO = [getattr(Tensor, name) for name in TensorInfo.__dataclass_fields__]


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
    return array.data.cast("B") if array.size else b""


def _decoded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4", copy=False)
