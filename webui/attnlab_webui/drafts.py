"""An experiment being written: the YAML as typed, what is wrong with it, and what it would cost. No browser in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attnlab.bundled import BUNDLED, ModelFacts, describe_model, is_fetched, local_folder
from attnlab.documents import read_document, write_document
from attnlab.inputs import count_tokens
from attnlab.problems import Problem, SpecError
from attnlab.serving.rules import IMPLEMENTATIONS as PAGED_READERS
from attnlab.serving.settings import CACHES
from attnlab.serving.settings import MECHANISMS as SERVED
from attnlab.spec import MAX_TEXT_BYTES, ExperimentSpec, parse_spec
from attnlab.starter import starter_spec
from attnlab_kernels.catalog import MECHANISMS
from attnlab_webui.form import AUDIO, BARE_MODULE, IMAGE, TEXT, Form, merge
from attnlab_webui.form_sections import SERVE, starting_sections
from attnlab_webui.form_values import Document
from attnlab_webui.uploads import with_uploads, without_contents


@dataclass(frozen=True)
class Draft:
    """One state of the YAML. `document` is None while it is not YAML, `spec` while it breaks a rule."""

    text: str
    document: Document | None
    spec: ExperimentSpec | None
    problems: tuple[Problem, ...] = ()


def read_draft(text: str) -> Draft:
    """Reads the YAML as far as it can be read; never raises."""
    try:
        document = read_document(text) if text.strip() else {}
    except SpecError as error:
        return Draft(text, None, None, error.problems)
    if not isinstance(document, dict):
        kind = type(document).__name__
        return Draft(text, None, None, (Problem("spec", "must be a mapping of fields to values", kind),))
    document = {str(key): value for key, value in document.items()}
    try:
        return Draft(text, document, parse_spec(with_uploads(document)))
    except SpecError as error:
        return Draft(text, document, None, error.problems)


def starter(mechanism: str | None = None) -> str:
    """The YAML of a first experiment; `mechanism`, if there is such a one, against plain multi-head attention.

    What trained weights cannot do without training is tried as a bare module.
    """
    document = starter_spec()
    if mechanism in MECHANISMS:
        chosen = ["multi_head"] if mechanism == "multi_head" else ["multi_head", mechanism]
        document |= {"name": " against ".join(reversed(chosen)), "vary": {"mechanism": chosen}}
        if MECHANISMS[mechanism].swap == "not_applicable":
            bare = {"module": {"dim": 256, "num_heads": 4}, "input": {"synthetic": "random"}}
            document = {key: value for key, value in document.items() if key != "model"} | bare
            document["vary"] = {**document["vary"], "sequence_length": [256]}
    return write_document(_input_last(document))


def clone(spec: dict[str, Any]) -> str:
    """The YAML of a copy of a stored experiment."""
    name = str(spec.get("name", "experiment"))
    return write_document(
        _input_last(without_contents(spec)) | {"name": name if name.endswith("-copy") else f"{name}-copy"}
    )


def _input_last(document: Document) -> Document:
    """The same document with the text, which may be long, below everything else."""
    return {key: document[key] for key in sorted(document, key=lambda key: key == "input")}


def write_form(form: Form, text: str, shown: Form) -> Draft:
    """The draft after an edit in the form. YAML that cannot be read is left alone, so that nothing typed is lost.

    Args:
        shown: what the form held when it last agreed with the YAML.
    """
    draft = read_draft(text)
    if draft.document is None:
        return draft
    merged = merge(form, draft.document, shown)
    return draft if merged == draft.document else read_draft(write_document(merged))


def from_form(form: Form) -> Draft:
    """A draft from the form alone, for when the YAML is past repair."""
    return read_draft(write_document(merge(form, {"name": form.name or "experiment", "vary": {}})))


def read_upload(name: str, data: bytes) -> str:
    """The text in an uploaded file; ValueError names the rule it breaks."""
    if not data.strip():
        raise ValueError(f"file: must hold some text, {name!r} is empty")
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"file: must be at most {MAX_TEXT_BYTES:,} bytes, {name!r} has {len(data):,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"file: must be UTF-8 text, byte {problem.start:,} of {name!r} is not") from None
    if "\0" in text:
        raise ValueError(f"file: must be text, {name!r} holds a NUL character")
    return text


@dataclass(frozen=True)
class ModelLine:
    """What the form says under the model picker."""

    facts: ModelFacts | None
    ready: bool
    how: str
    """what to do where the model is not on this machine"""


def model_line(name: str) -> ModelLine:
    """The facts of a bundled name, hub id or local folder, and whether it is on this machine."""
    if name == BARE_MODULE:
        return ModelLine(None, True, "one attention module with random weights, on random hidden states")
    facts = describe_model(name)
    if name in BUNDLED:
        megabytes = BUNDLED[name].size_bytes / 1e6
        how = "" if is_fetched(name) else f"not here yet: attnlab models fetch {name} ({megabytes:.0f} MB)"
        return ModelLine(facts, not how, how)
    if local_folder(name) is not None:
        return ModelLine(facts, True, "")
    return ModelLine(facts, False, "not on this machine: the worker looks it up in its own hub cache")


def readable(form: Form) -> Form:
    """The form with an input that its model can read: what it has, if it can, else a sample of the right kind."""
    facts = describe_model(form.model)
    if facts is None or form.model == BARE_MODULE:
        return form
    sample = BUNDLED[form.model].sample if form.model in BUNDLED else ""
    if facts.reads == "text":
        if form.source in (IMAGE, AUDIO):
            form = replace(
                form, source=TEXT, text=form.text or sample or str(starter_spec()["input"]["text"])
            )
        return form if facts.writes else replace(form, target="")
    if form.source == facts.reads:
        return form
    return with_sample(replace(form, source=facts.reads, text="", target=""), sample)


def with_kind(form: Form) -> Form:
    """The form once its kind is chosen: with what that needs to start, without mechanisms that it cannot take."""
    sections = starting_sections(form.kind) | {path: text for path, text in form.sections.items() if text}
    form = replace(form, sections=sections)
    if form.kind != SERVE:
        return form
    return replace(
        form,
        caches=form.caches or CACHES,
        mechanisms=tuple(name for name in form.mechanisms if name in SERVED) or SERVED[:1],
        implementations=tuple(name for name in form.implementations if name in PAGED_READERS) or ("auto",),
    )


def with_sample(form: Form, sample: str = "") -> Form:
    """The form once a picture or a sound is its input: one to start with, and no length, which is not chosen."""
    if form.source not in (IMAGE, AUDIO):
        return form
    form = replace(form, sequence_lengths="", max_tokens="", repeat=False)
    if form.source == IMAGE:
        return replace(form, image=form.image or sample or "astronaut")
    return replace(form, audio=form.audio or sample or "dashwood")


def writes(form: Form) -> bool:
    """Whether the model is known to write a text of its own, whose start may be given."""
    facts = None if form.model == BARE_MODULE else describe_model(form.model)
    return facts is not None and facts.writes


def token_line(form: Form) -> str:
    """How long the input is: exact where the model or its tokenizer is here, else an estimate that says so."""
    if form.source in (IMAGE, AUDIO):
        facts = describe_model(form.model)
        size = int(form.size) if form.size.strip().isdecimal() else None
        positions = facts and facts.positions(size if form.source == IMAGE else None)
        return f"{positions:,} positions" if positions else ""
    if form.source != "text" or form.model == BARE_MODULE or not form.text.strip():
        return ""
    counted = count_tokens(form.model, form.text)
    if counted is not None:
        return f"{counted:,} tokens"
    return f"about {max(1, round(len(form.text) / 4.2)):,} tokens (no tokenizer here to count them)"
