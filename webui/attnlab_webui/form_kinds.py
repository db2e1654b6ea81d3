"""What of the form is shown for which kind of experiment."""

from __future__ import annotations

from typing import Any

import gradio as gr

from attnlab.serving.settings import MECHANISMS as SERVED
from attnlab_webui import drafts
from attnlab_webui.form import RANDOM, TEXT, Form
from attnlab_webui.form_sections import FRONTIER, RUN, SERVE

KINDS_OF = {
    "input": (RUN, SERVE),
    "text_box": (RUN, SERVE),
    "text_upload": (RUN, SERVE),
    "lengths": (RUN,),
    "repeat": (RUN,),
    "batches": (RUN, FRONTIER),
    "phase": (RUN, FRONTIER),
    "record": (RUN,),
    "layers": (RUN,),
    "repeats": (RUN,),
}
"""fields of some kinds of experiments only"""


def column_of_kind(made: dict[str, Any], name: str, form: Form, **options: Any) -> gr.Column:
    """A column that is shown for the kinds of experiments that its fields are of."""
    made[name] = gr.Column(visible=of_kind_shown(name, form), **options)
    return made[name]


def of_kind_shown(name: str, form: Form) -> bool:
    """Whether such a column is shown; what is of a text alone is not beside random tokens."""
    if form.source == RANDOM and (
        name in ("text_box", "text_upload") or (name == "repeat" and not form.repeat)
    ):
        return False
    return form.kind in KINDS_OF[name]


def input_shown(kind: str, form: Form) -> bool:
    """Whether the rows of a kind of input are shown."""
    if kind == "target":
        return form.kind == RUN and drafts.writes(form)
    if kind == "steps":
        return form.kind == RUN and form.phase == "decode"
    if form.kind == FRONTIER:
        return False
    shown = TEXT if form.source == RANDOM else form.source  # random tokens are cut at a length too
    return kind == shown


def offered(mechanism: str, form: Form) -> bool:
    """Whether a mechanism can be ticked: served ones only where requests are served, unless it is ticked."""
    return form.kind != SERVE or mechanism in SERVED or mechanism in form.mechanisms
