"""A tick for every mechanism, and its parameters under it while it is ticked."""

from __future__ import annotations

import gradio as gr

from attnlab_kernels.catalog import MECHANISMS, Mechanism
from attnlab_webui.form import Form
from attnlab_webui.form_kinds import offered
from attnlab_webui.mechanism_facts import parameter_hint


def make_mechanisms(
    form: Form,
) -> tuple[
    dict[str, gr.Checkbox], dict[tuple[str, str], gr.Textbox], dict[str, gr.Row], dict[str, gr.Column]
]:
    """Ticks, parameters, the rows that hold these, and a column for each mechanism."""
    ticks: dict[str, gr.Checkbox] = {}
    parameters: dict[tuple[str, str], gr.Textbox] = {}
    rows: dict[str, gr.Row] = {}
    offers: dict[str, gr.Column] = {}
    for mechanism in MECHANISMS.values():
        with gr.Column(visible=offered(mechanism.id, form), elem_classes="at-offer") as offers[mechanism.id]:
            _mechanism(mechanism, form, ticks, parameters, rows)
    return ticks, parameters, rows, offers


def _mechanism(
    mechanism: Mechanism,
    form: Form,
    ticks: dict[str, gr.Checkbox],
    parameters: dict[tuple[str, str], gr.Textbox],
    rows: dict[str, gr.Row],
) -> None:
    chosen = mechanism.id in form.mechanisms
    ticks[mechanism.id] = gr.Checkbox(
        chosen,
        label=mechanism.title,
        info=mechanism.summary,
        container=False,
        elem_id=f"new-mechanism-{mechanism.id}",
    )
    if not mechanism.parameters:
        return
    with gr.Row(elem_classes="at-parameters", visible=chosen) as rows[mechanism.id]:
        for parameter in mechanism.parameters:
            parameters[mechanism.id, parameter.name] = gr.Textbox(
                form.parameters.get(mechanism.id, {}).get(parameter.name, ""),
                label=parameter.name,
                info=parameter.help,
                placeholder=parameter_hint(parameter),
                max_lines=1,
                min_width=180,
                elem_id=f"new-{mechanism.id}-{parameter.name}",
            )
