"""`list`, `show`, `cancel`, `retry`, `compare`: what is in the store, and what the queue may be told about it."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from attnlab.compare import Comparison, compare_runs
from attnlab.describe import experiment_document, run_document
from attnlab_storage import queue
from attnlab_storage.listing import ExperimentRow, RunRow, list_experiments, list_runs
from attnlab_webui.commands.console import (
    JsonOption,
    print_document,
    print_table,
    reading_store,
    refuse,
    say,
    short_bytes,
    short_number,
)
from attnlab_webui.commands.progress import mechanism_words
from attnlab_webui.commands.run_words import run_words
from attnlab_webui.commands.targets import find_run_ids, find_runs, parse_target

TargetsArgument = Annotated[
    list[str], typer.Argument(metavar="TARGET...", help="3 or run:3 is a run, experiment:3 all its runs.")
]


def list_(
    experiments: Annotated[
        bool, typer.Option("--experiments", help="List experiments instead of runs.")
    ] = False,
    experiment: Annotated[int | None, typer.Option(help="Only runs of this experiment.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="Only runs in this state; may be repeated.")] = None,
    mechanism: Annotated[list[str] | None, typer.Option(help="Only this mechanism; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")] = None,
    search: Annotated[str, typer.Option(help="Text in name, note, tags, mechanism or model.")] = "",
    sort: Annotated[str, typer.Option(help="A column; with - in front the largest first.")] = "-id",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Rows a page.")] = 50,
    after: Annotated[str | None, typer.Option(help="`next` of the page before (in its JSON).")] = None,
    json: JsonOption = False,
) -> None:
    """List runs, newest first, or experiments."""
    store = reading_store()
    if experiments:
        page = list_experiments(store, search=search, limit=limit, after=after)
        if json:
            print_document({"experiments": [experiment_summary(row) for row in page.rows], "next": page.next})
        else:
            print_experiments(page.rows)
    else:
        filters = {"experiment": experiment, "state": state, "mechanism": mechanism, "model": model}
        page = list_runs(store, filters=filters, search=search, sort=sort, limit=limit, after=after)
        if json:
            print_document({"runs": [run_summary(row) for row in page.rows], "next": page.next})
        else:
            print_runs(page.rows)
    if page.next and not json:
        say(f"more: --after '{page.next}'")


def show(
    target: Annotated[str, typer.Argument(help="3 or run:3 is a run, experiment:3 an experiment.")],
    json: JsonOption = False,
) -> None:
    """Everything that is known of a run, or of an experiment and its runs."""
    store = reading_store()
    wanted = parse_target(target)
    runs = find_runs(store, wanted)
    if wanted.kind == "experiment":
        if json:
            print_document(experiment_document(store, wanted.id))
        else:
            print_runs(runs)
        return
    document = run_document(store, wanted.id)
    if json:
        print_document(document)
    else:
        typer.echo(run_words(document))


def cancel(targets: TargetsArgument, json: JsonOption = False) -> None:
    """Cancel queued runs, and ask running ones to stop."""
    store = reading_store()
    ids = find_run_ids(store, targets)
    count = queue.cancel(store, ids)
    if json:
        print_document({"asked": ids, "cancelled": count})
    else:
        say(f"{count} of {len(ids)} runs cancelled; the others had ended or were asked before")


def retry(targets: TargetsArgument, json: JsonOption = False) -> None:
    """Queue ended runs again, except those that succeeded."""
    store = reading_store()
    ids = find_run_ids(store, targets)
    queued = queue.retry(store, ids)
    if json:
        print_document({"asked": ids, "queued": queued})
    else:
        say(f"{len(queued)} of {len(ids)} runs queued again; the others had not ended or had succeeded")


def compare(targets: TargetsArgument, json: JsonOption = False) -> None:
    """Compare two or more runs: what differs between them, and what was measured."""
    store = reading_store()
    ids = find_run_ids(store, targets)
    if len(ids) < 2:
        refuse(f"TARGET must name at least two runs to compare, got {len(ids)}")
    comparison = compare_runs(store, ids)
    if json:
        print_document(comparison.to_json())
    else:
        print_comparison(comparison)


def run_summary(run: RunRow) -> dict[str, Any]:
    """A run in a list: what tells it from the others, and how it ended (None until it has)."""
    summary = run.summary or {}
    return {
        "id": run.id,
        "experiment": run.experiment_id,
        "experiment_name": run.experiment_name,
        "outcome": run.state if run.ended else None,
        "state": run.state,
        "reason": run.reason,
        "mechanism": run.mechanism,
        "parameters": run.parameters,
        "implementation": run.implementation,
        "chosen_implementation": summary.get("implementation"),
        "sequence_length": run.sequence_length,
        "dtype": run.dtype,
        "batch_size": run.batch_size,
        "phase": run.phase,
        "model": run.model,
        "latency_ms": run.latency_ms,
        "peak_memory_bytes": run.peak_memory_bytes,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
    }


def experiment_summary(row: ExperimentRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "note": row.note,
        "tags": row.tags,
        "runs": row.runs,
        "states": row.states,
        "created_at": row.created_at,
        "created_by": row.created_by,
        "spec_hash": row.spec_hash,
    }


def print_runs(runs: Sequence[RunRow]) -> None:
    rows = [
        (
            run.id,
            run.experiment_name,
            mechanism_words(run),
            implementation_words(run),
            run.sequence_length or "text",
            run.dtype,
            run.state,
            short_number(run.latency_ms, "ms"),
            short_bytes(run.peak_memory_bytes),
            (run.reason or "") if run.ended else run.phase_name or "",
        )
        for run in runs
    ]
    columns = (
        "run",
        "experiment",
        "mechanism",
        "implementation",
        "tokens",
        "dtype",
        "state",
        "latency",
        "memory",
        "",
    )
    print_table(columns, rows, empty="no runs: `attnlab submit SPEC` queues some")


def print_experiments(rows: Sequence[ExperimentRow]) -> None:
    lines = [
        (
            row.id,
            row.name,
            row.runs,
            ", ".join(f"{count} {state}" for state, count in row.states.items() if count),
        )
        for row in rows
    ]
    print_table(
        ("id", "name", "runs", "states"), lines, empty="no experiments: `attnlab submit SPEC` queues one"
    )


def implementation_words(run: RunRow) -> str:
    """`auto > sdpa_flash` once auto has chosen."""
    chosen = (run.summary or {}).get("implementation")
    return f"auto > {chosen}" if run.implementation == "auto" and chosen else run.implementation


def print_comparison(comparison: Comparison) -> None:
    """What differs, a column a run; ratios to the first run in brackets. Notes go to stderr."""
    rows = []
    for row in comparison.varying:
        cells = [
            f"{cell_words(value)} ({ratio:.2f}x)" if ratio is not None else cell_words(value)
            for value, ratio in zip(row.values, row.ratios, strict=True)
        ]
        rows.append((row.name, *cells))
    print_table(("", *comparison.labels), rows, empty="nothing differs between these runs")
    for note in comparison.notes:
        say(note)


def cell_words(value: Any) -> str:
    if isinstance(value, float):
        return short_number(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
