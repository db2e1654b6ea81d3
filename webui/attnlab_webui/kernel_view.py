"""The static panel as a table: what the compiler made of our Triton kernels for cards that need not be here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from attnlab_storage.settings import home_folder
from attnlab_webui import pieces
from attnlab_webui.pieces import escape

STATIC_FILE = "static_kernels.json"
CARDS = {80: "sm_80, A100", 90: "sm_90, H100", 100: "sm_100, B200"}
ANY = "all"
# heading, what it means, whether it sorts as a number
COLUMNS = (
    ("Card", "compute capability that the kernel was compiled for", True),
    ("Kernel", "what the launcher starts", False),
    ("Form", "dtype, head dimension and tile", False),
    ("Registers", "of a thread, at most 255", True),
    ("Spill B", "bytes of stack a thread; red above the bound that a test holds", True),
    ("Shared KiB", "shared memory of a block", True),
    ("Occupancy", "resident warps over the 64 that a multiprocessor holds", True),
    ("Matrix instructions", "tensor-core instructions in the machine code", True),
    ("TMA", "bulk loads by the tensor memory accelerator", True),
    ("exp2", "exponentials in the machine code", True),
)


def static_file() -> Path:
    """Where `attnlab kernels --static` keeps the panel of this machine."""
    return home_folder() / STATIC_FILE


def read_panel() -> dict[str, Any]:
    """The panel made on this machine, else the one that attnlab ships; its ``origin`` says which."""
    own = static_file()
    if own.exists():
        try:
            return json.loads(own.read_text()) | {"origin": "compiled on this machine"}
        except ValueError:
            pass  # being written by another process or cut off: the shipped one is whole
    return _shipped()


@lru_cache
def _shipped() -> dict[str, Any]:
    text = resources.files("attnlab_kernels").joinpath("static_panel.json").read_text()
    return json.loads(text) | {"origin": "shipped with attnlab"}


def operations(panel: dict[str, Any]) -> list[str]:
    """Names for a filter, in the order of the panel."""
    return [ANY, *dict.fromkeys(row["operation"] for row in panel["rows"])]


def chosen(
    panel: dict[str, Any], card: str, operation: str, dtype: str, words: str, spilling: bool
) -> list[dict[str, Any]]:
    """Rows that all filters keep; ``words`` must all be in the kernel's name or form."""
    wanted = words.lower().split()

    def keep(row: dict[str, Any]) -> bool:
        text = f"{row['kernel']} {row['form']}".lower()
        spills = row["facts"] is None or row["facts"]["stack_bytes"] > 0
        return (
            card in (ANY, CARDS.get(row["capability"]))
            and operation in (ANY, row["operation"])
            and dtype in (ANY, row["dtype"])
            and all(word in text for word in wanted)
            and (spills or not spilling)
        )

    return [row for row in panel["rows"] if keep(row)]


def summary(panel: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How many, from where, by which compiler, and that this is no time."""
    over = sum(1 for row in rows if row["facts"] is None or over_bound(row))
    worst = (
        f"{over} above their bound of spills or not compiled" if over else "none above its bound of spills"
    )
    versions = ", ".join(f"{name} {version}" for name, version in panel["versions"].items())
    return (
        f'<p class="at-muted">{len(rows)} of {len(panel["rows"])} kernels, {worst}. {escape(versions)}, '
        f"{escape(panel['origin'])} ({escape(panel['made_at'][:10])}). These are facts about machine code and say "
        "nothing about time. <code>attnlab kernels --static</code> compiles them here."
        f"{''.join(f' {escape(note)}.' for note in panel.get('notes', ()))}</p>"
    )


def over_bound(row: dict[str, Any]) -> bool:
    """Whether a compiled kernel spills more than its bound; the kernels of others have none."""
    return row["spill_bound"] is not None and row["facts"]["stack_bytes"] > row["spill_bound"]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows; a click on a heading sorts (see ``pages.kernels``)."""
    head = "".join(
        f'<th scope="col" aria-sort="none" title="{escape(meaning)}">'
        f'<button type="button" class="at-sort" data-column="{number}" data-number="{int(numeric)}">'
        f"{escape(name)}</button></th>"
        for number, (name, meaning, numeric) in enumerate(COLUMNS)
    )
    body = "".join(f"<tr>{''.join(_cells(row))}</tr>" for row in rows)
    if not body:
        return pieces.empty_state("No kernel fits these filters", "Take one of them back.")
    return (
        '<div class="at-scroll at-kernels"><table class="at-table" aria-label="Compiled kernels">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    first = [
        _cell(f"sm_{row['capability']}", row["capability"]),
        _cell(row["kernel"], row["kernel"]),
        _cell(row["form"], row["form"]),
    ]
    facts = row["facts"]
    if facts is None:
        error = f'<td colspan="{len(COLUMNS) - 3}" class="at-bad">{escape(row["error"])}</td>'
        return [*first, error]
    matrix = facts["matrix_count"]
    words = " ".join(f"{count} {name}" for name, count in matrix.items()) or "none"
    shared, occupancy = facts["shared_bytes"], facts["occupancy"]
    return [
        *first,
        _cell(facts["registers"], facts["registers"]),
        _cell(facts["stack_bytes"], facts["stack_bytes"], "at-bad" if over_bound(row) else ""),
        _cell(*(("set at launch", -1) if shared is None else (f"{shared / 1024:.1f}", shared))),
        _cell(*(("unknown", -1) if occupancy is None else (f"{occupancy:.0%}", occupancy))),
        _cell(words, sum(matrix.values())),
        _cell(facts["tma_loads"], facts["tma_loads"]),
        _cell(facts["exponentials"], facts["exponentials"]),
    ]


def _cell(shown: object, value: object, css: str = "") -> str:
    extra = f' class="{css}"' if css else ""
    return f'<td data-value="{escape(value)}"{extra}>{escape(shown)}</td>'
