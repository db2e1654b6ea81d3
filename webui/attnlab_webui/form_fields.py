"""The fields of the New experiment form: made here, read into a `Form`, and filled from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from attnlab.bundled import BUNDLED
from attnlab.pictures import picture_samples
from attnlab.problems import Problem
from attnlab.serving.settings import CACHES
from attnlab.serving.settings import MECHANISMS as SERVED
from attnlab.sounds import sound_samples
from attnlab.spec_sections import DTYPES, IMPLEMENTATIONS, RECORDS
from attnlab_kernels.catalog import MECHANISMS, Mechanism
from attnlab_webui import drafts, new_experiment
from attnlab_webui.field_problems import beside_fields
from attnlab_webui.form import AUDIO, BARE_MODULE, FORM_PHASES, IMAGE, RANDOM, TEXT, Form
from attnlab_webui.form_section_fields import SectionFields, kind_field, make_section_fields, title
from attnlab_webui.form_sections import FRONTIER, PROCESS, RUN, SERVE, TRACE_FILE
from attnlab_webui.mechanism_facts import parameter_hint

RECORD_WORDS = {
    "maps": "maps",
    "timing": "timing",
    "memory": "memory",
    "accuracy": "accuracy",
    "statistics": "statistics per head",
}
SETS = {"implementations": IMPLEMENTATIONS, "dtypes": DTYPES, "record": RECORDS, "caches": CACHES}
WRONG = "at-wrong"
KINDS_OF = {
    "input": (RUN, SERVE),
    "lengths": (RUN,),
    "repeat": (RUN,),
    "batches": (RUN, FRONTIER),
    "phase": (RUN, FRONTIER),
    "record": (RUN,),
    "layers": (RUN,),
    "repeats": (RUN,),
}
"""fields of some kinds of experiments only"""


@dataclass(frozen=True)
class FormFields:
    """Every component in one fixed order: plain fields by their `Form` name, mechanisms and theirs, sections."""

    plain: dict[str, Any]
    ticks: dict[str, gr.Checkbox]
    parameters: dict[tuple[str, str], gr.Textbox]
    shape: gr.Row
    """shown only for a bare module"""
    rows: dict[str, gr.Row]
    """the fields of a mechanism, shown only while it is ticked"""
    offers: dict[str, gr.Column]
    """a mechanism that is not of every kind of experiment"""
    of_kind: dict[str, Any]
    """what is shown for the kinds in `KINDS_OF`"""
    sections: SectionFields
    inputs: dict[str, Any]
    """the rows of one kind of input each, shown while it is chosen"""
    preview: gr.HTML
    uploads: dict[str, gr.UploadButton]
    """field -> the button that fills it from a file"""
    facts: gr.HTML
    missing: gr.HTML
    """why some implementations are on no machine"""

    def components(self) -> list[Any]:
        return [
            *self.plain.values(),
            *self.ticks.values(),
            *self.parameters.values(),
            *self.sections.components.values(),
        ]

    def told(self) -> dict[str, Any]:
        """The components that can say what is wrong with them, by the name that `field_problems` knows them by."""
        parameters = {f"{mechanism}.{name}": field for (mechanism, name), field in self.parameters.items()}
        named = {**self.plain, **parameters, **self.sections.components}
        return {name: field for name, field in named.items() if not isinstance(field, gr.Checkbox)}

    def tell(self, problems: Sequence[Problem], told: frozenset[str]) -> tuple[frozenset[str], list[Any]]:
        """Which fields have something wrong, and what to write under each: nothing new where nothing changed.

        Args:
            told: the fields that had something wrong before.
        """
        found = beside_fields(problems, self.told())
        return frozenset(found), [
            gr.update(info=found.get(name) or field.info or "", elem_classes=[WRONG] if name in found else [])
            if name in found or name in told
            else gr.skip()
            for name, field in self.told().items()
        ]

    def folds(self) -> list[Any]:
        """What `folded` opens and closes."""
        return [
            self.shape,
            *self.rows.values(),
            *self.inputs.values(),
            *self.offers.values(),
            *self.of_kind.values(),
            *self.sections.folds.values(),
            self.preview,
        ]

    def folded(self, form: Form) -> list[Any]:
        """Shows the fields that the form has a use for, and hides the others."""
        opened = [form.is_bare, *(mechanism in form.mechanisms for mechanism in self.rows)]
        opened += [_input_shown(kind, form) for kind in self.inputs]
        opened += [_offered(mechanism, form) for mechanism in self.offers]
        opened += [form.kind in KINDS_OF[name] for name in self.of_kind]
        opened += self.sections.opened(form)
        shown = new_experiment.preview(form)
        preview = gr.update(value=shown, visible=bool(shown))
        return [*(gr.update(visible=is_open) for is_open in opened), preview]

    def uploaded(self, kind: str) -> list[Any]:
        """The field that an upload fills, and the one that says what it is."""
        if kind in self.plain:
            return [self.plain[kind], self.plain["source"]]
        return [self.sections.components[TRACE_FILE], self.sections.components[PROCESS]]

    def read(self, values: Sequence[Any]) -> Form:
        """The form that the components' values mean."""
        plain = dict(zip(self.plain, values, strict=False))
        rest = list(values[len(self.plain) :])
        ticked = dict(zip(self.ticks, rest, strict=False))
        rest = rest[len(self.ticks) :]
        texts = dict(zip(self.parameters, rest, strict=False))
        parameters: dict[str, dict[str, str]] = {}
        for (mechanism, name), text in texts.items():
            parameters.setdefault(mechanism, {})[name] = text or ""
        chosen = tuple(mechanism for mechanism, tick in ticked.items() if tick)
        return Form(
            **{name: _plain(name, value) for name, value in plain.items()},
            mechanisms=chosen,
            parameters=parameters,
            sections=self.sections.read(rest[len(self.parameters) :]),
        )

    def values(self, form: Form) -> list[Any]:
        """What to put into each component to show the form; other mechanisms keep no parameters."""
        plain = [
            list(getattr(form, name)) if name in SETS else getattr(form, name) or _empty(name)
            for name in self.plain
        ]
        ticks = [mechanism in form.mechanisms for mechanism in self.ticks]
        texts = [form.parameters.get(mechanism, {}).get(name, "") for mechanism, name in self.parameters]
        return [*plain, *ticks, *texts, *self.sections.values(form)]


