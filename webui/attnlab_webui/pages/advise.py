"""Advise: the decision tree, a recommendation with its reason and cache bytes, and the experiment that tests it."""

from __future__ import annotations

import functools
import json
from typing import Any

import gradio as gr

from attnlab.advice.model_shapes import BYTES_PER_ELEMENT
from attnlab.advise import KNOWN_SHAPES, SCALES, TREE, AdviceError, Question
from attnlab.documents import write_document
from attnlab_storage.database import Store
from attnlab_webui import advise_view, drafts, drawing, new_experiment, pieces
from attnlab_webui.advise_query import WORDS, Asked, asked_of, default_asked
from attnlab_webui.system_facts import alive_dispatchers

FOLLOW_UPS = {
    choice.value: choice.then
    for choice in TREE.choices
    if isinstance(choice.then, Question) and not choice.then.is_number
}
NAMES = (*WORDS, "context", "layers", "heads", "kv_heads", "head_dim", "dtype", "batch", "scale")

CHOSEN_JS = drawing.choose(f"Object.fromEntries({list(NAMES)!r}.map((name, i) => [name, values[i]]))")


def build(store: Store) -> None:
    """Create the page."""
    pieces.navigation("advise")
    start = default_asked(store)
    with gr.Row(elem_classes="at-new", equal_height=False):
        with gr.Column(scale=4, min_width=330, elem_classes="at-new-form at-advise-form at-held"):
            questions = _question_fields(start)
            known = gr.Dropdown(
                [(item.title, name) for name, item in KNOWN_SHAPES.items()],
                value="llama-3-8b",
                label="Take the shape of",
                elem_id="advise-model",
            )
            fields = questions + _shape_fields(start)
        with gr.Column(scale=8, min_width=560):
            notice = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="advise-notice")
            main = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="advise-main")
            cache = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="advise-cache")
            trial = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="advise-trial")
            queue_button = gr.Button("Queue it", variant="primary", size="sm", elem_id="advise-queue")
            result = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="advise-result")
            yaml = gr.Code(
                language="yaml", label="As YAML", interactive=False, elem_id="advise-yaml", max_lines=48
            )
            rest = gr.HTML(js_on_load=None, apply_default_css=False, elem_id="advise-rest")

    asked, filled = drawing.address(), gr.State(False)
    shown = [notice, main, cache, trial, queue_button, yaml, rest, *fields[1:4]]

    def show(query: str, filled: bool) -> list[Any]:
        given = drawing.read(query)
        if not filled:
            return [True, *on_load(store, given)]
        values = [given.get(name) for name in NAMES]
        return [True, *[gr.skip()] * len(fields), *on_answer(store, *values)]

    drawing.draw(show, asked, [filled], [filled, *fields, *shown]).then(
        None, None, None, js=drawing.RELEASE_JS
    )
    # a text that is pasted tells nobody before the field is left
    left = [field.blur for field in fields if isinstance(field, gr.Textbox)]
    gr.on([*(field.input for field in fields), *left], None, fields, None, js=CHOSEN_JS)
    known.input(None, known, fields[4:10], js=f"(name) => ({json.dumps(shapes())})[name]").then(
        None, fields, None, js=CHOSEN_JS
    )
    queue_button.click(functools.partial(on_queue, store), fields, result, **pieces.ACTION)


def _question_fields(start: Asked) -> list[Any]:
    goal = gr.Radio(
        [(choice.label, choice.value) for choice in TREE.choices],
        value=start.answers.goal,
        label=TREE.text,
        elem_id="advise-goal",
    )
    fields: list[Any] = [goal]
    for value, question in FOLLOW_UPS.items():
        fields.append(
            gr.Radio(
                [(choice.label, choice.value) for choice in question.choices],
                value=getattr(start.answers, question.key) or question.choices[0].value,
                label=question.text,
                visible=value == start.answers.goal,
                elem_id=f"advise-{question.key}",
            )
        )
    return fields


