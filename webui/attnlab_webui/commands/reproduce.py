"""`reproduce`: run something again, and say whether its figures are what they were."""

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from attnlab.reproduce import WORDS, Reproduction, judge, reproduction_spec
from attnlab_storage.database import Store
from attnlab_storage.listing import runs_of
from attnlab_webui.commands.console import (
    EXIT_BAD_OUTCOME,
    JsonOption,
    print_document,
    print_table,
    say,
    writing_store,
)
from attnlab_webui.commands.progress import watch
from attnlab_webui.commands.submit import enqueue, refuse_if_too_large, say_if_nothing_serves
from attnlab_webui.commands.targets import BadTarget, find_runs, parse_target

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's number.")]
HereOption = Annotated[bool, typer.Option("--here", help="Run it in this process, without Ray.")]


def reproduce(run: RunArgument, here: HereOption = False, json: JsonOption = False) -> None:
    """Queue a run again; when it has ended say whether the new figures lie in the old 95 % intervals.

    Times; of a server its tokens a second and waits; of a search for the longest that fits that length.

    Ends with 1 where one does not.
    """
    store = writing_store()
    target = parse_target(run)
    if target.kind != "run":
        raise BadTarget(f"RUN must be one run, got {run!r}")
    (old,) = find_runs(store, target)
    spec = reproduction_spec(store, old.id)
    refuse_if_too_large(store, spec)
    if here:
        from attnlab.run import run_here

        with redirect_stdout(sys.stderr):
            experiment = run_here(store, spec, created_by="command line")
    else:
        experiment = enqueue(store, spec).experiment_id
        say_if_nothing_serves(store, f", and `attnlab reproduce {old.id} --here` needs none")
    try:
        watch(store, lambda: runs_of(store, experiment_id=experiment))
    except KeyboardInterrupt:
        say(f"no longer waiting; the run goes on. `attnlab cancel experiment:{experiment}` stops it")
        raise typer.Exit(130) from None
    (new,) = runs_of(store, experiment_id=experiment)
    report(store, judge(store, old.id, new.id), json)


def report(store: Store, found: Reproduction, json: bool) -> None:
    """Print the verdict, and end the command with 1 where the run is not what it was."""
    if json:
        print_document(found.to_dict())
    else:
        print_reproduction(found)
    if not found.holds:
        raise typer.Exit(EXIT_BAD_OUTCOME)


def print_reproduction(found: Reproduction) -> None:
    """Old and new medians with the old interval, and what differs around them."""
    say(f"run {found.old} again as run {found.new}: {found.outcome}")
    rows = [
        (
            WORDS[one.name],
            f"{one.old:.5g} {one.unit}",
            f"{one.interval[0]:.5g} - {one.interval[1]:.5g} {one.unit}",
            f"{one.new:.5g} {one.unit}",
            f"{one.ratio:.3f}",
            "inside" if one.inside else "outside",
        )
        for one in found.times
    ]
    print_table(
        ("figure", "old", "95 % interval", "new", "ratio", "new one"), rows, empty="no figures to compare"
    )
    for name, (then, now) in found.changed.items():
        say(f"differs: {name}: {then} then, {now} now")
