"""One experiment: its runs, their maps, timings, memory, checks, environment and log.

`/experiment?id=3&run=7&layer=5&head=2&rows=0:128`: id and run are read here, the rest by the map itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from attnlab.describe import run_document
from attnlab_storage import queue, results
from attnlab_storage.database import Store
from attnlab_storage.results import ExperimentRow, RunRow
from attnlab_webui import chart_panel, drawing, experiment_view, heatmap, pieces, serving_view, theme
from attnlab_webui.chart_view import PARTS, Chosen, panel, read_choice
from attnlab_webui.memory_view import memory_charts

TICK_SECONDS = 1.5
LOG_LINES = 200
MAX_RUNS_CHARTED = 96
RECENT = 5
RUNS_JS = 'import("{url}/js/runs.js").then((module) => module.mount(element, trigger, watch)); // "select"'
TABS = ("log", "charts", "memory", "serving", "environment", "spec")
CHARTS = (
    *PARTS,
    "figure",
    "note",
    "chart_table",
    "timeline",
    "kernel_timeline",
    "holders",
    *serving_view.CHARTS,
)

ENDED_WORDS = {
    "failed": "failed",
    "out_of_memory": "ran out of memory",
    "unsupported": "asked for something that its implementation does not support",
    "timed_out": "took longer than it was given",
    "cancelled": "was cancelled",
}


@dataclass
class Seen:
    """What one open page shows: the choice, the store's revision, and the last value of every output."""

    experiment: int | None = None
    run: int | None = None
    tab: str = ""
    chosen: Chosen = field(default_factory=Chosen)
    revision: int = -1
    values: dict[str, Any] = field(default_factory=dict)


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("experiment")
    seen = gr.State(Seen())
    missing = gr.HTML("", elem_id="experiment-missing", js_on_load=None)
    notice = gr.HTML("", elem_id="experiment-notice", js_on_load=None)
    with gr.Row(elem_classes="at-page-head"):
        with gr.Column(scale=1, min_width=400):
            header = gr.HTML("", elem_id="experiment-header", js_on_load=None)
        with gr.Row(visible=False, elem_classes="at-buttons") as buttons:
            cancel = gr.Button("Cancel", size="sm", elem_id="cancel")
            retry = gr.Button("Retry", size="sm", elem_id="retry")
            clone = gr.Button("Clone", size="sm", elem_id="clone", link="/")
            delete = gr.Button("Delete", size="sm", elem_id="delete")
            undo = gr.Button("Undo delete", size="sm", elem_id="undo", visible=False)
    runs = gr.HTML(
        "",
        elem_id="experiment-runs",
        js_on_load=RUNS_JS.format(url=theme.STATIC_URL),
        apply_default_css=False,
    )
    with gr.Row(visible=False, equal_height=False, elem_classes="at-result") as result:
        with gr.Column(scale=7, min_width=560):
            view = heatmap.component("experiment-map")
            with gr.Column(visible=False) as served:
                cache = gr.Plot(show_label=False, elem_id="experiment-cache")
                requests = gr.Plot(show_label=False, elem_id="experiment-requests")
        with gr.Column(scale=3, min_width=300):
            facts = gr.HTML("", elem_id="experiment-facts", js_on_load=None)
    with gr.Tabs(visible=False, elem_classes="at-tabs") as tabs:
        with gr.Tab("Log", id="log") as log_tab:
            log = gr.HTML("", elem_id="experiment-log", js_on_load=None, autoscroll=True)
        with gr.Tab("Charts of all runs", id="charts") as charts:
            chart = chart_panel.build("experiment-chart")
        with gr.Tab("Memory over time", id="memory") as memory_tab:
            with gr.Row():
                timeline = gr.Plot(show_label=False, elem_id="experiment-timeline")
                kernel_timeline = gr.Plot(show_label=False, elem_id="experiment-kernel-timeline")
            holders = gr.HTML("", elem_id="experiment-holders", js_on_load=None)
        with gr.Tab("Serving, all runs", id="serving", visible=False) as serving_tab, gr.Row():
            rate, first, between = (
                gr.Plot(show_label=False, elem_id=f"experiment-{name}", min_width=400)
                for name in ("rate", "first", "between")
            )
        with gr.Tab("Environment", id="environment"):
            environment = gr.HTML("", elem_id="experiment-environment", js_on_load=None)
        with gr.Tab("Spec", id="spec"):
            spec = gr.HTML("", elem_id="experiment-spec", js_on_load=None)
    timer = gr.Timer(TICK_SECONDS, active=False)

    outputs: dict[str, Any] = {
        "header": header,
        "buttons": buttons,
        "cancel": cancel,
        "retry": retry,
        "clone": clone,
        "delete": delete,
        "undo": undo,
        "runs": runs,
        "result": result,
        "view": view,
        "facts": facts,
        "tabs": tabs,
        "log": log,
        "environment": environment,
        "spec": spec,
        **chart.outputs,
        "timeline": timeline,
        "kernel_timeline": kernel_timeline,
        "holders": holders,
        **dict(zip(serving_view.CHARTS, (rate, first, between, cache, requests), strict=True)),
        "served": served,
        "serving_tab": serving_tab,
        "timer": timer,
    }
    asked = drawing.address()

    def show(query: str, now: Seen) -> list[Any]:
        given = drawing.read(query)
        wanted = seen_of(store, given, now)
        if wanted == now and results.revision(store) == now.revision:
            return [gr.skip()] * (2 + len(outputs))
        unknown = asked_for_nothing(store, wanted, given.get("id", ""))
        values = draw(store, wanted, first=now.revision < 0)
        return [wanted, unknown, *(_update(values[name]) for name in outputs)]

    def act(action: Any) -> Any:
        return lambda query, now: action(store, seen_of(store, drawing.read(query), now))

    drawing.draw(show, asked, [seen], [seen, missing, *outputs.values()], timer.tick)
    for button, action in ((cancel, on_cancel), (retry, on_retry), (delete, on_delete), (undo, on_undo)):
        button.click(act(action), [asked, seen], notice, js=drawing.SEND_JS, **pieces.ACTION).then(
            None, None, None, js=drawing.DRAW_JS
        )
    runs.select(None, None, notice, js='() => ""')
    chart_panel.follow_choices(chart)
    for name, tab in (("log", log_tab), ("charts", charts), ("memory", memory_tab), ("serving", serving_tab)):
        tab.select(None, None, None, js=drawing.choose(f'{{ tab: "{name}" }}'))


