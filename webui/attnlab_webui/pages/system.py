"""System: the database, the dispatchers, the machines with their implementations, and the models."""

from __future__ import annotations

import functools

import gradio as gr

from attnlab_storage.database import Store
from attnlab_webui import drawing, pieces, system_panels
from attnlab_webui.system_facts import system_document


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("system")
    panels = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="system")
    timer = gr.Timer(5.0)
    show = functools.partial(show_system, store)
    gr.on([pieces.page().load, timer.tick], show, None, panels, **drawing.LATEST)


def show_system(store: Store) -> str:
    """The page as it stands; heartbeats move without a change of the store, so it is drawn each time."""
    return system_panels.page(system_document(store))
