"""The fields of the New experiment form: made here, read into a `Form`, and filled from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from attnlab.bundled import BUNDLED
from attnlab.pictures import picture_samples
from attnlab.sounds import sound_samples
from attnlab.spec import DTYPES, IMPLEMENTATIONS, RECORDS
from attnlab_kernels.catalog import MECHANISMS, Parameter
from attnlab_webui import drafts, new_experiment, pieces
from attnlab_webui.form import AUDIO, BARE_MODULE, FORM_PHASES, IMAGE, RANDOM, TEXT, Form

RECORD_WORDS = {
    "maps": "maps",
    "timing": "timing",
    "memory": "memory",
    "accuracy": "accuracy",
    "statistics": "statistics per head",
}
SETS = ("implementations", "dtypes", "record")


@dataclass(frozen=True)
class FormFields:
    """Every component, in one fixed order: plain fields by their `Form` name, then a tick and fields a mechanism."""

    plain: dict[str, Any]
    ticks: dict[str, gr.Checkbox]
    parameters: dict[tuple[str, str], gr.Textbox]
    shape: gr.Row
    """shown only for a bare module"""
    rows: dict[str, gr.Row]
    """the fields of a mechanism, shown only while it is ticked"""
    inputs: dict[str, Any]
    """the rows of one kind of input each, shown while it is chosen"""
    preview: gr.HTML
    uploads: dict[str, gr.UploadButton]
    """field -> the button that fills it from a file"""
    facts: gr.HTML
    missing: gr.HTML
    """why some implementations are on no machine"""

    def components(self) -> list[Any]:
        return [*self.plain.values(), *self.ticks.values(), *self.parameters.values()]

    def folds(self) -> list[Any]:
        """What `folded` opens and closes."""
        return [self.shape, *self.rows.values(), *self.inputs.values(), self.preview]

    def folded(self, form: Form) -> list[Any]:
        """Shows the fields that the form has a use for, and hides the others."""
        opened = [form.is_bare, *(mechanism in form.mechanisms for mechanism in self.rows)]
        opened += [_input_shown(kind, form) for kind in self.inputs]
        shown = new_experiment.preview(form)
        preview = gr.update(value=shown, visible=bool(shown))
        return [*(gr.update(visible=is_open) for is_open in opened), preview]

    def read(self, values: Sequence[Any]) -> Form:
        """The form that the components' values mean."""
        plain = dict(zip(self.plain, values, strict=False))
        rest = list(values[len(self.plain) :])
        ticked = dict(zip(self.ticks, rest, strict=False))
        texts = dict(zip(self.parameters, rest[len(self.ticks) :], strict=True))
        parameters: dict[str, dict[str, str]] = {}
        for (mechanism, name), text in texts.items():
            parameters.setdefault(mechanism, {})[name] = text or ""
        chosen = tuple(mechanism for mechanism, tick in ticked.items() if tick)
        return Form(
            **{name: _plain(name, value) for name, value in plain.items()},
            mechanisms=chosen,
            parameters=parameters,
        )

    def values(self, form: Form) -> list[Any]:
        """What to put into each component to show the form; other mechanisms keep no parameters."""
        plain = [
            list(getattr(form, name)) if name in SETS else getattr(form, name) or _empty(name)
            for name in self.plain
        ]
        ticks = [mechanism in form.mechanisms for mechanism in self.ticks]
        texts = [form.parameters.get(mechanism, {}).get(name, "") for mechanism, name in self.parameters]
        return [*plain, *ticks, *texts]


def _plain(name: str, value: Any) -> Any:
    if name in SETS:
        order = {"implementations": IMPLEMENTATIONS, "dtypes": DTYPES, "record": RECORDS}[name]
        return tuple(choice for choice in order if choice in (value or ()))
    if name in ("repeat", "generate"):
        return bool(value)
    return "" if value is None else str(value)


def _empty(name: str) -> Any:
    return {"phase": None, "repeat": False, "generate": False, "image": None, "audio": None}.get(name, "")


def make_fields(form: Form) -> FormFields:
    """Creates the form inside the layout that is being built, filled with `form`."""
    plain: dict[str, Any] = {}
    with gr.Column(elem_classes="at-section"):
        title("Model and input", "a bundled model, a hub id (owner/name), a folder, or a bare module")
        facts, shape, inputs, preview, uploads = _subject(plain, form)
    with gr.Column(elem_classes="at-section"):
        title("Mechanisms", "each ticked one is run; commas in a field make one run a value")
        ticks, parameters, rows = _mechanisms(form)
    with gr.Column(elem_classes="at-section"):
        title("Grid", "every combination is one run")
        missing = _grid(plain, inputs, form)
    with gr.Column(elem_classes="at-section"):
        title("Record")
        _record(plain, form)
    order = [item.name for item in fields(Form) if item.name in plain]
    return FormFields(
        {name: plain[name] for name in order},
        ticks,
        parameters,
        shape,
        rows,
        inputs,
        preview,
        uploads,
        facts,
        missing,
    )


def title(words: str, hint: str = "") -> None:
    small = f' <span class="at-muted">{pieces.escape(hint)}</span>' if hint else ""
    gr.HTML(
        f'<h3 class="at-section-title">{pieces.escape(words)}{small}</h3>',
        js_on_load=None,
        apply_default_css=False,
    )


