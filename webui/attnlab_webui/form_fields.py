"""The fields of the New experiment form: made here, read into a `Form`, and filled from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from attnlab.problems import Problem
from attnlab.serving.settings import CACHES
from attnlab.spec_sections import DTYPES, IMPLEMENTATIONS, RECORDS
from attnlab_webui import new_experiment
from attnlab_webui.field_problems import beside_fields
from attnlab_webui.form import Form
from attnlab_webui.form_grid_fields import make_grid, make_record
from attnlab_webui.form_kinds import input_shown, of_kind_shown, offered
from attnlab_webui.form_mechanism_fields import make_mechanisms
from attnlab_webui.form_section_fields import SectionFields, kind_field, make_section_fields, title
from attnlab_webui.form_sections import PROCESS, TRACE_FILE
from attnlab_webui.form_subject_fields import make_subject

SETS = {"implementations": IMPLEMENTATIONS, "dtypes": DTYPES, "record": RECORDS, "caches": CACHES}
WRONG = "at-wrong"


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
        opened += [input_shown(kind, form) for kind in self.inputs]
        opened += [offered(mechanism, form) for mechanism in self.offers]
        opened += [of_kind_shown(name, form) for name in self.of_kind]
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
        facts, shape, inputs, preview, uploads = make_subject(plain, of_kind, form)
    with gr.Column(elem_classes="at-section"):
        title("Mechanisms", "each ticked one is run; commas in a field make one run a value")
        ticks, parameters, rows, offers = make_mechanisms(form)
    sections = make_section_fields(form)
    plain |= sections.plain
    with gr.Column(elem_classes="at-section"):
        title("Grid", "every combination is one run")
        missing = make_grid(plain, of_kind, inputs, form)
    with gr.Column(elem_classes="at-section"):
        make_record(plain, of_kind, form)
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
