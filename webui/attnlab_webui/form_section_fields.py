"""The fields of an experiment that serves requests or searches a frontier: made here, folded away unless chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from attnlab.serving.settings import CACHES
from attnlab_webui import form_sections, pieces
from attnlab_webui.form import Form
from attnlab_webui.form_sections import FRONTIER, PROCESS, ROWS, RUN, SERVE, TRACE_FILE, SectionField

KIND_WORDS = {
    RUN: "run given lengths",
    SERVE: "serve requests",
    FRONTIER: "find the longest that fits",
}
CACHE_WORDS = {
    "contiguous": "contiguous: room for the longest sequence each",
    "paged": "paged: blocks as they are needed",
}
CHOICE_WORDS = {"all_at_once": "all at once", "poisson": "Poisson", "trace": "from a trace"}
TITLES = {
    "arrivals": ("Requests", "drawn by the seed, or those of a trace"),
    "memory": ("Cache", "one memory for every pool: what each makes of it is what is compared"),
    "engine": ("Engine", "each step decodes what runs and fills up with chunks of prompts"),
    "limits": ("Frontier", "lengths are doubled until a trial does not fit, then bisected"),
}


@dataclass(frozen=True)
class SectionFields:
    """Components by path, and what is shown only while the form has a use for it."""

    components: dict[str, Any] = field(default_factory=dict)
    folds: dict[str, Any] = field(default_factory=dict)
    """a column a field by its path, a column a kind of experiment by the kind's name"""
    plain: dict[str, Any] = field(default_factory=dict)
    """what stands for a field of `Form` itself"""
    uploads: dict[str, gr.UploadButton] = field(default_factory=dict)

    def opened(self, form: Form) -> list[bool]:
        """Which of the folds are shown."""
        return [_opened(name, form) for name in self.folds]

    def read(self, values: list[Any]) -> dict[str, str]:
        texts: dict[str, str] = {}
        for path, value in zip(self.components, values, strict=True):
            if form_sections.FIELDS[path].is_flag:
                texts[path] = "true" if value else ""
            else:
                texts[path] = "" if value is None else str(value)
        return {path: text for path, text in texts.items() if text}

    def values(self, form: Form) -> list[Any]:
        return [_value(form_sections.FIELDS[path], form) for path in self.components]


def kind_field(form: Form) -> gr.Radio:
    """What the experiment does."""
    return gr.Radio(
        [(words, kind) for kind, words in KIND_WORDS.items()],
        value=form.kind,
        show_label=False,
        container=False,
        elem_id="new-kind",
    )


def make_section_fields(form: Form) -> SectionFields:
    """Creates the fields inside the layout that is being built, filled with `form`."""
    made = SectionFields()
    for kind in (SERVE, FRONTIER):
        with gr.Column(visible=form.kind == kind, elem_classes="at-section") as made.folds[kind]:
            for name, row in ROWS.items():
                if row[0].kind == kind:
                    _row(made, name, row, form)
    return made


def _row(made: SectionFields, name: str, row: tuple[SectionField, ...], form: Form) -> None:
    if name in TITLES:
        title(*TITLES[name])
    if name == "memory":
        made.plain["caches"] = gr.CheckboxGroup(
            [(CACHE_WORDS[cache], cache) for cache in CACHES],
            value=list(form.caches),
            label="Pools",
            info="each with every mechanism ticked above",
            elem_id="new-caches",
        )
    with gr.Row(elem_classes="at-tight"):
        for one in row:
            is_shown = form_sections.is_shown(one, form.kind, form.sections, is_bare=form.is_bare)
            with gr.Column(visible=is_shown, min_width=_width(one), scale=_scale(one)) as made.folds[
                one.path
            ]:
                made.components[one.path] = _component(one, form)
            if one.path == TRACE_FILE:
                _upload(made, form)


def _upload(made: SectionFields, form: Form) -> None:
    shown = form.sections.get(PROCESS) == form_sections.TRACE
    with gr.Column(visible=shown, min_width=140, scale=1) as made.folds["upload"]:
        made.uploads["trace"] = gr.UploadButton(
            "Trace from a file…",
            file_types=[".csv", ".jsonl", ".json", ".txt"],
            size="sm",
            elem_id="new-upload-trace",
        )


def _component(one: SectionField, form: Form) -> Any:
    value = _value(one, form)
    elem_id = field_id(one.path)
    if one.is_flag:
        return gr.Checkbox(value, label=one.label, container=False, elem_id=elem_id)
    if one.choices:
        choices = [(CHOICE_WORDS.get(choice, choice), choice) for choice in one.choices]
        if one.path == PROCESS:
            return gr.Radio(choices, value=value, label=one.label, elem_id=elem_id)
        return gr.Dropdown(choices, value=value, label=one.label, elem_id=elem_id)
    return gr.Textbox(value, label=one.label, placeholder=one.hint, max_lines=1, elem_id=elem_id)


def field_id(path: str) -> str:
    """The element of a field: `new-serving-token_budget`."""
    return f"new-{path.replace('.', '-')}"


def _value(one: SectionField, form: Form) -> Any:
    text = form.sections.get(one.path, "")
    if one.is_flag:
        return text == "true"
    return text or None if one.choices else text


def _opened(name: str, form: Form) -> bool:
    if name in (SERVE, FRONTIER):
        return form.kind == name
    path = TRACE_FILE if name == "upload" else name
    return form_sections.is_shown(form_sections.FIELDS[path], form.kind, form.sections, is_bare=form.is_bare)


def _width(one: SectionField) -> int:
    return {PROCESS: 250, TRACE_FILE: 180}.get(one.path, 100)


def _scale(one: SectionField) -> int:
    return 3 if one.path in (PROCESS, TRACE_FILE) else 1


def title(words: str, hint: str = "") -> None:
    """The heading of a part of the form."""
    small = f' <span class="at-muted">{pieces.escape(hint)}</span>' if hint else ""
    gr.HTML(
        f'<h3 class="at-section-title">{pieces.escape(words)}{small}</h3>',
        js_on_load=None,
        apply_default_css=False,
        elem_classes="at-title",
    )