def _subject(
    plain: dict[str, Any], form: Form
) -> tuple[gr.HTML, gr.Row, dict[str, Any], gr.HTML, dict[str, gr.UploadButton]]:
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
    plain["source"] = gr.Radio(
        [TEXT, RANDOM, IMAGE, AUDIO], value=form.source, label="Input", elem_id="new-source", container=False
    )
    with gr.Column(visible=_input_shown(TEXT, form), elem_classes="at-input") as inputs[TEXT]:
        plain["text"] = gr.Textbox(form.text, label="Text", lines=4, max_lines=9, elem_id="new-text")
        with gr.Row(elem_classes="at-tight"):
            plain["max_tokens"] = gr.Textbox(
                form.max_tokens,
                label="Cut after (tokens)",
                placeholder="whole text",
                max_lines=1,
                min_width=110,
            )
            plain["repeat"] = gr.Checkbox(
                form.repeat, label="Repeat to length", min_width=130, container=False
            )
            uploads["text"] = gr.UploadButton(
                "Text from a file…", size="sm", min_width=130, elem_id="new-upload"
            )
    with gr.Row(visible=_input_shown(IMAGE, form), elem_classes="at-tight") as inputs[IMAGE]:
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
    with gr.Row(visible=_input_shown(AUDIO, form), elem_classes="at-tight") as inputs[AUDIO]:
        plain["audio"] = _sample_field("Sound", sound_samples(), form.audio, "new-audio")
        uploads["audio"] = gr.UploadButton(
            "Sound from a file…",
            file_types=[".wav", ".flac"],
            size="sm",
            min_width=130,
            elem_id="new-upload-audio",
        )
    preview = gr.HTML(js_on_load=None, apply_default_css=False, visible=False, elem_id="new-preview")
    with gr.Row(visible=_input_shown("target", form)) as inputs["target"]:
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


def _input_shown(kind: str, form: Form) -> bool:
    if kind == "target":
        return drafts.writes(form)
    if kind == "steps":
        return form.phase == "decode"
    shown = TEXT if form.source == RANDOM else form.source  # random tokens are cut at a length too
    return kind == shown


def _mechanisms(
    form: Form,
) -> tuple[dict[str, gr.Checkbox], dict[tuple[str, str], gr.Textbox], dict[str, gr.Row]]:
    ticks: dict[str, gr.Checkbox] = {}
    parameters: dict[tuple[str, str], gr.Textbox] = {}
    rows: dict[str, gr.Row] = {}
    for mechanism in MECHANISMS.values():
        chosen = mechanism.id in form.mechanisms
        ticks[mechanism.id] = gr.Checkbox(
            chosen,
            label=mechanism.title,
            info=mechanism.summary,
            container=False,
            elem_id=f"new-mechanism-{mechanism.id}",
        )
        if not mechanism.parameters:
            continue
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
    return ticks, parameters, rows


def _grid(plain: dict[str, Any], inputs: dict[str, Any], form: Form) -> gr.HTML:
    with gr.Row():
        plain["sequence_lengths"] = gr.Textbox(
            form.sequence_lengths,
            label="Sequence lengths",
            placeholder="as long as the text, or 512, 2048",
            max_lines=1,
            min_width=160,
            elem_id="new-lengths",
        )
        plain["batch_sizes"] = gr.Textbox(form.batch_sizes, label="Batch sizes", max_lines=1, min_width=90)
        plain["phase"] = gr.Radio(list(FORM_PHASES), value=form.phase or None, label="Phase", min_width=220)
    with gr.Row(visible=_input_shown("steps", form), elem_classes="at-tight") as inputs["steps"]:
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


def _record(plain: dict[str, Any], form: Form) -> None:
    choices = [(RECORD_WORDS.get(name, name), name) for name in RECORDS]
    plain["record"] = gr.CheckboxGroup(choices, value=list(form.record), show_label=False, container=False)
    with gr.Row(elem_classes="at-tight"):
        plain["layers"] = gr.Textbox(
            form.layers, label="Layers of the maps", placeholder="all, or 0, 4-6", max_lines=1, min_width=130
        )
        plain["repeats"] = gr.Textbox(form.repeats, label="Timing repeats", max_lines=1, min_width=90)
        plain["seed"] = gr.Textbox(form.seed, label="Seed", max_lines=1, min_width=80)
        plain["gpus"] = gr.Textbox(form.gpus, label="GPUs a run", max_lines=1, min_width=80)


def implementation_choices(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """(label, value) of every implementation; one that no known machine has is marked."""
    return [(f"{name} (not here)" if name in reasons else name, name) for name in IMPLEMENTATIONS]


def parameter_hint(parameter: Parameter) -> str:
    """What an empty field means, and what may be typed: `256 (1 to 8,192)`."""
    return f"{parameter_default(parameter)} ({range_words(parameter)})"


def parameter_default(parameter: Parameter) -> str:
    return "the model's own" if parameter.default is None else str(parameter.default).lower()


def range_words(parameter: Parameter) -> str:
    """`1 to 64`, `from 1`, or the choices."""
    if parameter.choices:
        return ", ".join(map(str, parameter.choices))
    if parameter.kind == "bool":
        return "true or false"
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None:
        return f"{low:,g} to {high:,g}"
    if low is not None:
        return f"from {low:,g}"
    return f"up to {high:,g}" if high is not None else parameter.kind
