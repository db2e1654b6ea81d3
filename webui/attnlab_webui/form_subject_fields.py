"""The fields of a model and its input: what is read, from where, and what it looks like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from attnlab.bundled import BUNDLED
from attnlab.pictures import picture_samples
from attnlab.sounds import sound_samples
from attnlab_webui.form import AUDIO, BARE_MODULE, IMAGE, RANDOM, TEXT, Form
from attnlab_webui.form_kinds import column_of_kind, input_shown


def make_subject(
    plain: dict[str, Any], of_kind: dict[str, Any], form: Form
) -> tuple[gr.HTML, gr.Row, dict[str, Any], gr.HTML, dict[str, gr.UploadButton]]:
    """Facts of the model, the row of a bare module, the rows of each input, its preview, and the uploads."""
    models = [*BUNDLED, BARE_MODULE]
    with gr.Row():
        plain["name"] = gr.Textbox(form.name, label="Name", max_lines=1, min_width=160, elem_id="new-name")
        plain["model"] = gr.Dropdown(
            models,
            value=form.model,
            label="Model",
            allow_custom_value=True,
            min_width=260,
            elem_id="new-model",
        )
    facts = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-facts")
    is_bare = form.model == BARE_MODULE
    with gr.Row(visible=is_bare) as shape:
        plain["module_dim"] = gr.Textbox(form.module_dim, label="Width (dim)", max_lines=1, min_width=100)
        plain["module_heads"] = gr.Textbox(form.module_heads, label="Heads", max_lines=1, min_width=100)
    inputs: dict[str, Any] = {}
    uploads: dict[str, gr.UploadButton] = {}
    with column_of_kind(of_kind, "input", form):
        plain["source"] = gr.Radio(
            [TEXT, RANDOM, IMAGE, AUDIO],
            value=form.source,
            label="Input",
            elem_id="new-source",
            container=False,
        )
    with gr.Column(visible=input_shown(TEXT, form), elem_classes="at-input") as inputs[TEXT]:
        with column_of_kind(of_kind, "text_box", form):
            plain["text"] = gr.Textbox(form.text, label="Text", lines=4, max_lines=9, elem_id="new-text")
        with gr.Row(elem_classes="at-tight"):
            plain["max_tokens"] = gr.Textbox(
                form.max_tokens,
                label="Cut after (tokens)",
                placeholder="all there is",
                max_lines=1,
                min_width=110,
            )
            with column_of_kind(of_kind, "repeat", form, min_width=130):
                plain["repeat"] = gr.Checkbox(form.repeat, label="Repeat to length", container=False)
            with column_of_kind(of_kind, "text_upload", form, min_width=130):
                uploads["text"] = gr.UploadButton(
                    "Text from a file…", size="sm", min_width=130, elem_id="new-upload"
                )
    with gr.Row(visible=input_shown(IMAGE, form), elem_classes="at-tight") as inputs[IMAGE]:
        plain["image"] = _sample_field("Picture", picture_samples(), form.image, "new-image")
        plain["size"] = gr.Textbox(
            form.size, label="Side (pixels)", placeholder="the model's own", max_lines=1, min_width=110
        )
        uploads["image"] = gr.UploadButton(
            "Picture from a file…",
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            size="sm",
            min_width=130,
            elem_id="new-upload-image",
        )
    with gr.Row(visible=input_shown(AUDIO, form), elem_classes="at-tight") as inputs[AUDIO]:
        plain["audio"] = _sample_field("Sound", sound_samples(), form.audio, "new-audio")
        uploads["audio"] = gr.UploadButton(
            "Sound from a file…",
            file_types=[".wav", ".flac"],
            size="sm",
            min_width=130,
            elem_id="new-upload-audio",
        )
    preview = gr.HTML(js_on_load=None, apply_default_css=False, visible=False, elem_id="new-preview")
    with gr.Row(visible=input_shown("target", form)) as inputs["target"]:
        plain["target"] = gr.Textbox(
            form.target,
            label="What the decoder has written",
            placeholder="what the model writes itself, by greedy decoding",
            max_lines=3,
            elem_id="new-target",
        )
    return facts, shape, inputs, preview, uploads


def _sample_field(label: str, samples: Mapping[str, Path], value: str, elem_id: str) -> gr.Dropdown:
    return gr.Dropdown(
        list(samples),
        value=value or None,
        label=label,
        allow_custom_value=True,
        min_width=180,
        elem_id=elem_id,
    )
