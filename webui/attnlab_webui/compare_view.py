"""What the compare page shows, as escaped HTML made from a `Comparison`; no component in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnlab.compare import CompareRow, Comparison
from attnlab.describe import run_brief
from attnlab.views.labels import mechanism_label
from attnlab_storage.results import RunRow
from attnlab_webui import pieces
from attnlab_webui.pieces import Raw, escape

GROUP_WORDS = {
    "spec": "What was asked",
    "outcome": "Outcome",
    "measurement": "Measured",
    "environment": "Environment",
}
NAME_WORDS = {
    "latency_ms": "forward pass",
    "attention_latency_ms": "attention alone",
    "peak_memory_bytes": "peak memory",
    "stored_bytes": "stored for the maps",
    "capture_overhead": "cost of the capture",
    "row_sum_defect": "row sums off by",
    "output_defect": "P V off by",
    "sequence_length": "tokens",
    "batch_size": "batch",
    "kernels": "kernel that ran",
    "logit_error": "logits off by",
    "output_tokens_per_second": "tokens written a second",
    "time_to_first_token_ms": "time to first token",
    "inter_token_latency_ms": "time between tokens",
}
TABLE_FORMATS = {"csv": "CSV", "parquet": "Parquet", "json": "JSON"}
DEFECTS = ("row_sum_defect", "output_defect", "logit_error", "attention_error", "lse_error", "kl")


def empty(runs: Sequence[RunRow], alone: RunRow | None = None) -> str:
    """The page before two runs are chosen; the latest pair that makes sense, or the one chosen, is a click away."""
    text = "Choose two or more runs above: their maps move together, and only what differs is listed."
    actions = [("Open the queue", "/queue"), ("New experiment", "/")]
    pair = latest_pair(runs)
    if pair:
        a, b = pair
        names = [f"#{run.id} {mechanism_label(run_brief(run))}" for run in (a, b)]
        actions.insert(0, (f"Compare the latest: {names[0]} and {names[1]}", f"/compare?runs={a.id},{b.id}"))
    title = "Nothing to compare yet" if not runs else "Which runs?"
    if alone is not None:
        title = "Which other run?"
        text = f"Run #{alone.id} is chosen. Choose another beside it: their maps move together."
        link = f"/experiment?id={alone.experiment_id}&run={alone.id}"
        actions.insert(0, (f"Open #{alone.id} alone", link))
    if not runs:
        text = "Runs that ended well can be compared here. Queue an experiment with two mechanisms first."
    return pieces.empty_state(title, text, actions)


def of_one_run(run_id: int, against: tuple[int, int]) -> str:
    """What is compared when one run's heads are."""
    layer, head = against
    words = (
        f"Heads of run #{run_id} against its own L{layer}H{head}: choose another layer and head for A below."
    )
    return pieces.notice(words)


def latest_pair(runs: Sequence[RunRow]) -> tuple[RunRow, RunRow] | None:
    """The two newest runs of one experiment that have the same size, in grid order; `runs` are newest first."""
    for i, one in enumerate(runs):
        for other in runs[i + 1 :]:
            if (one.experiment_id, one.sequence_length) == (other.experiment_id, other.sequence_length):
                return other, one
    return None


def choice(run: RunRow) -> str:
    """How a run is named in the picker."""
    size = f"{run.sequence_length:,} tokens" if run.sequence_length else "the text's length"
    dtype = "" if run.dtype == "float32" else run.dtype
    asked = "" if run.implementation == "auto" else run.implementation
    parts = [
        f"#{run.id} {mechanism_label(run_brief(run))}",
        asked,
        run.model,
        size,
        dtype,
        run.experiment_name,
    ]
    return " · ".join(part for part in parts if part)


def notes(comparison: Comparison) -> str:
    """What whoever reads the numbers has to know."""
    return "".join(pieces.notice(note, "warning") for note in comparison.notes)


def table(comparison: Comparison) -> str:
    """Only what differs; what is equal is folded away below it."""
    differing = _rows(comparison.varying)
    equal = _rows(comparison.equal)
    columns = ["", *comparison.labels]
    if not differing:
        shown = '<p class="at-muted">Nothing differs between these runs.</p>'
    else:
        shown = _table(columns, differing, "What differs")
    folded = ""
    if equal:
        words = f"{len(comparison.equal)} properties are equal"
        inside = _table(["", "value in every run"], [_shortened(row) for row in equal], "What is equal")
        folded = f'<details class="at-equal"><summary>{words}</summary>{inside}</details>'
    return f"<h2>What differs</h2>{shown}{folded}"


def exports(run_ids: Sequence[int]) -> str:
    """Downloads of the measurements of all compared runs."""
    which = ",".join(str(run_id) for run_id in run_ids)
    links = "".join(
        f'<a href="/api/v1/compare/export/{form}?runs={which}" download>{word}</a>'
        for form, word in TABLE_FORMATS.items()
    )
    return f'<div class="at-exports"><span class="at-label">measurements of these runs</span>{links}</div>'


def cell(name: str, value: Any, ratio: float | None = None) -> str:
    """One value in the words of its kind; a ratio is to the first run."""
    text = _words(name, value)
    if ratio is None:
        return escape(text)
    css = "at-good" if ratio < 1 else "at-bad" if ratio > 1 else "at-muted"
    return f'{escape(text)} <span class="{css}">x {ratio:.2f}</span>'


def _rows(rows: Sequence[CompareRow]) -> list[list[Any]]:
    shown: list[list[Any]] = []
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            shown.append([Raw(f'<span class="at-group">{GROUP_WORDS[group]}</span>')])
        name = NAME_WORDS.get(row.name, row.name.replace("_", " "))
        ratios = [None, *row.ratios[1:]]
        values = [Raw(cell(row.name, value, ratio)) for value, ratio in zip(row.values, ratios, strict=True)]
        shown.append([name, *values])
    return shown


def _shortened(row: list[Any]) -> list[Any]:
    return row[:2]


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], label: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = []
    for row in rows:
        if len(row) == 1:
            body.append(
                f'<tr class="at-group-row"><td colspan="{len(columns)}">{pieces.cell(row[0])}</td></tr>'
            )
        else:
            name, *values = row
            cells = "".join(f'<td class="at-number">{pieces.cell(value)}</td>' for value in values)
            body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="at-scroll"><table class="at-table at-compare-table" aria-label="{escape(label)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _words(name: str, value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={one}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return " + ".join(str(one) for one in value) or "—"
    if name == "state":
        return pieces.STATE_WORDS.get(value, str(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("_ms"):
        return pieces.milliseconds(value)
    if name.endswith("_bytes"):
        return pieces.size_in_bytes(value)
    if name in DEFECTS:
        return pieces.scientific(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
