"""New experiment, the front page: a form and the same experiment as YAML, what it would cost, and the Queue button."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from attnlab.spec import MAX_TEXT_BYTES
from attnlab_storage.database import Store, revision
from attnlab_webui import drafts, new_experiment, pieces, uploads
from attnlab_webui.form import Form, form_of
from attnlab_webui.form_fields import FormFields, implementation_choices, make_fields
from attnlab_webui.system_facts import alive_dispatchers, implementation_reasons

LATEST = {**pieces.INTERNAL, "trigger_mode": "always_last"}


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("new")
    start = drafts.read_draft(drafts.starter())
    form = form_of(start.document or {})
    notice = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-notice")
    with gr.Row(elem_classes="at-new", equal_height=False):
        with gr.Column(scale=7, min_width=520, elem_classes="at-new-form"):
            fields = make_fields(form)
        with gr.Column(scale=5, min_width=400, elem_classes="at-new-side"):
            yaml = gr.Code(
                start.text,
                language="yaml",
                label="The same experiment as YAML",
                lines=16,
                max_lines=26,
                wrap_lines=True,
                elem_id="new-yaml",
            )
            problems = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-problems")
            rewrite = gr.Button(
                "Rewrite the YAML from the form", size="sm", visible=False, elem_id="new-rewrite"
            )
            cost = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-cost")
            queue_button = gr.Button("Queue experiment", variant="primary", elem_id="new-queue")
            result = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-result")
            recent = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-recent")
    shown, seen, timer = gr.State(form), gr.State(-1), gr.Timer(3.0)
    told = gr.State(frozenset())

    components = fields.components()
    verdict = [problems, cost, queue_button, rewrite]
    sides = [shown, fields.facts, *fields.folds()]
    edit_form = functools.partial(on_form, fields)
    for component in components:
        events = [component.input, component.blur] if isinstance(component, gr.Textbox) else [component.input]
        gr.on(
            events,
            edit_form,
            [yaml, shown, *components],
            [yaml, *sides, *components],
            **LATEST,
        )
    yaml.input(functools.partial(on_yaml, fields), yaml, [*sides, *components], **LATEST)
    # nobody else writes the verdict while the page is open, so that it is always the one on the YAML that is seen
    yaml.change(
        functools.partial(on_change, store, fields),
        [yaml, told],
        [told, *verdict, *fields.told().values()],
        **LATEST,
    )
    rewrite.click(functools.partial(on_rewrite, fields), components, [yaml, *sides], **pieces.INTERNAL)
    for name, button in fields.uploads.items():
        button.upload(
            functools.partial(on_upload, name),
            button,
            [*fields.uploaded(name), notice],
            **pieces.ACTION,
        ).then(
            edit_form,
            [yaml, shown, *components],
            [yaml, *sides, *components],
            **pieces.INTERNAL,
        )
    queue_button.click(
        functools.partial(on_queue, store), yaml, [result, *verdict[:2]], **pieces.ACTION
    ).then(functools.partial(new_experiment.recent_list, store), None, recent, **pieces.INTERNAL)
    timer.tick(functools.partial(on_tick, store), seen, [recent, seen], **pieces.INTERNAL)

    # Gradio looks at the annotations of the function itself to pass the request in
    def load(request: gr.Request) -> list[Any]:
        return on_load(store, fields, dict(request.query_params))

    pieces.page().load(
        load,
        None,
        [notice, yaml, *verdict, *sides, recent, fields.missing, *components],
        **pieces.INTERNAL,
    )


def on_form(fields: FormFields, text: str, shown: Form, *values: Any) -> list[Any]:
    """After an edit in the form: the YAML follows, unless it cannot be read."""
    typed = fields.read(values)
    form = drafts.readable(typed) if typed.model != shown.model else typed
    if form.source != shown.source:
        form = drafts.with_sample(form)
    if form.kind != shown.kind:
        form = drafts.with_kind(form)
    draft = drafts.write_form(form, text, shown)
    kept = draft.document is None
    new_text = gr.skip() if draft.text == text else draft.text
    # a field that somebody types into is left alone
    written = fields.values(form) if form != typed else [gr.skip()] * len(fields.components())
    return [new_text, *sides_of(fields, form, shown if kept else form), *written]


def on_yaml(fields: FormFields, text: str) -> list[Any]:
    """After an edit in the YAML: the form follows, unless the YAML cannot be read."""
    draft = drafts.read_draft(text)
    if draft.document is None:
        return [gr.skip()] * (2 + len(fields.folds()) + len(fields.components()))
    form = form_of(draft.document)
    return [*sides_of(fields, form), *fields.values(form)]


def on_rewrite(fields: FormFields, *values: Any) -> list[Any]:
    """Give the broken YAML up for what the form holds."""
    form = fields.read(values)
    return [drafts.from_form(form).text, *sides_of(fields, form)]


def on_load(store: Store, fields: FormFields, query: Mapping[str, str]) -> list[Any]:
    """Fill the page from its address (see `new_experiment.first_text`); without one it shows the starter already."""
    text, notice = new_experiment.first_text(store, query)
    draft = drafts.read_draft(text)
    form = form_of(draft.document or {})
    values = (
        fields.values(form)
        if query.keys() & new_experiment.FILLED_BY
        else [gr.skip()] * len(fields.components())
    )
    reasons = implementation_reasons(store)
    choices = {"choices": implementation_choices(reasons), "value": list(form.implementations)}
    values[list(fields.plain).index("implementations")] = gr.update(**choices)
    head = [notice, text, *verdict_of(store, text), *sides_of(fields, form)]
    return [*head, new_experiment.recent_list(store), new_experiment.unavailable_line(reasons), *values]


def on_upload(kind: str, path: str | None) -> tuple[Any, Any, str]:
    """What an uploaded file gives its field, or why it cannot be used; what was there stays then.

    Args:
        kind: "text", "image", "audio" or "trace".
    """
    if path is None:
        return gr.skip(), gr.skip(), ""
    file = Path(path)
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_TEXT_BYTES + 1)
        value = drafts.read_upload(file.name, data) if kind == "text" else uploads.keep(kind, file.name, data)
    except ValueError as problem:
        return gr.skip(), gr.skip(), pieces.notice(str(problem), "error")
    finally:
        file.unlink(missing_ok=True)
    return value, kind, ""


def on_queue(store: Store, text: str) -> tuple[str, str, str]:
    """Queue what the YAML says; nothing is queued while something is left to fix."""
    draft = drafts.read_draft(text)
    cost = new_experiment.cost_of(store, draft)
    panels = (new_experiment.problem_list(draft.problems), new_experiment.cost_panel(cost))
    if cost is None or cost.refusals:
        return pieces.notice("Not queued: see what is left to fix above.", "error"), *panels
    submitted = new_experiment.submit(store, draft)
    return new_experiment.queued_notice(submitted, alive_dispatchers(store)), *panels


def on_tick(store: Store, seen: int) -> tuple[Any, Any]:
    """The recent experiments, when anything changed."""
    now = revision(store)
    if now == seen:
        return gr.skip(), gr.skip()
    return new_experiment.recent_list(store), now


def on_change(store: Store, fields: FormFields, text: str, told: frozenset[str]) -> list[Any]:
    """After any change of the YAML: what it is worth, and what is wrong beside each field.

    Args:
        told: the fields beside which something stands.
    """
    now, beside = fields.tell(drafts.read_draft(text).problems, told)
    return [now, *verdict_of(store, text), *beside]


def verdict_of(store: Store, text: str) -> list[Any]:
    """What the YAML is worth: its problems, its cost, the Queue button, the rewrite button."""
    draft = drafts.read_draft(text)
    cost = new_experiment.cost_of(store, draft)
    return [
        new_experiment.problem_list(draft.problems),
        new_experiment.cost_panel(cost),
        gr.update(interactive=cost is not None and not cost.refusals),
        gr.update(visible=draft.document is None),
    ]


def sides_of(fields: FormFields, form: Form, shown: Form | None = None) -> list[Any]:
    """The form that the YAML holds (`form` unless another is given), the facts under the model, what is folded."""
    return [shown or form, new_experiment.facts_line(form), *fields.folded(form)]
