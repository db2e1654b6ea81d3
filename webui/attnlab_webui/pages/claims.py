"""Claims: what people quote, as experiments that run here; the claim and the measurement in one picture."""

from __future__ import annotations

import functools
import json
from typing import Any

import gradio as gr

from attnlab.presets import PRESETS, PresetError, find_preset
from attnlab.presets.outcome import preset_state, submit_preset
from attnlab.views.claims import claim_figure, claim_infos
from attnlab_storage.database import Store, revision
from attnlab_webui import claims_view, drawing, pieces
from attnlab_webui.advise_query import lab_scale
from attnlab_webui.system_facts import alive_dispatchers

CHARTS = 2


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("claims")
    first = next(iter(PRESETS))
    with gr.Row(elem_classes="at-new", equal_height=False):
        with gr.Column(scale=2, min_width=230, elem_classes="at-new-form"):
            preset = gr.Radio(
                claims_view.preset_choices(), value=first, label="Presets", elem_id="claims-preset"
            )
            scale = gr.Dropdown(["auto", "cpu", "gpu"], value="auto", label="Scale", elem_id="claims-scale")
            run = gr.Button("Run this preset", variant="primary", size="sm", elem_id="claims-run")
            result = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="claims-result")
        with gr.Column(scale=9, min_width=640):
            head = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="claims-head")
            table = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="claims-table")
            charts = [
                gr.Plot(show_label=False, visible=False, elem_id=f"claims-chart-{number}")
                for number in range(CHARTS)
            ]
    asked, seen, timer = drawing.address(), gr.State((-1, "")), gr.Timer(3.0)

    def show(query: str, seen: tuple[int, str]) -> list[Any]:
        return on_draw(store, drawing.read(query).get("preset", first), seen)

    drawing.draw(show, asked, [seen], [head, table, *charts, seen], timer.tick)
    pieces.page().load(None, None, preset, js=_address_js(first))
    preset.input(None, preset, None, js=drawing.choose("{ preset: values[0] }"))
    run.click(functools.partial(on_run, store), [preset, scale], result, **pieces.ACTION).then(
        None, None, None, js=drawing.DRAW_JS
    )


def _address_js(first: str) -> str:
    """JavaScript that gives the preset of the address, or the first."""
    known = json.dumps(list(PRESETS))
    asked = 'new URLSearchParams(window.location.search).get("preset")'
    return f"() => {known}.includes({asked}) ? {asked} : {json.dumps(first)}"


def on_choice(store: Store, name: str) -> list[Any]:
    """Head, table and charts of a preset."""
    try:
        preset = find_preset(name)
    except PresetError as problem:
        return [pieces.notice(str(problem), "error"), "", *[gr.update(visible=False)] * CHARTS]
    state = preset_state(store, preset)
    figures = [
        claim_figure(info) for info in claim_infos(preset.title, preset.claims, state.verdicts)[:CHARTS]
    ]
    plots = [gr.update(value=figure, visible=True) for figure in figures]
    hidden = [gr.update(value=None, visible=False)] * (CHARTS - len(plots))
    return [claims_view.head(preset, state), claims_view.claims_table(preset, state), *plots, *hidden]


def on_run(store: Store, name: str, scale: str) -> str:
    """Queue a preset; says how many runs, or why not."""
    try:
        size = lab_scale(store) if scale == "auto" else scale
        submitted = submit_preset(store, find_preset(name), size, "web page")
    except ValueError as problem:
        return pieces.notice(str(problem), "error")
    runs = sum(len(one.run_ids) for one in submitted)
    waits = "" if alive_dispatchers(store) else " No dispatcher is running, so they wait."
    return pieces.notice(f"{runs} runs queued at {size} scale.{waits}")


def on_draw(store: Store, name: str, seen: tuple[int, str]) -> list[Any]:
    """What a preset shows, when it or anything in the store is another than was seen."""
    now = revision(store), name
    if now == seen:
        return [gr.skip()] * (CHARTS + 3)
    return [*on_choice(store, name), now]