def _plain(name: str, value: Any) -> Any:
    if name in SETS:
        return tuple(choice for choice in SETS[name] if choice in (value or ()))
    if name in ("repeat", "generate"):
        return bool(value)
    return "" if value is None else str(value)


def _empty(name: str) -> Any:
    return {"phase": None, "repeat": False, "generate": False, "image": None, "audio": None}.get(name, "")


def make_fields(form: Form) -> FormFields:
    """Creates the form inside the layout that is being built, filled with `form`."""
    plain: dict[str, Any] = {}
    of_kind: dict[str, Any] = {}
    plain["kind"] = kind_field(form)
    with gr.Column(elem_classes="at-section"):
        title("Model and input", "a bundled model, a hub id (owner/name), a folder, or a bare module")
        facts, shape, inputs, preview, uploads = _subject(plain, of_kind, form)
    with gr.Column(elem_classes="at-section"):
        title("Mechanisms", "each ticked one is run; commas in a field make one run a value")
        ticks, parameters, rows, offers = _mechanisms(form)
    sections = make_section_fields(form)
    plain |= sections.plain
    with gr.Column(elem_classes="at-section"):
        title("Grid", "every combination is one run")
        missing = _grid(plain, of_kind, inputs, form)
    with gr.Column(elem_classes="at-section"):
        _record(plain, of_kind, form)
    order = [item.name for item in fields(Form) if item.name in plain]
    return FormFields(
        {name: plain[name] for name in order},
        ticks,
        parameters,
        shape,
        rows,
        offers,
        of_kind,
        sections,
        inputs,
        preview,
        uploads | sections.uploads,
        facts,
        missing,
    )


