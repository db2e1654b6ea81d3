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
from attnlab_webui import chart_panel, compare_view, drawing, heatmap, pieces, serving_view
from attnlab_webui.chart_view import panel, read_choice

CHOICES = 200
MOST_MAPS = 6  # panels beside the difference; more are compared in charts and table only
# an address names what is compared: the runs, and of more than two the pair whose difference is shown
ADDRESS = """{
  runs: runs.join(","),
  pair: first && second && runs.length > 2 ? `${first},${second}` : null,
  ...(runs.length !== 1 && { against: null }),
}"""
CHOSEN_JS = f"(runs, first, second) => {{ {drawing.MODULE}.then((address) => address.choose({ADDRESS})); }}"
SWAP_JS = f"""(chosen, second, first) => {{
  const runs = chosen.length === 2 ? [...chosen].reverse() : chosen;
  {drawing.MODULE}.then((address) => address.choose({ADDRESS}));
  return [runs, first, second];
}}"""


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

    asked = drawing.address()
    pair = [first, second, swap]
    shown = [notice, view, charts, latency, attention, memory, table, exports]

    def show(query: str) -> list[Any]:
        wanted = read_address(store, drawing.read(query))
        return [*picker_values(store, wanted)[1:], *page_values(store, wanted)]

    def fill(query: str) -> Any:
        return picker_values(store, read_address(store, drawing.read(query)))[0]

    drawing.draw(show, asked, [], [*pair, *shown])
    draw_chart(store, asked, own, chart)
    draw_served(store, asked, [served, *waits])
    # later nobody but the reader picks runs
    pieces.page().load(fill, asked, runs, js=drawing.SEND_JS, **pieces.INTERNAL)
    for picker in (runs, first, second):
        picker.input(None, [runs, first, second], None, js=CHOSEN_JS)
    swap.click(None, [runs, first, second], [runs, first, second], js=SWAP_JS)


def draw_chart(store: Store, asked: Any, own: Any, chart: chart_panel.ChartPanel) -> None:
    """Wire the chart with axes of one's own: it shows the runs of the address, by its pickers."""

    def show(query: str) -> list[Any]:
        given = drawing.read(query)
        runs = read_address(store, given).runs
        documents = [run_document(store, run) for run in runs] if len(runs) > 1 else []
        visible = bool(documents) and not all_served(documents)
        return [gr.update(visible=visible), *chart_panel.updates(panel(documents, read_choice(given)))]

    drawing.draw(show, asked, [], [own, *chart.outputs.values()])
    chart_panel.follow_choices(chart)


def all_served(documents: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no run of these has a forward pass to time or weigh: their charts are those of serving."""
    return all(document["phase"] == "serving" for document in documents)


def draw_served(store: Store, asked: Any, outputs: list[Any]) -> None:
    """Wire the charts of served runs: rates and waits of those chosen."""

    def show(query: str) -> list[Any]:
        runs = read_address(store, drawing.read(query)).runs
        chosen = results.runs_of(store, run_ids=runs) if len(runs) > 1 else []
        figures = serving_view.compare_figures(store, chosen)
        return [gr.update(visible=figures[0] is not None), *figures]

    drawing.draw(show, asked, [], outputs)


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
        chosen = results.runs_of(store, run_ids=asked.runs) if asked.runs else []
        empty = compare_view.empty(rows, chosen[0] if chosen else None)
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