def seen_of(store: Store, query: Mapping[str, str], now: Seen) -> Seen:
    """What the address asks for, with what the page shows already."""
    asked = replace(
        now, experiment=_number(query.get("id")), run=_number(query.get("run")), chosen=read_choice(query)
    )
    named = query.get("tab", "charts" if "chart" in query else "")
    tab = named if named in TABS else now.tab
    if tab and tab != "serving":
        return replace(asked, tab=tab)
    return replace(asked, tab="serving" if serving_view.is_served(_rows(store, asked)) else "log")


def draw(store: Store, now: Seen, *, first: bool = False) -> dict[str, Any]:
    """Every output that changed since the page was last drawn; the others are skipped."""
    now.revision = results.revision(store)
    values = page_values(store, now)
    changed = {
        name: gr.skip() if not first and now.values.get(name) == value else value
        for name, value in values.items()
    }
    if first:  # later the tabs are the reader's
        changed["tabs"] = {**values["tabs"], "selected": now.tab}
    now.values = values
    return changed


def page_values(store: Store, now: Seen) -> dict[str, Any]:
    """The value of every output; dictionaries are component updates."""
    experiment = results.get_experiment(store, now.experiment) if now.experiment else None
    if experiment is None:
        return _nothing()
    rows = results.runs_of(store, experiment_id=experiment.id)
    run = chosen_run(rows, now.run)
    document = run_document(store, run.id) if run else None
    live = [row for row in rows if not row.ended]
    hidden = experiment.deleted_at is not None
    retriable = [row for row in rows if row.ended and row.state != "succeeded"]
    facts = experiment_view.run_facts(document, run) if document and run else ""
    return {
        "header": experiment_view.header(experiment, rows),
        "buttons": {"visible": True},
        "cancel": {"value": f"Cancel {_count(live)}", "interactive": bool(live), "visible": not hidden},
        "retry": {
            "value": f"Retry {_count(retriable)}",
            "interactive": bool(retriable),
            "visible": not hidden,
        },
        "clone": {"link": f"/?clone={experiment.id}"},
        "delete": {"visible": not hidden},
        "undo": {"visible": hidden},
        "runs": experiment_view.runs_table(rows, run.id if run else None),
        "result": {"visible": run is not None},
        "view": {"visible": False} if serving_view.is_served(rows) else map_value(store, run),
        "facts": facts,
        "tabs": {"visible": run is not None},
        "log": experiment_view.log(results.log_tail(store, run.id, LOG_LINES) if run else ""),
        "environment": experiment_view.environment(document["environment"] if document else None),
        "spec": experiment_view.spec(experiment),
        "served": {"visible": serving_view.is_served(rows)},
        "serving_tab": {"visible": serving_view.is_served(rows)},
        "timer": {"active": bool(live)},
        **chart_values(store, now, run),
    }


