"""The queue: every run with its state, filtered and paged in SQL, and what may be done with the selected ones."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import gradio as gr

from attnlab_storage.control import paused
from attnlab_storage.database import Store, revision
from attnlab_storage.listing import run_values
from attnlab_webui import pieces, queue_view, theme
from attnlab_webui.queue_view import View

ANY = "any"
HEARTBEAT_SECONDS = 10.0
"""a dispatcher that stops changes nothing in the store; the page notices it this late"""
ON_LOAD = 'import("{url}/js/queue.js").then((module) => module.mount(element, trigger, watch));'


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("queue")
    with gr.Row(elem_classes="at-fields"):
        search = gr.Textbox(
            label="Search", placeholder="name, note, tag, model…", max_lines=1, scale=3, min_width=200
        )
        mechanism = gr.Dropdown([ANY], value=ANY, label="Mechanism", allow_custom_value=True, min_width=160)
        model = gr.Dropdown([ANY], value=ANY, label="Model", allow_custom_value=True, min_width=160)
        pause = gr.Button("Pause queue", size="sm", min_width=120, scale=0, elem_id="queue-pause")
    table = gr.HTML(js_on_load=ON_LOAD.format(url=theme.STATIC_URL), apply_default_css=False, elem_id="queue")
    view, seen, timer = gr.State(View()), gr.State((-1, False, 0.0)), gr.Timer(1.5)

    fields, drawn = [mechanism, model, search], [table, view, seen]
    show = functools.partial(on_filter, store)
    changes = [mechanism.input, model.input, search.input, search.submit]
    gr.on(changes, show, [view, *fields], drawn, trigger_mode="always_last", **pieces.INTERNAL)

    # Gradio looks at the annotations of the function itself to pass these in
    def act(view: View, event: gr.EventData) -> list[Any]:
        return on_action(store, view, event._data)

    def load(request: gr.Request) -> list[Any]:
        return on_load(store, dict(request.query_params))

    table.select(act, view, drawn, **pieces.INTERNAL)
    pause.click(functools.partial(on_pause, store), view, [pause, *drawn], **pieces.INTERNAL)
    timer.tick(functools.partial(on_tick, store), [view, seen], [table, seen, pause], **pieces.INTERNAL)
    pieces.page().load(load, None, [*fields, pause, *drawn], **pieces.INTERNAL)


def on_load(store: Store, query: Mapping[str, str]) -> list[Any]:
    """Fill filters and table from the page's address."""
    view = queue_view.view_of(query)
    return [
        menu(run_values(store, "mechanism"), view.mechanism),
        menu(run_values(store, "model"), view.model),
        view.search or gr.skip(),
        pause_words(paused(store)),
        *drawn_of(store, view),
    ]


def on_filter(
    store: Store, view: View, mechanism: str | None, model: str | None, search: str | None
) -> list[Any]:
    """Another filter: back to the first page, the selection stays."""
    chosen = {"mechanism": mechanism or "", "model": model or ""}
    given = {name: "" if value == ANY else value for name, value in chosen.items()}
    filtered = queue_view.filtered(view, **given, search=(search or "")[:200])
    # an answer that changes nothing must not undo a click that came while it was on its way
    return [gr.skip()] * 3 if filtered is view else drawn_of(store, filtered)


def on_action(store: Store, view: View, sent: Any) -> list[Any]:
    """A click in the table or its toolbar, as `static/js/queue.js` sends it."""
    data: dict[str, Any] = sent if isinstance(sent, dict) else {}
    run = data.get("run")
    changed = queue_view.act(
        store,
        view,
        str(data.get("do")),
        str(data.get("value") or ""),
        run if isinstance(run, int) else 0,
        bool(data.get("shift")),
    )
    return drawn_of(store, changed)


def on_pause(store: Store, view: View) -> list[Any]:
    """Pause the queue, or let it go on."""
    return [pause_words(queue_view.toggle_pause(store)), *drawn_of(store, view)]


def on_tick(store: Store, view: View, seen: tuple[int, bool, float]) -> tuple[Any, Any, Any]:
    """Draw again when something changed, while a shown run has not ended (its clock goes on), or a beat is due."""
    number, moving, drawn_at = seen
    if revision(store) == number and not moving and time.time() - drawn_at < HEARTBEAT_SECONDS:
        return gr.skip(), gr.skip(), gr.skip()
    table, _, seen = drawn_of(store, view)
    return table, seen, pause_words(paused(store))


def drawn_of(store: Store, view: View) -> list[Any]:
    """Table, view and what was seen; the counter is read first, so that no change is missed."""
    number = revision(store)
    shown = queue_view.look(store, view)
    return [shown.html, view, (number, shown.moving, time.time())]


def pause_words(is_paused: bool) -> Any:
    return gr.update(
        value="Resume queue" if is_paused else "Pause queue", variant="primary" if is_paused else "secondary"
    )


def menu(values: list[Any], chosen: str) -> Any:
    return gr.update(choices=[ANY, *map(str, values)], value=chosen or ANY)
