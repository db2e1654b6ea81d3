"""One experiment as one HTML page that opens offline: plotly.js inside, maps as PNG, user text escaped."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
import yaml

from attnlab.compare import MAX_RUNS, CompareRow, compare_runs, flatten, map_distance
from attnlab.describe import experiment_document
from attnlab.export.html import Markup, details, notes, picture, section, table, text
from attnlab.export.image import render_comparison
from attnlab.export.strips import head_strip
from attnlab.views import figures
from attnlab.views.chart import Axes, chart_info
from attnlab.views.chart_figure import chart_figure
from attnlab.views.errors import ViewError
from attnlab.views.labels import OUTCOME_WORDS, format_bytes, ran_as, run_label, shown_outcome
from attnlab.views.roofline import roofline_figure, roofline_info
from attnlab.views.viewport import recorded
from attnlab_storage import results
from attnlab_storage.database import Store

MAX_PICTURED_RUNS = 8
SCALING = ("latency_ms", "attention_latency_ms", "peak_memory_bytes", "attention_peak_memory_bytes")
LAYERS_SHOWN = 3
_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'"
)
_CONFIG = {"displaylogo": False, "responsive": True, "plotlyServerURL": ""}


def write_report(store: Store, experiment_id: int) -> str:
    """The page. A content policy inside it forbids every request, so it cannot ask for anything.

    Raises NotFound for an unknown experiment.
    """
    document = experiment_document(store, experiment_id)
    runs = document["runs"]
    charts = _charts(runs) + _statistics(store, runs)
    spec = yaml.safe_dump(document["spec"], sort_keys=False, allow_unicode=True)
    body = [
        _head(document),
        section("Runs", _runs_table(runs)),
        _differences(store, runs),
        section("Measurements", *charts),
        section("Attention maps", *_maps(store, runs)),
        section("Input", *_inputs(store, runs)),
        section("Environment", *_environments(runs)),
        section("Spec", f"<pre>{text(spec)}</pre>"),
    ]
    return _page(document["name"], "".join(body), with_plotly=bool(charts))


def _page(title: str, body: str, *, with_plotly: bool) -> str:
    from plotly.offline import get_plotlyjs

    style = files("attnlab.export").joinpath("report.css").read_text(encoding="utf-8")
    script = f"<script>{get_plotlyjs()}</script>" if with_plotly else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)} · attnlab</title><style>{style}</style>{script}</head>"
        f"<body>{body}</body></html>\n"
    )


def _head(document: Mapping[str, Any]) -> Markup:
    made = datetime.datetime.fromtimestamp(document["created_at"], datetime.UTC).strftime(
        "%Y-%m-%d %H:%M UTC"
    )
    facts = [f"experiment {document['experiment']}", f"submitted {made}", f"{len(document['runs'])} runs"]
    if document["created_by"]:
        facts.append(f"by {document['created_by']}")
    if document["tags"]:
        facts.append("tags " + ", ".join(document["tags"]))
    note = f"<p>{text(document['note'])}</p>" if document["note"] else ""
    return Markup(f'<h1>{text(document["name"])}</h1><p class="quiet">{text(" · ".join(facts))}</p>{note}')


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Markup:
    head = ["run", "outcome", "kernel that ran", "tokens", "dtype", "forward ms (p10-p90)", "peak memory"]
    head += ["rows sum to 1 within", "P V equals output within", "swap"]
    rows = []
    for run in runs:
        timing, check = run["latency_ms"], run["map_check"]
        reason = run.get("speed_withheld") or run["reason"]
        outcome = OUTCOME_WORDS[shown_outcome(run)] + (f": {reason}" if reason else "")
        took = timing and f"{timing['median']:.4g} ({timing['p10']:.4g}-{timing['p90']:.4g})"
        peak = run["peak_memory_bytes"]
        memory = None if peak is None else format_bytes(peak)
        row = [run_label(run), outcome, ran_as(run), run["sequence_length"], run["dtype"], took, memory]
        rows.append([*row, check["row_sum_defect"], check["output_defect"], _swap(run["swap"])])
    return table(head, rows, [i for i, run in enumerate(runs) if run["state"] != "succeeded"])


def _swap(swap: Mapping[str, Any]) -> str | None:
    loss = ", ".join(f"{name} {value:.3g}" for name, value in swap["loss"].items())
    return f"{swap['kind']} ({loss})" if swap["kind"] and loss else swap["kind"]


def _differences(store: Store, runs: Sequence[Mapping[str, Any]]) -> Markup:
    if not len(runs) >= 2:
        return Markup("")
    comparison = compare_runs(store, [run["id"] for run in runs[:MAX_RUNS]])
    lines = list(comparison.notes)
    if len(runs) > MAX_RUNS:
        lines.append(f"The table holds the first {MAX_RUNS} of {len(runs)} runs.")
    head = ["", *comparison.labels]
    rows = [[f"{row.group} · {row.name}", *_with_ratios(row)] for row in comparison.varying]
    return section("What differs", notes(lines), table(head, rows))


def _with_ratios(row: CompareRow) -> list[Any]:
    size = row.name.endswith("_bytes")
    shown = [format_bytes(value) if size and value is not None else text(value) for value in row.values]
    return [
        one if ratio is None or i == 0 else f"{one} ({ratio:.3g}x)"
        for i, (one, ratio) in enumerate(zip(shown, row.ratios, strict=True))
    ]


def _charts(runs: Sequence[Mapping[str, Any]]) -> list[Markup]:
    charts = [
        _chart(figures.latency_figure(figures.latency_info(runs, value)))
        for value in figures.LATENCIES
        if any(run[value] for run in runs)
    ]
    charts += [
        _chart(figures.memory_figure(figures.memory_info(runs, value)))
        for value in figures.MEMORIES
        if any(run[value] is not None for run in runs)
    ]
    if len({run["sequence_length"] for run in runs}) > 1:
        for value in SCALING:
            info = chart_info(runs, Axes("sequence_length", value, "mechanism"))
            if any(line.points for line in info.lines):
                charts.append(_chart(chart_figure(info)))
    roofs = roofline_info(runs)
    return [*charts, _chart(roofline_figure(roofs))] if roofs.points else charts


def _statistics(store: Store, runs: Sequence[Mapping[str, Any]]) -> list[Markup]:
    charts = []
    for run in [run for run in runs if run["statistics"]][:MAX_PICTURED_RUNS]:
        rows = results.measurements(store, run["id"])
        inside = [
            _chart(figures.statistic_figure(figures.statistic_info(rows, name, title=name.replace("_", " "))))
            for name in run["statistics"]
        ]
        charts.append(details(f"Statistics of every head: {run_label(run)}", "".join(inside)))
    return charts


def _chart(figure: go.Figure) -> Markup:
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG))


def _maps(store: Store, runs: Sequence[Mapping[str, Any]]) -> list[Markup]:
    mapped = [run for run in runs if run["map_check"]["row_sum_defect"] is not None]
    parts: list[Markup] = []
    for run in mapped[:MAX_PICTURED_RUNS]:
        parts.append(Markup(f"<h3>{text(run_label(run))}</h3>"))
        layers = [trace.layer for trace in recorded(store, run["id"])[1]]
        for layer in _spread(layers, LAYERS_SHOWN):
            caption = f"Layer {layer}, all heads; maximum under each pixel, logarithmic over five decades"
            parts.append(picture(head_strip(store, run["id"], layer), caption))
    if len(mapped) > MAX_PICTURED_RUNS:
        parts.append(notes([f"Maps of the first {MAX_PICTURED_RUNS} of {len(mapped)} runs."]))
    return [*_furthest_heads(store, mapped), *parts]


def _furthest_heads(store: Store, mapped: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """The first two runs side by side at the head where their maps are furthest apart."""
    if len(mapped) < 2:
        return []
    a, b = mapped[0]["id"], mapped[1]["id"]
    common = {trace.layer for trace in recorded(store, a)[1]} & {t.layer for t in recorded(store, b)[1]}
    try:
        distance = map_distance(store, a, b, _spread(sorted(common), LAYERS_SHOWN), max_rows=64)
    except ViewError as refusal:
        return [notes([f"Runs {a} and {b} have no difference map: {refusal}"])]
    place = divmod(int(distance.total_variation.argmax()), distance.total_variation.shape[1])
    layer, head = distance.layers[place[0]], place[1]
    apart = f"total variation {distance.total_variation[place]:.3g}, {distance.note}"
    caption = (
        f"L{layer}H{head}, of layers {distance.layers} the head where runs {a} and {b} differ most ({apart})"
    )
    return [picture(render_comparison(store, [a, b], layer, head, scale="log"), caption)]


def _spread(layers: Sequence[int], most: int) -> list[int]:
    """First, last and evenly between: at most ``most`` of the layers."""
    if len(layers) <= most:
        return list(layers)
    return [layers[i * (len(layers) - 1) // (most - 1)] for i in range(most)]


def _inputs(store: Store, runs: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Every different text once, with the runs that read it."""
    readers: dict[str, list[str]] = {}
    for run in runs:
        row = results.run_input(store, run["id"])
        if row is not None and row.text:
            readers.setdefault(row.text, []).append(f"#{run['id']}")
    return [details(f"Text of {', '.join(ids)}", f"<pre>{text(said)}</pre>") for said, ids in readers.items()]


def _environments(runs: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Every different environment once, with the runs that were done in it."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for run in runs:
        if run["environment"]:
            same = [ids for machine, ids in found if machine == run["environment"]]
            if same:
                same[0].append(f"#{run['id']}")
            else:
                found.append((run["environment"], [f"#{run['id']}"]))
    return [
        details(f"Environment of {', '.join(ids)}", table(["", ""], flatten(machine).items()))
        for machine, ids in found
    ]
