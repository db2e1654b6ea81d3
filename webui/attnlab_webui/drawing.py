"""How a page is drawn: one dependency owns an output, and what it is asked is read at the moment it is sent.

Gradio answers dependencies side by side, so of two that write one output the older answer can come last. A dependency
that is `LATEST` has one request on its way and sends another after it, but with the event of the first: no handler
here reads an event. What a person chose stands in the address instead (`static/js/address.js`), which the browser
alone writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr

from attnlab_webui import pieces, theme

LATEST: dict[str, Any] = {**pieces.INTERNAL, "trigger_mode": "always_last"}
"""what happens while the last answer is on its way is answered too, once"""

MODULE = f'import("{theme.STATIC_URL}/js/address.js")'
SEND_JS = "(address, ...values) => [window.location.search, ...values]"
CLICKS_JS = "(window.attnlabClicks ?? []).splice(0)"
"""what was clicked since the last request: none is lost while an answer is on its way, and none is sent twice"""
DRAW_JS = f"() => {MODULE}.then((address) => address.draw())"
RELEASE_JS = f"() => {MODULE}.then((address) => address.release())"


def address() -> gr.HTML:
    """The invisible component that brings the address to the server; choices trigger its `select`."""
    return gr.HTML(
        "",
        visible="hidden",
        apply_default_css=False,
        js_on_load=f'{MODULE}.then((address) => address.mount(trigger)); // "select"',
    )


def draw(
    show: Callable[..., Any],
    asked: gr.HTML,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *events: Any,
    send: str = SEND_JS,
) -> Any:
    """Make ``show(query, *inputs)`` the owner of the outputs: on load, after each choice, and on the events.

    Args:
        asked: the page's `address`; its query string is the first argument of ``show``, see `read`.
        events: more triggers; nothing else may hang on them, because Gradio repeats an event as a whole.
        send: JavaScript that makes what is sent out of the values of ``asked`` and the inputs.
    """
    triggers = [pieces.page().load, asked.select, *events]
    return gr.on(triggers, show, [asked, *inputs], list(outputs), js=send, **LATEST)


def choose(changes: str) -> str:
    """JavaScript that writes changes into the address; they are an object of the component's ``values``."""
    return f"(...values) => {{ {MODULE}.then((address) => address.choose({changes})); }}"


def read(query: str | None) -> dict[str, str]:
    """The parameters of a query string; of those given twice the last."""
    return dict(parse_qsl((query or "").removeprefix("?")))
