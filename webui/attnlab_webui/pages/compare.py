"""Two or more runs side by side: linked maps on one colour scale, their difference, timing, memory, what differs.

`/compare?runs=3,7&pair=3,7&layer=5&head=2&rows=0:128`: runs and pair are read here, the rest by the maps.
`/compare?runs=3&against=5:2`: every head of one run against one of its own, which stands still.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from attnlab.compare import MAX_RUNS, CompareError, compare_runs
from attnlab.describe import run_document
from attnlab.views.errors import ViewError
from attnlab.views.figures import latency_figure, latency_info, memory_figure, memory_info
from attnlab_storage import results
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow
from attnlab_webui import chart_panel, compare_view, heatmap, pieces, serving_view
from attnlab_webui.chart_view import STATE_JS, Chosen, panel, read_choice

CHOICES = 200
MOST_MAPS = 6  # panels beside the difference; more are compared in charts and table only
LATEST: dict[str, Any] = {**pieces.INTERNAL, "trigger_mode": "always_last"}
"""a pick that comes while the last one is answered is answered too"""

# writes what was chosen into the address, so that the link shows the same
CHOSEN_JS = """(runs, first, second) => {
  const params = new URLSearchParams(window.location.search);
  if (runs.length) params.set("runs", runs.join(",")); else params.delete("runs");
  if (runs.length !== 1) params.delete("against");
  if (first && second && runs.length > 2) params.set("pair", `${first},${second}`); else params.delete("pair");
  const words = params.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
  history.replaceState(history.state, "", `${window.location.pathname}?${words}`);
  return [runs, first, second];
}"""


@dataclass(frozen=True)
class Asked:
    """What an address asks for: runs in order, the pair whose difference is shown, and what it got wrong."""

    runs: tuple[int, ...] = ()
    pair: tuple[int, int] | None = None
    problem: str = ""
    against: tuple[int, int] | None = None
    """of a single run: the layer and head that its others are compared with"""


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("compare")
    with gr.Row(elem_classes="at-compare-pick"):
        runs = gr.Dropdown(
            [],
            multiselect=True,
            label="Runs",
            elem_id="compare-runs",
            scale=8,
            max_choices=MAX_RUNS,
            filterable=True,
        )
        first = gr.Dropdown(
            [], label="Difference: A", elem_id="compare-a", scale=1, min_width=110, visible=False
        )
        second = gr.Dropdown([], label="minus B", elem_id="compare-b", scale=1, min_width=110, visible=False)
        swap = gr.Button(
            "Swap A and B", size="sm", elem_id="compare-swap", scale=0, min_width=110, visible=False
        )
    notice = gr.HTML("", elem_id="compare-notice", js_on_load=None)
    view = heatmap.component("compare-map")
    with gr.Row(visible=False, equal_height=True) as charts:
        latency = gr.Plot(show_label=False, elem_id="compare-latency")
        attention = gr.Plot(show_label=False, elem_id="compare-attention")
        memory = gr.Plot(show_label=False, elem_id="compare-memory")
    with gr.Row(visible=False) as served:
        waits = [
            gr.Plot(show_label=False, elem_id=f"compare-{name}") for name in ("rate", "first", "between")
        ]
    with gr.Column(visible=False) as own:
        chart = chart_panel.build("compare-chart")
    table = gr.HTML("", elem_id="compare-table", js_on_load=None)
    exports = gr.HTML("", elem_id="compare-exports", js_on_load=None)

    pickers = [runs, first, second, swap]
    shown = [notice, view, charts, latency, attention, memory, table, exports]

    def load(request: gr.Request) -> list[Any]:
        asked = read_address(store, dict(request.query_params))
        return [*picker_values(store, asked), *page_values(store, asked)]

    def choose(chosen: Sequence[int], a: int | None, b: int | None) -> list[Any]:
        asked = chosen_runs(chosen, a, b)
        # the runs stay as they are picked: an answer to the last pick must not take back the next
        return [gr.skip(), *picker_values(store, asked)[1:], *page_values(store, asked)]

    def exchange(chosen: Sequence[int], a: int | None, b: int | None) -> list[Any]:
        asked = chosen_runs(list(reversed(chosen)) if len(chosen) == 2 else chosen, b, a)
        return [*picker_values(store, asked), *page_values(store, asked)]

    follow_runs(store, runs, own, chart)
    follow_served(store, runs, [served, *waits])
    pieces.page().load(load, None, [*pickers, *shown], **pieces.INTERNAL)
    for picker in (runs, first, second):
        picker.input(choose, [runs, first, second], [*pickers, *shown], js=CHOSEN_JS, **LATEST)
    swap.click(exchange, [runs, first, second], [*pickers, *shown], **pieces.INTERNAL).then(
        None, [runs, first, second], None, js=CHOSEN_JS
    )


def follow_runs(store: Store, runs: Any, own: Any, chart: chart_panel.ChartPanel) -> None:
    """Wire the chart with axes of one's own: it shows the chosen runs, by its pickers or the address."""
    outputs = [own, *chart.outputs.values()]
    pickers = list(chart.pickers.values())

    def draw(run_ids: Sequence[int], chosen: Chosen) -> list[Any]:
        documents = [run_document(store, run_id) for run_id in run_ids] if len(run_ids) > 1 else []
        visible = bool(documents) and not all_served(documents)
        return [gr.update(visible=visible), *chart_panel.updates(panel(documents, chosen))]

    def load(request: gr.Request) -> list[Any]:
        query = dict(request.query_params)
        return draw(read_address(store, query).runs, read_choice(query))

    def pick(changed: str) -> Any:
        return lambda run_ids, *picked: draw(run_ids, chart_panel.choice_of(changed, *picked))

    pieces.page().load(load, None, outputs, **pieces.INTERNAL)
    runs.input(lambda run_ids: draw(run_ids, Chosen()), runs, outputs, **LATEST)
    for name, picker in chart.pickers.items():
        picker.input(pick(name), [runs, *pickers], outputs, **pieces.INTERNAL).then(
            None, pickers, None, js=STATE_JS
        )


