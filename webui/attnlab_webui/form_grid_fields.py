"""The fields of the grid, of what is recorded, and of what each run takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from attnlab.spec_sections import DTYPES, IMPLEMENTATIONS, RECORDS
from attnlab_webui.form import FORM_PHASES, Form
from attnlab_webui.form_kinds import column_of_kind, input_shown
from attnlab_webui.form_section_fields import title

RECORD_WORDS = {
    "maps": "maps",
    "timing": "timing",
    "memory": "memory",
    "accuracy": "accuracy",
    "statistics": "statistics per head",
}


def make_grid(plain: dict[str, Any], of_kind: dict[str, Any], inputs: dict[str, Any], form: Form) -> gr.HTML:
    """Fills `plain`, `of_kind` and `inputs`; returns what says why some implementations are on no machine."""
    with gr.Row():
        with column_of_kind(of_kind, "lengths", form, min_width=160):
            plain["sequence_lengths"] = gr.Textbox(
                form.sequence_lengths,
                label="Sequence lengths",
                placeholder="as long as the text, or 512, 2048",
                max_lines=1,
                elem_id="new-lengths",
            )
        with column_of_kind(of_kind, "batches", form, min_width=90):
            plain["batch_sizes"] = gr.Textbox(form.batch_sizes, label="Batch sizes", max_lines=1)
        with column_of_kind(of_kind, "phase", form, min_width=220):
            plain["phase"] = gr.Radio(list(FORM_PHASES), value=form.phase or None, label="Phase")
    with gr.Row(visible=input_shown("steps", form), elem_classes="at-tight") as inputs["steps"]:
        plain["steps"] = gr.Textbox(
            form.steps,
            label="Decoding steps",
            placeholder="1; each is a row of the maps",
            max_lines=1,
            min_width=160,
            elem_id="new-steps",
        )
        plain["generate"] = gr.Checkbox(
            form.generate, label="The model writes their tokens", min_width=220, container=False
        )
    plain["dtypes"] = gr.CheckboxGroup(
        list(DTYPES), value=list(form.dtypes), label="Dtypes", elem_id="new-dtypes"
    )
    plain["implementations"] = gr.CheckboxGroup(
        implementation_choices({}),
        value=list(form.implementations),
        label="Implementations",
        elem_id="new-implementations",
    )
    return gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-missing")


def make_record(plain: dict[str, Any], of_kind: dict[str, Any], form: Form) -> None:
    """What a run keeps, and how it runs."""
    choices = [(RECORD_WORDS.get(name, name), name) for name in RECORDS]
    with column_of_kind(of_kind, "record", form):
        title("Record")
        plain["record"] = gr.CheckboxGroup(
            choices, value=list(form.record), show_label=False, container=False, elem_id="new-record"
        )
    with gr.Row(elem_classes="at-tight"):
        with column_of_kind(of_kind, "layers", form, min_width=130):
            plain["layers"] = gr.Textbox(
                form.layers, label="Layers of the maps", placeholder="all, or 0, 4-6", max_lines=1
            )
        with column_of_kind(of_kind, "repeats", form, min_width=90):
            plain["repeats"] = gr.Textbox(form.repeats, label="Timing repeats", max_lines=1)
        plain["seed"] = gr.Textbox(form.seed, label="Seed", max_lines=1, min_width=80)
        plain["gpus"] = gr.Textbox(form.gpus, label="GPUs a run", max_lines=1, min_width=80)


def implementation_choices(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """(label, value) of every implementation; one that no known machine has is marked."""
    return [(f"{name} (not here)" if name in reasons else name, name) for name in IMPLEMENTATIONS]