def _of_kind(made: dict[str, Any], name: str, form: Form, **options: Any) -> gr.Column:
    """A column that is shown for the kinds of experiments that its fields are of."""
    made[name] = gr.Column(visible=form.kind in KINDS_OF[name], **options)
    return made[name]


def _subject(
    plain: dict[str, Any], of_kind: dict[str, Any], form: Form
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
    with _of_kind(of_kind, "input", form):
        plain["source"] = gr.Radio(
            [TEXT, RANDOM, IMAGE, AUDIO],
            value=form.source,
            label="Input",
            elem_id="new-source",
            container=False,
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
            with _of_kind(of_kind, "repeat", form, min_width=130):
                plain["repeat"] = gr.Checkbox(form.repeat, label="Repeat to length", container=False)
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
        return form.kind == RUN and drafts.writes(form)
    if kind == "steps":
        return form.kind == RUN and form.phase == "decode"
    if form.kind == FRONTIER:
        return False
    shown = TEXT if form.source == RANDOM else form.source  # random tokens are cut at a length too
    return kind == shown


def _mechanisms(
    form: Form,
) -> tuple[
    dict[str, gr.Checkbox], dict[tuple[str, str], gr.Textbox], dict[str, gr.Row], dict[str, gr.Column]
]:
    ticks: dict[str, gr.Checkbox] = {}
    parameters: dict[tuple[str, str], gr.Textbox] = {}
    rows: dict[str, gr.Row] = {}
    offers: dict[str, gr.Column] = {}
    for mechanism in MECHANISMS.values():
        with gr.Column(visible=_offered(mechanism.id, form), elem_classes="at-offer") as offers[mechanism.id]:
            _mechanism(mechanism, form, ticks, parameters, rows)
    return ticks, parameters, rows, offers


def _offered(mechanism: str, form: Form) -> bool:
    return form.kind != SERVE or mechanism in SERVED or mechanism in form.mechanisms


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


def _grid(plain: dict[str, Any], of_kind: dict[str, Any], inputs: dict[str, Any], form: Form) -> gr.HTML:
    with gr.Row():
        with _of_kind(of_kind, "lengths", form, min_width=160):
            plain["sequence_lengths"] = gr.Textbox(
                form.sequence_lengths,
                label="Sequence lengths",
                placeholder="as long as the text, or 512, 2048",
                max_lines=1,
                elem_id="new-lengths",
            )
        with _of_kind(of_kind, "batches", form, min_width=90):
            plain["batch_sizes"] = gr.Textbox(form.batch_sizes, label="Batch sizes", max_lines=1)
        with _of_kind(of_kind, "phase", form, min_width=220):
            plain["phase"] = gr.Radio(list(FORM_PHASES), value=form.phase or None, label="Phase")
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


def _record(plain: dict[str, Any], of_kind: dict[str, Any], form: Form) -> None:
    choices = [(RECORD_WORDS.get(name, name), name) for name in RECORDS]
    with _of_kind(of_kind, "record", form):
        title("Record")
        plain["record"] = gr.CheckboxGroup(
            choices, value=list(form.record), show_label=False, container=False, elem_id="new-record"
        )
    with gr.Row(elem_classes="at-tight"):
        with _of_kind(of_kind, "layers", form, min_width=130):
            plain["layers"] = gr.Textbox(
                form.layers, label="Layers of the maps", placeholder="all, or 0, 4-6", max_lines=1
            )
        with _of_kind(of_kind, "repeats", form, min_width=90):
            plain["repeats"] = gr.Textbox(form.repeats, label="Timing repeats", max_lines=1)
        plain["seed"] = gr.Textbox(form.seed, label="Seed", max_lines=1, min_width=80)
        plain["gpus"] = gr.Textbox(form.gpus, label="GPUs a run", max_lines=1, min_width=80)


def implementation_choices(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """(label, value) of every implementation; one that no known machine has is marked."""
    return [(f"{name} (not here)" if name in reasons else name, name) for name in IMPLEMENTATIONS]
