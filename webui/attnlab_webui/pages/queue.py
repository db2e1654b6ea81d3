"""The queue: every run with its state, filtered and paged in SQL, and what may be done with the selected ones."""

from __future__ import annotations

import functools
import time
from typing import Any

import gradio as gr

from attnlab_storage.control import paused
from attnlab_storage.database import Store, revision
from attnlab_storage.listing import run_values
from attnlab_webui import drawing, pieces, queue_view, theme
from attnlab_webui.queue_view import View

ANY = "any"
HEARTBEAT_SECONDS = 10.0
"""a dispatcher that stops changes nothing in the store; the page notices it this late"""
ON_LOAD = 'import("{url}/js/queue.js").then((module) => module.mount(element, watch));'
FILL_JS = """() => {
  const given = new URLSearchParams(window.location.search);
  return [given.get("mechanism") ?? "any", given.get("model") ?? "any", given.get("q") ?? ""];
}"""
FILTER_JS = drawing.choose(
    '{ mechanism: values[0] === "any" ? "" : values[0], model: values[1] === "any" ? "" : values[1], q: values[2] }'
)
SEND_JS = f"(address, clicks, ...values) => [window.location.search, {drawing.CLICKS_JS}, ...values]"


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
    asked, clicks = drawing.address(), gr.JSON(visible=False)

    show = functools.partial(on_draw, store)
    drawing.draw(show, asked, [clicks, view, seen], [table, pause, view, seen], timer.tick, send=SEND_JS)
    fields = [mechanism, model, search]
    changes = [mechanism.input, model.input, search.input, search.submit, search.blur]
    gr.on(changes, None, fields, None, js=FILTER_JS)
    pieces.page().load(None, None, fields, js=FILL_JS)
    pieces.page().load(functools.partial(on_load, store), None, fields[:2], **pieces.INTERNAL)
    pause.click(functools.partial(on_pause, store), None, None, **pieces.ACTION).then(
        None, None, None, js=drawing.DRAW_JS
    )


def on_load(store: Store) -> list[Any]:
    """The mechanisms and models that there are runs of; what is chosen among them is the browser's."""
    return [gr.update(choices=[ANY, *map(str, run_values(store, name))]) for name in ("mechanism", "model")]


def on_pause(store: Store) -> None:
    """Pause the queue, or let it go on."""
    queue_view.toggle_pause(store)


def on_draw(
    store: Store, query: str, clicks: list[Any] | None, view: View, seen: tuple[int, bool, float]
) -> list[Any]:
    """The page after the clicks; drawn again when something changed, or while a shown run has not ended."""
    number, moving, drawn_at = seen
    changed = view
    for click in clicks or ():
        changed = on_click(store, changed, click)
    changed = queue_view.looking_at(changed, drawing.read(query))
    still = changed is view and revision(store) == number and not moving
    if still and time.time() - drawn_at < HEARTBEAT_SECONDS:
        return [gr.skip()] * 4
    table, now = drawn_of(store, changed)
    return [table, pause_words(paused(store)), changed, now]


def on_click(store: Store, view: View, sent: Any) -> View:
    """The view after a click in the table or its toolbar, as `static/js/queue.js` sends it."""
    data: dict[str, Any] = sent if isinstance(sent, dict) else {}
    query, run = data.get("query"), data.get("run")
    if isinstance(query, str):
        view = queue_view.looking_at(view, drawing.read(query))
    return queue_view.act(
        store,
        view,
        str(data.get("do")),
        run if isinstance(run, int) else 0,
        bool(data.get("shift")),
    )


def drawn_of(store: Store, view: View) -> tuple[str, tuple[int, bool, float]]:
    """Table, and what was seen; the counter is read first, so that no change is missed."""
    number = revision(store)
    shown = queue_view.look(store, view)
    return shown.html, (number, shown.moving, time.time())


def pause_words(is_paused: bool) -> Any:
    return gr.update(
        value="Resume queue" if is_paused else "Pause queue", variant="primary" if is_paused else "secondary"
    )
