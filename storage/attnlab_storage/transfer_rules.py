"""What the rows of an imported experiment must be: exactly the columns, of the columns' types."""

from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, LargeBinary

from attnlab_storage.columns import CleanText, Number, Samples
from attnlab_storage.tensors import CODEC, DTYPES

MAX_TENSOR_BYTES = 2**40
MAX_TENSOR_CHUNKS = 10_000_000
_LISTS = {"tags", "query_tokens", "key_tokens"}


class TransferError(ValueError):
    """What is imported is not a whole, valid experiment; the text names part, rule and value."""


def expected_chunks(old: int, row: dict[str, Any]) -> set[tuple[int, int]]:
    """The (head, block) of every chunk that the tensor must have. Raises TransferError for sizes that lie."""
    if row["dtype"] not in DTYPES or row["codec"] != CODEC:
        raise TransferError(
            f"tensor {old} must be {CODEC} of {', '.join(DTYPES)}; got {row['codec']} of {row['dtype']}"
        )
    sizes = [
        row["heads"],
        row["tokens"],
        row["chunk_tokens"],
        1 if row["head_dim"] is None else row["head_dim"],
    ]
    if min(sizes) < 1:
        raise TransferError(f"tensor {old} must have sizes of at least 1, got {sizes}")
    nbytes = sizes[0] * sizes[1] * sizes[3] * itemsize(row["dtype"])
    if nbytes != row["nbytes"] or nbytes > MAX_TENSOR_BYTES:
        raise TransferError(
            f"tensor {old} must have as many bytes as its sizes say ({nbytes}), got {row['nbytes']}"
        )
    blocks = -(-row["tokens"] // row["chunk_tokens"])
    if row["heads"] * blocks > MAX_TENSOR_CHUNKS:
        raise TransferError(
            f"tensor {old} must have at most {MAX_TENSOR_CHUNKS} chunks, got {row['heads'] * blocks}"
        )
    return {(head, block) for head in range(row["heads"]) for block in range(blocks)}


def itemsize(dtype: str) -> int:
    """Bytes of one number of a stored dtype."""
    return int(DTYPES[dtype][-1])


def checked(kind: str, columns: list[Column[Any]], row: Any) -> dict[str, Any]:
    """The row with each value as the store wants it. Raises TransferError."""
    names = {column.key for column in columns}
    if not isinstance(row, dict) or set(row) != names:
        wrong = sorted(map(str, set(row) ^ names)) if isinstance(row, dict) else type(row).__name__
        raise TransferError(
            f"a row of {kind} has exactly the columns {sorted(names)}; missing or unknown: {wrong}"
        )
    return {column.key: _value(kind, column, row[column.key]) for column in columns}


def _value(kind: str, column: Column[Any], value: Any) -> Any:
    if value is None and column.nullable:
        return None
    stored, rule = _read(column, value)
    if stored is None:
        raise TransferError(f"{kind}.{column.key} must be {rule}, got {value!r:.100}")
    return stored


def _read(column: Column[Any], value: Any) -> tuple[Any, str]:
    """(the value for the store, or None if it breaks the rule; the rule)"""
    match column.type:
        case CleanText():
            return value if isinstance(value, str) else None, "a text"
        case Boolean():
            return value if isinstance(value, bool) else None, "true or false"
        case BigInteger() | Integer():
            limit = 2**63 if isinstance(column.type, BigInteger) else 2**31
            fits = isinstance(value, int) and not isinstance(value, bool) and -limit <= value < limit
            return value if fits else None, f"a whole number of {limit.bit_length()} bits"
        case Double() | Number():
            return _float(value), "a number"
        case Samples() | LargeBinary():
            numbers = [_float(item) for item in value] if isinstance(value, list) else [None]
            return None if None in numbers else numbers, "a list of numbers"
    if column.key in _LISTS:
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return value if texts else None, "a list of texts"
    if column.table.name == "run_input" and column.key == "text":
        return value if isinstance(value, str) else None, "a text"
    return value if isinstance(value, dict) else None, "a document"


def _float(value: Any) -> float | None:
    named = isinstance(value, str) and value in ("nan", "inf", "-inf")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if named or number else None
    except OverflowError:
        return None
