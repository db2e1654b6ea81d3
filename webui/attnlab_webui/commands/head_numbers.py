"""`attnlab statistics` and `attnlab distances`: a run's heads in numbers, and how far they are from others."""

from typing import Annotated, Any

import typer

from attnlab.heads import statistics_document
from attnlab.views.distances import MEASURES, head_distances, run_distances
from attnlab.views.statistics import STATISTICS
from attnlab_webui.commands.console import (
    JsonOption,
    print_document,
    print_table,
    reading_store,
    refuse,
    say,
    short_number,
)
from attnlab_webui.commands.targets import find_runs, parse_target

AT_FIRST = ("entropy", "sink_mass", "previous_token", "induction", "mean_distance")
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="3 or run:3.")]


def statistics(
    run: RunArgument,
    name: Annotated[list[str] | None, typer.Option(help="A statistic; may be repeated. JSON: all.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be repeated.")] = None,
    json: JsonOption = False,
) -> None:
    """Print what was measured of every head of a run."""
    unknown = [one for one in name or () if one not in STATISTICS]
    if unknown:
        refuse(f"--name must be one of {', '.join(STATISTICS)}, got {unknown[0]!r}")
    store, run_id = reading_store(), _run_id(run)
    found = statistics_document(store, run_id)
    if json:
        kept = found if name is None else {one: found[one] for one in name if one in found}
        print_document({"run": run_id, "statistics": kept})
        return
    names = [one for one in name or AT_FIRST if one in found]
    heads = sorted(
        {(at, head) for one in names for at in found[one]["layers"] for head in found[one]["heads"]}
    )
    rows = []
    for number, head in heads:
        if layer is None or number in layer:
            values = [_value(found[one], number, head) for one in names]
            rows.append((f"L{number}H{head}", *(short_number(value) for value in values)))
    print_table(("head", *names), rows, empty=f"run {run_id} kept none of these statistics")


def distances(
    run: RunArgument,
    other: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Compare with this run.")] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Layers of both runs; of one run, the layer whose heads are compared, or two."),
    ] = None,
    measure: Annotated[str, typer.Option(help=f"Order by {', '.join(MEASURES)}.")] = MEASURES[0],
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows.")] = 20,
    max_rows: Annotated[int, typer.Option(min=1, help="Query rows to sample of each map.")] = 64,
    json: JsonOption = False,
) -> None:
    """Print how far the maps of two runs are apart, or those of one run's heads, most distant first."""
    store, run_id = reading_store(), _run_id(run)
    if other is not None:
        grid = run_distances(store, run_id, _run_id(other), layer, max_rows)
    elif layer is None or len(layer) > 2:
        refuse("--layer must be given once or twice to compare the heads of one run, or name a second RUN")
    else:
        grid = head_distances(store, run_id, layer[0], layer[-1], max_rows)
    changed = grid.most_changed(measure, grid.pairs.size)
    if json:
        print_document(grid.to_json())
        return
    at = {tuple(pair): place for place, pair in enumerate(grid.pairs.reshape(-1, 4).tolist())}
    rows = []
    for one in changed:
        if one.layer == one.layer_b and other is None and one.head >= one.head_b:
            continue  # every pair of one run's heads stands in the grid twice
        place = at[tuple(one[:4])]
        values = [short_number(float(grid.measures[name].ravel()[place])) for name in MEASURES]
        rows.append((f"L{one.layer}H{one.head}", f"L{one.layer_b}H{one.head_b}", *values))
    columns = ("head", "other", *(name.replace("_", " ") for name in MEASURES))
    print_table(columns, rows[:limit], empty="no two heads to compare")
    say(grid.note)


def _run_id(text: str) -> int:
    target = parse_target(text)
    if target.kind != "run":
        refuse(f"RUN must be the number of one run, got {text!r}")
    return find_runs(reading_store(), target)[0].id


def _value(info: dict[str, Any], layer: int, head: int) -> float | None:
    if layer not in info["layers"] or head not in info["heads"]:
        return None
    return info["values"][info["layers"].index(layer)][info["heads"].index(head)]
