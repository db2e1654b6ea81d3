"""New experiment, the front page: a form and the same experiment as YAML, what it would cost, and the Queue button."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from attnlab.spec import MAX_TEXT_BYTES
from attnlab_storage.database import Store, revision
from attnlab_webui import drafts, drawing, new_experiment, pieces, uploads
from attnlab_webui.form import Form, form_of
from attnlab_webui.form_fields import FormFields, make_fields
from attnlab_webui.form_grid_fields import implementation_choices
from attnlab_webui.system_facts import alive_dispatchers, implementation_reasons

REWRITE_JS = f'() => {{ {drawing.MODULE}.then((address) => address.click("rewrite")); }}'
# an answer changes the YAML only while it is the one that was sent; what is sent counts an answer that is not in yet
SEND_JS = f"""(address, clicks, answer, yaml, ...values) => {{
  const text = answer?.text != null && answer.on === yaml ? answer.text : yaml;
  return [window.location.search, {drawing.CLICKS_JS}, null, text, ...values];
}}"""
APPLY_JS = "(answer, yaml) => answer?.text != null && answer.on === yaml ? answer.text : undefined"


@dataclass(frozen=True)
class Agreed:
    """The last state in which the YAML and the form were the same experiment."""

    text: str
    form: Form


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("new")
    start = drafts.read_draft(drafts.starter())
    form = form_of(start.document or {})
    notice = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="new-notice")
    with gr.Row(elem_classes="at-new", equal_height=False):
        with gr.Column(scale=7, min_width=520, elem_classes="at-new-form at-held"):
            fields = make_fields(form)
        with gr.Column(scale=5, min_width=400, elem_classes="at-new-side at-held"):
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
    agreed, seen, timer = gr.State(None), gr.State(-1), gr.Timer(3.0)
    asked, clicks, answer = drawing.address(), gr.JSON(visible=False), gr.JSON(visible=False)

    components = fields.components()
    texts = [component.blur for component in components if isinstance(component, gr.Textbox)]
    drawing.draw(
        functools.partial(on_edit, store, fields),
        asked,
        [clicks, answer, yaml, agreed, *components],
        [answer, agreed, fields.facts, *fields.folds(), *components],
        *(component.input for component in components),
        *texts,
        yaml.input,
        send=SEND_JS,
    ).then(None, [answer, yaml], yaml, js=APPLY_JS).then(None, None, None, js=drawing.RELEASE_JS)
    rewrite.click(None, None, None, js=REWRITE_JS)
    told = gr.State(frozenset())
    gr.on(
        [pieces.page().load, yaml.change],
        functools.partial(on_change, store, fields),
        [yaml, told],
        [told, problems, cost, queue_button, rewrite, *fields.told().values()],
        **drawing.LATEST,
    )
    for name, button in fields.uploads.items():
        filled = [*fields.uploaded(name), notice]
        button.upload(functools.partial(on_upload, name), button, filled, **pieces.ACTION).then(
            None, None, None, js=drawing.DRAW_JS
        )
    queue_button.click(functools.partial(on_queue, store), yaml, result, **pieces.ACTION).then(
        None, None, None, js=drawing.DRAW_JS
    )
    drawing.draw(functools.partial(on_tick, store), asked, [seen], [recent, seen], timer.tick)
    notes = [notice, fields.missing, fields.plain["implementations"]]
    pieces.page().load(functools.partial(on_load, store), asked, notes, js=drawing.SEND_JS, **pieces.INTERNAL)


def on_edit(
    store: Store,
    fields: FormFields,
    query: str,
    clicks: list[str] | None,
    answer: None,
    text: str,
    agreed: Agreed | None,
    *values: Any,
) -> list[Any]:
    """After an edit on either side the other follows; the first time both follow the address.

    Returns the YAML as an answer to the one that was sent, what both sides agree on, the facts, the folds and the
    components; of these only those that hold something else are written.
    """
    if agreed is None:
        new_text, *sides = on_first(store, fields, drawing.read(query))
        agreed = Agreed(text, fields.read(values))
    elif clicks:
        new_text, *sides = on_rewrite(fields, *values)
    elif text != agreed.text and fields.read(values) == fields.read(fields.values(agreed.form)):
        new_text, *sides = gr.skip(), *on_yaml(fields, text)
    else:
        new_text, *sides = on_form(fields, text, agreed.form, *values)
        if text != agreed.text:  # both sides were edited
            sides = on_yaml(fields, text if new_text == gr.skip() else new_text)
    form, facts, *rest = sides
    held = len(rest) - len(values)
    written = [gr.skip() if same(new, sent) else new for new, sent in zip(rest[held:], values, strict=True)]
    changed = new_text if isinstance(new_text, str) else None
    now = Agreed(changed or text, agreed.form if form == gr.skip() else form)
    return [{"on": text, "text": changed}, now, facts, *rest[:held], *written]


def same(new: Any, sent: Any) -> bool:
    """Whether a component holds this value already; an empty field has more than one."""
    return new == sent or not (new or sent)


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
    return [drafts.from_form(form).text, *sides_of(fields, form), *fields.values(form)]


def on_first(store: Store, fields: FormFields, query: Mapping[str, str]) -> list[Any]:
    """The experiment of an address (see `new_experiment.first_text`); without one the page shows the starter."""
    text, _ = new_experiment.first_text(store, query)
    form = form_of(drafts.read_draft(text).document or {})
    return [text, *sides_of(fields, form), *fields.values(form)]


def on_load(store: Store, query: str) -> list[Any]:
    """What the page says of its address, and which implementations are on no machine."""
    _, notice = new_experiment.first_text(store, drawing.read(query))
    reasons = implementation_reasons(store)
    marked = gr.update(choices=implementation_choices(reasons))
    return [notice, new_experiment.unavailable_line(reasons), marked]


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


def on_queue(store: Store, text: str) -> str:
    """Queue what the YAML says; nothing is queued while something is left to fix."""
    draft = drafts.read_draft(text)
    cost = new_experiment.cost_of(store, draft)
    if cost is None or cost.refusals:
        return pieces.notice("Not queued: see what is left to fix above.", "error")
    return new_experiment.queued_notice(new_experiment.submit(store, draft), alive_dispatchers(store))


def on_tick(store: Store, query: str, seen: int) -> tuple[Any, Any]:
    """The recent experiments, when anything changed."""
    del query
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