def chart_values(store: Store, now: Seen, run: RunRow | None) -> dict[str, Any]:
    """The charts of the open tab; those of the others stay what they were, and are made when one opens them."""
    values = {name: now.values.get(name) for name in CHARTS}
    if now.tab == "charts":
        shown = panel(charted(store, now.experiment), now.chosen)
        values |= chart_panel.values(shown)
    elif now.tab == "memory":
        made = memory_charts(store, run.id if run else None)
        values["timeline"], values["kernel_timeline"], values["holders"] = made
    elif now.tab == "serving":
        made = serving_view.compare_figures(store, _rows(store, now))
        values |= dict(zip(serving_view.ALL_RUNS, made, strict=True))
    if run is not None and run.phase == "serving":
        values |= dict(zip(serving_view.ONE_RUN, serving_view.run_figures(store, run.id), strict=True))
    return values


def chosen_run(rows: list[RunRow], wanted: int | None) -> RunRow | None:
    """The run that was asked for, else the first that succeeded, else the first."""
    for row in rows:
        if row.id == wanted:
            return row
    done = [row for row in rows if row.state == "succeeded"]
    return (done or rows or [None])[0]


def map_value(store: Store, run: RunRow | None) -> str:
    """What the map component shows: the run's maps, or why there are none (yet)."""
    if run is None:
        return ""
    if results.traces(store, run.id):
        return heatmap.config([run.id], stamp=f"{run.attempt}.{run.finished_at or 0:.0f}")
    words = {
        "queued": "The maps appear here when the run has been through the queue.",
        "running": "The maps appear here as soon as the run has captured them.",
        "succeeded": "This run recorded no maps: add `maps` to `record` in its spec.",
    }
    ended = f"There are no maps: this run {ENDED_WORDS.get(run.state, 'has ended')}."
    return heatmap.message(words.get(run.state, ended))


def asked_for_nothing(store: Store, now: Seen, asked: str) -> str:
    """The friendly page for a missing or unknown id; "" when there is an experiment to show."""
    if now.experiment and results.get_experiment(store, now.experiment):
        return ""
    return experiment_view.missing(asked[:40], results.list_experiments(store, limit=RECENT).rows)


def on_cancel(store: Store, now: Seen) -> str:
    """Cancel every run that is queued or running; returns what to say."""
    live = [row.id for row in _rows(store, now) if not row.ended]
    count = queue.cancel(store, live)
    return pieces.notice(f"{_count([0] * count)} asked to end." if count else "Nothing is left to cancel.")


def on_retry(store: Store, now: Seen) -> str:
    """Queue every run again that ended without success."""
    count = len(queue.retry(store, [row.id for row in _rows(store, now)]))
    return pieces.notice(f"{_count([0] * count)} queued again." if count else "There is nothing to retry.")


def on_delete(store: Store, now: Seen) -> str:
    """Hide the experiment; it can be brought back."""
    experiment = _experiment(store, now)
    if experiment and results.delete_experiments(store, [experiment.id]):
        return pieces.notice("Deleted. Undo brings it back with all its results.", "warning")
    if experiment and experiment.pinned:
        return pieces.notice("A pinned experiment cannot be deleted: take the pin off first.", "error")
    return pieces.notice("An experiment with a running run cannot be deleted: cancel it first.", "error")


def on_undo(store: Store, now: Seen) -> str:
    """Bring the deleted experiment back."""
    found = results.restore_experiments(store, [now.experiment]) if now.experiment else []
    return pieces.notice("Restored." if found else "It cannot be restored: it was removed for good.")


def charted(store: Store, experiment_id: int | None) -> list[dict[str, Any]]:
    """The documents of the experiment's runs, as many as a chart can show."""
    rows = results.runs_of(store, experiment_id=experiment_id)[:MAX_RUNS_CHARTED] if experiment_id else []
    return [run_document(store, row.id) for row in rows]


def _experiment(store: Store, now: Seen) -> ExperimentRow | None:
    return results.get_experiment(store, now.experiment) if now.experiment else None


def _rows(store: Store, now: Seen) -> list[RunRow]:
    return results.runs_of(store, experiment_id=now.experiment) if now.experiment else []


def _nothing() -> dict[str, Any]:
    shown = dict.fromkeys(("header", "runs", "view", "facts", "log", "environment", "spec"), "")
    shown |= dict.fromkeys(CHARTS)
    hidden = {
        name: {"visible": False} for name in ("buttons", "result", "tabs", "undo", "served", "serving_tab")
    }
    still = {"cancel": {}, "retry": {}, "clone": {}, "delete": {}, "timer": {"active": False}}
    return {**shown, **hidden, **still}


def _update(value: Any) -> Any:
    return gr.update(**value) if type(value) is dict and "__type__" not in value else value


def _count(items: list[Any]) -> str:
    return f"{len(items)} run{'' if len(items) == 1 else 's'}"


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() and len(text) < 19 else None
