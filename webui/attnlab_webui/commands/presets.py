"""`presets` and `preset`: experiments that are ready to run, and what became of the claims that they test."""

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from attnlab.estimate import estimate
from attnlab.presets import PRESETS, Preset, find_preset
from attnlab.presets.outcome import PresetState, preset_document, preset_state, submit_preset
from attnlab.presets.verdict import KIND_WORDS
from attnlab_storage.database import Store
from attnlab_storage.listing import RunRow, runs_of
from attnlab_webui.advise_query import lab_scale
from attnlab_webui.commands.console import (
    EXIT_BAD_OUTCOME,
    GOOD_OUTCOMES,
    JsonOption,
    print_document,
    print_table,
    refuse,
    say,
    writing_store,
)
from attnlab_webui.commands.progress import watch
from attnlab_webui.commands.submit import outcome_document, say_if_nothing_serves

preset = typer.Typer(help="One preset: run it, or see its claims and verdicts.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name from `presets`.")]


def presets(json: JsonOption = False) -> None:
    """Experiments ready to run: the claims that people quote, and stacks of mechanisms."""
    store = writing_store()
    states = {name: preset_state(store, item) for name, item in PRESETS.items()}
    if json:
        print_document([preset_document(PRESETS[name], state) for name, state in states.items()])
        return
    rows = [
        (name, PRESETS[name].kind, verdict_words(state), PRESETS[name].title)
        for name, state in states.items()
    ]
    print_table(("name", "kind", "verdicts", "title"), rows, empty="no presets")


@preset.command("show")
def show(name: NameArgument, json: JsonOption = False) -> None:
    """The claims of a preset, the verdict of each with its reason and runs."""
    chosen, store = find_preset(name), writing_store()
    state = preset_state(store, chosen)
    if json:
        print_document(preset_document(chosen, state))
    else:
        print_preset(chosen, state)


@preset.command("run")
def run(
    name: NameArgument,
    scale: Annotated[
        str, typer.Option(help="cpu, gpu, or auto: gpu where a machine of the lab has one.")
    ] = "auto",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every run has ended, then judge.")] = False,
    here: Annotated[bool, typer.Option("--here", help="Run it in this process, without Ray.")] = False,
    json: JsonOption = False,
) -> None:
    """Queue every experiment of a preset; with --wait or --here its verdicts come at the end."""
    chosen, store = find_preset(name), writing_store()
    if scale not in ("auto", "cpu", "gpu"):
        refuse(f"--scale must be cpu, gpu or auto, got {scale!r}")
    size = lab_scale(store) if scale == "auto" else scale
    refusals = [words for spec in chosen.specs(size) for words in estimate(spec, store).refusals]
    if refusals:
        refuse("; ".join(refusals))
    experiments = run_here(store, chosen, size) if here else queue_preset(store, chosen, size)
    if wait and not here:
        watch(store, lambda: _runs(store, experiments))
    runs = _runs(store, experiments)
    state = preset_state(store, chosen)
    if json:
        outcomes = [outcome_document(one, runs_of(store, experiment_id=one)) for one in experiments]
        print_document({"preset": name, "scale": size, "experiments": outcomes, **_verdicts(state)})
    elif wait or here:
        print_preset(chosen, state)
    if (wait or here) and not all(run.state in {*GOOD_OUTCOMES, "out_of_memory"} for run in runs):
        raise typer.Exit(EXIT_BAD_OUTCOME)


def queue_preset(store: Store, chosen: Preset, scale: str) -> list[int]:
    """Queue it; the ids of its experiments."""
    submitted = submit_preset(store, chosen, scale, "command line")
    count = sum(len(one.run_ids) for one in submitted)
    say(f"{chosen.name} at {scale} scale: {count} runs queued in {len(submitted)} experiments")
    say_if_nothing_serves(store)
    return [one.experiment_id for one in submitted]


def run_here(store: Store, chosen: Preset, scale: str) -> list[int]:
    """Run it in this process; the ids of its experiments."""
    from attnlab.run import run_here as run_experiment

    with redirect_stdout(sys.stderr):
        specs = chosen.specs(scale)
        return [run_experiment(store, spec, created_by="command line", tags=(chosen.tag,)) for spec in specs]


def verdict_words(state: PresetState) -> str:
    """``2 hold, 4 do not, 1 not measurable``."""
    kinds = [verdict.kind for verdict in state.verdicts.values()]
    told = {
        "holds": "hold",
        "does_not_hold": "do not",
        "not_measurable": "not measurable",
        "not_run": "not run",
    }
    return ", ".join(f"{kinds.count(kind)} {words}" for kind, words in told.items() if kind in kinds) or "-"


def print_preset(chosen: Preset, state: PresetState) -> None:
    """Title, claims and verdicts as text for a terminal."""
    typer.echo(f"{chosen.title} ({chosen.name})\n{chosen.about}")
    if chosen.correction:
        typer.echo(f"Not so: {chosen.correction}")
    rows = []
    for claim in chosen.claims:
        verdict = state.verdicts[claim.id]
        runs = ", ".join(map(str, verdict.runs))
        rows.append((claim.says, KIND_WORDS[verdict.kind], verdict.reason, runs))
    if rows:
        print_table(("claim", "verdict", "reason", "runs"), rows, empty="")
    for grid in chosen.grids:
        typer.echo(f"experiment: {grid.name}")


def _verdicts(state: PresetState) -> dict[str, Any]:
    return {"claims": [verdict.to_dict() for verdict in state.verdicts.values()]}


def _runs(store: Store, experiments: list[int]) -> list[RunRow]:
    return [run for one in experiments for run in runs_of(store, experiment_id=one)]
