"""Column types that keep a value exact on both databases, and SQL that the two spell differently."""

import json
import math
from typing import Any

import numpy as np
from sqlalchemy import Dialect, Double, LargeBinary, Text, TypeDecorator, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class CleanText(TypeDecorator[str]):
    """Text; NUL and lone surrogates, which no database stores, become U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else clean_text(value)


class Number(TypeDecorator[float]):
    """A measured float64. NaN is kept as NULL, because SQLite has no NaN, and read back as NaN."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        return None if value is None or math.isnan(value) else float(value)

    def process_result_value(self, value: float | None, dialect: Dialect) -> float:
        return math.nan if value is None else value


class Samples(TypeDecorator[list[float]]):
    """A list of float64, bit for bit (NaN and infinities included), as little-endian bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: list[float] | None, dialect: Dialect) -> bytes | None:
        return None if value is None else np.asarray(value, "<f8").tobytes()

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[float] | None:
        return None if value is None else np.frombuffer(value, "<f8").tolist()


def clean_text(value: str) -> str:
    """The value with NUL and lone surrogates replaced by U+FFFD."""
    if "\0" in value:
        value = value.replace("\0", "\ufffd")
    try:
        value.encode()
    except UnicodeEncodeError:
        value = value.encode(errors="surrogatepass").decode(errors="replace")
    return value


def dump_json(value: Any, *, sort_keys: bool = False) -> str:
    """JSON that every parser reads: numpy values become plain, a float that is not finite its name."""
    try:
        text = _dump(value, sort_keys=sort_keys)
    except ValueError:
        text = _dump(_finite(value), sort_keys=sort_keys)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate can only stand as an escape
        text = json.dumps(json.loads(text), sort_keys=sort_keys)
    return text


def _dump(value: Any, *, sort_keys: bool) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain, sort_keys=sort_keys)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    raise TypeError(
        f"a stored document must be made of JSON values, got {type(value).__name__}: {value!r:.200}"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class db_now(FunctionElement[float]):
    """Epoch seconds (UTC) on the clock of the database, so that the clocks of the nodes do not matter."""

    type = Double()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"  # unixepoch('subsec') needs SQLite 3.42


@compiles(db_now, "postgresql")
def _postgres_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    return "CAST(extract(epoch FROM statement_timestamp()) AS double precision)"


class json_list_has(FunctionElement[bool]):
    """``json_list_has(column, text)``: whether a JSON list of strings holds the text."""

    inherit_cache = True

    def __init__(self, column: Any, text: Any) -> None:
        super().__init__(column, text)


@compiles(json_list_has, "sqlite")
def _sqlite_list_has(element: json_list_has, compiler: SQLCompiler, **kw: Any) -> str:
    column, text = _both(element, compiler, **kw)
    return f"EXISTS (SELECT 1 FROM json_each({column}) WHERE json_each.value = {text})"


@compiles(json_list_has, "postgresql")
def _postgres_list_has(element: json_list_has, compiler: SQLCompiler, **kw: Any) -> str:
    column, text = _both(element, compiler, **kw)
    return f"jsonb_exists(CAST({column} AS jsonb), CAST({text} AS text))"


class mentions(FunctionElement[bool]):
    """``mentions(column, text)``: whether the column holds the text, ASCII letters in either case."""

    inherit_cache = True

    def __init__(self, column: Any, text: str) -> None:
        escaped = text.replace("/", "//").replace("%", "/%").replace("_", "/_")
        super().__init__(column, literal(f"%{clean_text(escaped)}%"))


@compiles(mentions, "sqlite")
def _sqlite_mentions(element: mentions, compiler: SQLCompiler, **kw: Any) -> str:
    column, pattern = _both(element, compiler, **kw)
    return f"{column} LIKE {pattern} ESCAPE '/'"


@compiles(mentions, "postgresql")
def _postgres_mentions(element: mentions, compiler: SQLCompiler, **kw: Any) -> str:
    column, pattern = _both(element, compiler, **kw)
    return f"CAST({column} AS text) ILIKE CAST({pattern} AS text) ESCAPE '/'"


def _both(element: FunctionElement[bool], compiler: SQLCompiler, **kw: Any) -> tuple[str, str]:
    clauses: list[ColumnElement[Any]] = list(element.clauses)
    return compiler.process(clauses[0], **kw), compiler.process(clauses[1], **kw)