def _shape_fields(start: Asked) -> list[Any]:
    shape = start.shape
    context = gr.Textbox(
        str(shape.context),
        label="Context (tokens; 32k and 1m are read)",
        max_lines=1,
        elem_id="advise-context",
    )
    with gr.Row(elem_classes="at-fields"):
        numbers = [
            gr.Number(value, label=label, precision=0, minimum=1, min_width=70, elem_id=f"advise-{name}")
            for name, label, value in (
                ("layers", "Layers", shape.layers),
                ("heads", "Heads", shape.heads),
                ("kv_heads", "KV heads", shape.kv_heads),
                ("head_dim", "Head size", shape.head_dim),
            )
        ]
    with gr.Row(elem_classes="at-fields"):
        dtype = gr.Dropdown(list(BYTES_PER_ELEMENT), value=shape.dtype, label="Cache dtype", min_width=90)
        batch = gr.Number(shape.batch, label="Sequences", precision=0, minimum=1, min_width=70)
        scale = gr.Dropdown(list(SCALES), value=start.scale, label="Experiment for", min_width=90)
    return [context, *numbers, dtype, batch, scale]


def read_fields(store: Store, values: tuple[Any, ...]) -> Asked:
    """What the fields hold; only the follow-up of the chosen goal counts. Raises AdviceError, ValueError."""
    given = dict(zip(NAMES, values, strict=True))
    wanted = FOLLOW_UPS.get(given["goal"])
    unasked = {question.key for question in FOLLOW_UPS.values()} - {wanted.key if wanted else ""}
    return asked_of(given | dict.fromkeys(unasked), default_asked(store))


def unanswered(asked: Asked) -> Question | None:
    """The question that the goal leads to and that has no answer yet."""
    question = FOLLOW_UPS.get(asked.answers.goal or "")
    return question if question and getattr(asked.answers, question.key) is None else None


def on_answer(store: Store, *values: Any) -> list[Any]:
    """Everything the page shows for the values of its fields."""
    visible = [gr.update(visible=values[0] == goal) for goal in FOLLOW_UPS]
    try:
        asked = read_fields(store, values)
        if question := unanswered(asked):
            words = pieces.notice(f"{question.text} Choose an answer, and the advice stands here.")
            return [words, "", "", "", gr.update(interactive=False), "", "", *visible]
        found = asked.advice()
    except ValueError as problem:
        words = pieces.notice(str(problem), "error")
        return [words, *[gr.skip()] * 3, gr.update(interactive=False), *[gr.skip()] * 2, *visible]
    text = write_document(found.experiment)
    runnable = drafts.read_draft(text).spec is not None
    return [
        "",
        advise_view.recommendation(found),
        advise_view.cache_panel(found),
        advise_view.trial_head(found, asked.query()),
        gr.update(interactive=runnable),
        text,
        advise_view.lengths_table(found) + advise_view.sources(found),
        *visible,
    ]


def on_load(store: Store, query: dict[str, str]) -> list[Any]:
    """Fields and answers of an address; what it gets wrong is said, and the first advice shown."""
    start, problem = default_asked(store), ""
    try:
        asked = asked_of(query, start)
        if unanswered(asked) is None:
            asked.advice()
    except (AdviceError, ValueError) as error:
        asked, problem = start, pieces.notice(f"The address cannot be read: {error}", "error")
    values = field_values(asked)
    shown = on_answer(store, *values)
    return [*values, problem or shown[0], *shown[1:]]


def field_values(asked: Asked) -> list[Any]:
    """The values of all fields, in their order; a follow-up of another goal keeps its first choice."""
    open_question = unanswered(asked)
    follow_ups = [
        None
        if question is open_question
        else getattr(asked.answers, question.key) or question.choices[0].value
        for question in FOLLOW_UPS.values()
    ]
    words = [asked.answers.goal, *follow_ups]
    shape = asked.shape
    numbers = [shape.layers, shape.heads, shape.kv_heads, shape.head_dim]
    return [*words, str(shape.context), *numbers, shape.dtype, shape.batch, asked.scale]


def shapes() -> dict[str, list[Any]]:
    """Known model -> its context, layers, heads, KV heads, head size and dtype."""
    known = {name: item.shape for name, item in KNOWN_SHAPES.items()}
    return {
        name: [str(shape.context), shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.dtype]
        for name, shape in known.items()
    }


def on_queue(store: Store, *values: Any) -> str:
    """Queue the experiment of the advice; says where it can be seen, or what is wrong with it."""
    try:
        found = read_fields(store, values).advice()
    except ValueError as problem:
        return pieces.notice(str(problem), "error")
    draft = drafts.read_draft(write_document(found.experiment))
    cost = new_experiment.cost_of(store, draft)
    if cost is None or cost.refusals:
        return new_experiment.problem_list(draft.problems) + advise_view.problems(
            cost.refusals if cost else []
        )
    submitted = new_experiment.submit(store, draft)
    return new_experiment.queued_notice(submitted, alive_dispatchers(store))
