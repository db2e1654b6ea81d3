"""What every command shares: one JSON document on stdout, words on stderr, bad input as one message.

Exit codes: 0 all well, 1 a run ended badly or a check failed, 2 bad input.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from attnlab.views.labels import format_bytes
from attnlab_storage.database import Store, migrate, open_store
from attnlab_storage.errors import StoreError

EXIT_BAD_OUTCOME = 1
EXIT_BAD_INPUT = 2
GOOD_OUTCOMES = frozenset({"succeeded", "unsupported"})
PIPE_WIDTH = 1000
RIGHT_ALIGNED = frozenset(
    {"id", "run", "runs", "tokens", "latency", "memory", "size", "layers", "heads", "context"}
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

EXPECTED_PROBLEMS = (ValueError, OSError, StoreError)


class CommandGroup(TyperGroup):
    """Turns every problem a user can cause into one message on stderr and exit code 2, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED_PROBLEMS as problem:
            refuse(str(problem) or type(problem).__name__)


def refuse(message: str) -> NoReturn:
    """Prints `message` on stderr and ends the command with exit code 2."""
    errors().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(EXIT_BAD_INPUT)


def errors() -> Console:
    """The console for words: stderr, made anew so that a redirected stream is honoured."""
    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Prints a line of words on stderr."""
    errors().print(Text(message), soft_wrap=True)


def print_document(document: Any) -> None:
    """Prints one JSON document on stdout; NaN and infinity become null, numpy numbers plain numbers."""
    typer.echo(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Prints rows as a table on stdout, or the words `empty` on stderr."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT_ALIGNED else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    if table.row_count == 0:
        say(empty)
    else:
        # a file or a pipe gets whole lines
        console = Console(highlight=False)
        (console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)).print(table)


def reading_store() -> Store:
    """The store of `ATTNLAB_DATABASE_URL`, refused with what to do when its version is not this program's."""
    return open_store()


def writing_store() -> Store:
    """Like `reading_store`, but an SQLite database on this machine is created or migrated first.

    A PostgreSQL database serves other machines too, so only `attnlab migrate` touches its tables.
    """
    store = open_store(check=False)
    if store.dialect == "sqlite":
        migrate(store)
    store.close()
    return open_store()


def short_number(value: float | None, unit: str = "") -> str:
    """3.14159 -> "3.14", None -> "-"; with `unit` after a space."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def short_bytes(count: float | None) -> str:
    """1_500_000 -> "1.5 MB"; None -> "-"."""
    return "-" if count is None else format_bytes(count)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
