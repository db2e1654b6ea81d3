"""`submit` and `run`: from a spec file to runs in the queue, or done here and now."""

import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from attnlab.estimate import estimate
from attnlab.spec import MAX_SPEC_BYTES, ExperimentSpec, parse_spec
from attnlab_storage import queue
from attnlab_storage.control import dispatchers, paused
from attnlab_storage.database import Store
from attnlab_storage.listing import RunRow, list_experiments, runs_of
from attnlab_storage.settings import lease_seconds
from attnlab_webui.commands.console import (
    EXIT_BAD_OUTCOME,
    GOOD_OUTCOMES,
    JsonOption,
    print_document,
    refuse,
    say,
    writing_store,
)
from attnlab_webui.commands.listing import print_runs, run_summary
from attnlab_webui.commands.progress import watch

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML or JSON file, or - for stdin.")]


def submit(
    spec: SpecArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every run has ended.")] = False,
    priority: Annotated[int, typer.Option(help="Runs of higher priority start first.")] = 0,
    json: JsonOption = False,
) -> None:
    """Queue an experiment; a dispatcher (`attnlab up`) runs it."""
    parsed = read_spec(spec)
    store = writing_store()
    refuse_if_too_large(store, parsed)
    submitted = enqueue(store, parsed, priority)
    experiment = submitted.experiment_id
    say(f"experiment {experiment}: {len(submitted.run_ids)} runs queued")
    say_if_nothing_serves(store)
    if not wait:
        if json:
            print_document(outcome_document(experiment, runs_of(store, experiment_id=experiment)))
        return
    try:
        watch(store, lambda: runs_of(store, experiment_id=experiment))
    except KeyboardInterrupt:
        say(f"no longer waiting; the runs go on. `attnlab cancel experiment:{experiment}` stops them")
        raise typer.Exit(130) from None
    report(experiment, runs_of(store, experiment_id=experiment), json)


def run(spec: SpecArgument, json: JsonOption = False) -> None:
    """Run an experiment here and now, in this process, without Ray."""
    parsed = read_spec(spec)
    store = writing_store()
    refuse_if_too_large(store, parsed)
    from attnlab.run import run_here

    # libraries print while models load; stdout is for the one document
    with redirect_stdout(sys.stderr), watching_newest(store) as watching:
        try:
            experiment = run_here(store, parsed, created_by="command line")
        except KeyboardInterrupt:
            stopped = [run.id for run in watching.runs() if not run.ended]
            queue.cancel(store, stopped)
            say(f"stopped, {len(stopped)} runs cancelled")
            raise typer.Exit(130) from None
    # a dispatcher may have taken some of them
    watch(store, lambda: runs_of(store, experiment_id=experiment))
    report(experiment, runs_of(store, experiment_id=experiment), json)


def enqueue(store: Store, spec: ExperimentSpec, priority: int = 0) -> queue.Submitted:
    """Queues every run of the spec, or none."""
    return queue.submit(
        store,
        name=spec.name,
        spec=spec.to_dict(),
        spec_hash=spec.hash(),
        points=[point.to_dict() for point in spec.points()],
        created_by="command line",
        priority=priority,
    )


def read_spec(source: str) -> ExperimentSpec:
    """The spec in a file, or on stdin for `-`; refuses what is not a readable text of sensible size."""
    path = Path(source)
    if source == "-":
        folder, data = Path(), sys.stdin.buffer.read(MAX_SPEC_BYTES + 1)
    elif not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        refuse(f"SPEC must be a YAML or JSON file, or - for stdin: {source!r} {what}")
    else:
        folder = path.parent
        with path.open("rb") as file:
            data = file.read(MAX_SPEC_BYTES + 1)
    if not data.strip():
        refuse(f"SPEC must hold an experiment, {source!r} is empty")
    return parse_spec(data, folder=folder)


class watching_newest:
    """Shows, from a thread, the runs of the experiment that this process is about to make."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._before = self._newest()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "watching_newest":
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _newest(self) -> int:
        rows = list_experiments(self._store, limit=1).rows
        return rows[0].id if rows else 0

    def runs(self) -> list[RunRow]:
        newest = self._newest()
        return runs_of(self._store, experiment_id=newest) if newest != self._before else []

    def _watch(self) -> None:
        watch(self._store, self.runs, self._done.is_set)


def refuse_if_too_large(store: Store, spec: ExperimentSpec) -> None:
    """Ends the command where the experiment would not fit, such as on a disk that is nearly full."""
    refusals = estimate(spec, store).refusals
    if refusals:
        refuse("; ".join(refusals))


def say_if_nothing_serves(store: Store, instead: str = "") -> None:
    """Says on stderr why the runs just queued will not start, if they will not, and what starts them ``instead``."""
    if paused(store):
        say("the queue is paused, so nothing will start until it is resumed on the queue page")
    elif not any(dispatcher.silent_seconds <= lease_seconds() for dispatcher in dispatchers(store)):
        say(
            f"no dispatcher is running, so nothing will start: `attnlab up` or `attnlab dispatch` starts one{instead}"
        )


def report(experiment: int, runs: list[RunRow], json: bool) -> None:
    """Prints how every run ended, and ends the command with 1 if one ended badly."""
    if json:
        print_document(outcome_document(experiment, runs))
    else:
        say(f"experiment {experiment}")
        print_runs(runs)
    if not all(run.state in GOOD_OUTCOMES for run in runs):
        raise typer.Exit(EXIT_BAD_OUTCOME)


def outcome_document(experiment: int, runs: list[RunRow]) -> dict[str, Any]:
    """What `run --json` and `submit --json` print; `outcome` is None while a run has not ended."""
    return {"experiment": experiment, "runs": [run_summary(run) for run in runs]}