def all_served(documents: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no run of these has a forward pass to time or weigh: their charts are those of serving."""
    return all(document["phase"] == "serving" for document in documents)


def follow_served(store: Store, runs: Any, outputs: list[Any]) -> None:
    """Wire the charts of served runs: rates and waits of those chosen."""

    def draw(run_ids: Sequence[int]) -> list[Any]:
        chosen = results.runs_of(store, run_ids=run_ids) if len(run_ids) > 1 else []
        figures = serving_view.compare_figures(store, chosen)
        return [gr.update(visible=figures[0] is not None), *figures]

    def load(request: gr.Request) -> list[Any]:
        return draw(read_address(store, dict(request.query_params)).runs)

    pieces.page().load(load, None, outputs, **pieces.INTERNAL)
    runs.input(draw, runs, outputs, **LATEST)


def read_address(store: Store, query: Mapping[str, str]) -> Asked:
    """Runs and pair of an address; what cannot be read becomes one sentence."""
    text = query.get("runs", "").strip()
    if not text:
        return Asked()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and len(part) < 19 for part in parts):
        return Asked(problem=f"runs must be run ids separated by commas, got {text[:60]!r}")
    wanted = tuple(dict.fromkeys(int(part) for part in parts))
    known = {row.id for row in results.runs_of(store, run_ids=wanted) if row.deleted_at is None}
    unknown = [run for run in wanted if run not in known]
    problem = f"There is no run {', '.join(str(run) for run in unknown)}; it is left out." if unknown else ""
    pair = [int(part) for part in query.get("pair", "").split(",") if part.isdigit() and len(part) < 19]
    asked = chosen_runs([run for run in wanted if run in known], *(pair if len(pair) == 2 else (None, None)))
    return replace(
        asked, problem=problem, against=_head(query.get("against", "")) if len(asked.runs) == 1 else None
    )


def _head(text: str) -> tuple[int, int] | None:
    """``"5:2"`` as layer and head."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    return None if match is None else (int(match[1]), int(match[2]))


def chosen_runs(chosen: Sequence[int], a: int | None, b: int | None) -> Asked:
    """The runs with the pair whose difference is shown: as asked where that makes sense, else the first two."""
    runs = tuple(dict.fromkeys(int(run) for run in chosen or ()))
    if len(runs) < 2:
        return Asked(runs)
    if a in runs and b in runs and a != b and a is not None and b is not None:
        return Asked(runs, (a, b) if len(runs) > 2 else (runs[0], runs[1]))
    return Asked(runs, (runs[0], runs[1]))


def picker_values(store: Store, asked: Asked) -> list[Any]:
    """Updates of the run picker, the pair and the swap button."""
    rows = results.list_runs(store, filters={"state": "succeeded"}, limit=CHOICES).rows
    missing = [run for run in asked.runs if run not in {row.id for row in rows}]
    rows = [*results.runs_of(store, run_ids=missing), *rows]
    choices = [(compare_view.choice(row), row.id) for row in rows]
    pair = asked.pair or (None, None)
    many = len(asked.runs) > 2
    few = [(f"#{run}", run) for run in asked.runs]
    return [
        gr.update(choices=choices, value=list(asked.runs)),
        gr.update(choices=few, value=pair[0], visible=many),
        gr.update(choices=few, value=pair[1], visible=many),
        gr.update(visible=len(asked.runs) > 1),
    ]


def page_values(store: Store, asked: Asked) -> list[Any]:
    """Notice, maps, charts, table and exports."""
    problem = pieces.notice(asked.problem, "error") if asked.problem else ""
    nothing: list[Any] = [gr.update(visible=False), None, None, None, "", ""]
    if asked.against is not None and len(asked.runs) == 1:
        return [
            problem + compare_view.of_one_run(asked.runs[0], asked.against),
            map_value(store, asked),
            *nothing,
        ]
    if len(asked.runs) < 2:
        rows = results.list_runs(store, filters={"state": "succeeded"}, limit=50).rows
        empty = compare_view.empty(rows)
        return [problem + empty, "", *nothing]
    try:
        comparison = compare_runs(store, asked.runs)
    except (CompareError, ViewError) as error:
        words = problem + pieces.notice(str(error), "error")
        return [words, "", *nothing]
    documents = comparison.documents
    return [
        problem + compare_view.notes(comparison),
        map_value(store, asked),
        gr.update(visible=not all_served(documents)),
        latency_figure(latency_info(documents)),
        latency_figure(latency_info(documents, "attention_latency_ms")),
        memory_figure(memory_info(documents)),
        compare_view.table(comparison),
        compare_view.exports(asked.runs),
    ]


def map_value(store: Store, asked: Asked) -> str:
    """The maps of the runs that have any, the pair first when there are too many for one row."""
    with_maps = [row for row in results.runs_of(store, run_ids=asked.runs) if _has_maps(store, row)]
    ids = [row.id for row in with_maps]
    if not ids:
        return heatmap.message("None of these runs recorded maps.")
    pair = [run for run in asked.pair or () if run in ids]
    ids = [*pair, *(run for run in ids if run not in pair)][:MOST_MAPS]
    stamp = "-".join(f"{row.attempt}.{row.finished_at or 0:.0f}" for row in with_maps)
    pair = pair if len(pair) == 2 else None
    return heatmap.config(ids, mode="compare", pair=pair, stamp=stamp, against=asked.against)


def _has_maps(store: Store, row: RunRow) -> bool:
    return bool(results.traces(store, row.id))
