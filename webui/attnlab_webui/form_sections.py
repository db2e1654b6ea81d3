"""The sections `serving` and `frontier` of a document, and what fields stand for them in the form.

A field is known by its path in the document, so that a broken rule finds its field by the argument that it names.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnlab.serving.settings import ServingSpec, Workload
from attnlab.spec import SERVING_PASSES
from attnlab.spec_sections import FrontierSpec
from attnlab_webui.form_values import Document, mapping, text_of, text_of_bytes, typed, typed_bytes

RUN, SERVE, FRONTIER = "run", "serve", "frontier"
KINDS = (RUN, SERVE, FRONTIER)
"""what an experiment does: run given lengths, serve requests, search the longest length that fits"""
ALL_AT_ONCE, POISSON, TRACE = "all_at_once", "poisson", "trace"

WORKLOAD = "serving.workload"
PROCESS = f"{WORKLOAD}.arrivals.process"
"""all_at_once, poisson, or trace where the workload has one; only the first two are written"""
TRACE_FILE = f"{WORKLOAD}.trace"
PASSES = "repeats"
SHORT: dict[str, tuple[str, type, Document]] = {
    f"{WORKLOAD}.arrivals": ("process", str, {}),
    f"{WORKLOAD}.prompt_tokens": ("tokens", int, {"distribution": "fixed"}),
    f"{WORKLOAD}.output_tokens": ("tokens", int, {"distribution": "fixed"}),
}
"""what may be written as one value: the key that it stands for, its type, and what else it means"""

Sections = Mapping[str, str]
"""path -> what its field holds"""


@dataclass(frozen=True)
class SectionField:
    """One field. `when`: the path and the values of another field that this one belongs to."""

    path: str
    label: str
    hint: str = ""
    """what an empty field means"""
    start: str = ""
    """what it holds when the kind of experiment is chosen"""
    choices: tuple[str, ...] = ()
    when: tuple[str, tuple[str, ...]] | None = None
    is_size: bool = False
    is_flag: bool = False
    bare_only: bool = False

    @property
    def kind(self) -> str:
        return FRONTIER if self.path.startswith("frontier.") else SERVE

    def show(self, value: Any) -> str:
        text = text_of_bytes(value) if self.is_size else text_of(value)
        if self.is_flag and text == "false":
            return ""
        return text if not self.choices or text in self.choices else ""

    def type(self, text: str) -> Any:
        return typed_bytes(text) if self.is_size else typed(text)


def _lengths(name: str, label: str, tokens: str) -> Iterator[SectionField]:
    path = f"{WORKLOAD}.{name}"
    kind = f"{path}.distribution"
    drawn = (PROCESS, (ALL_AT_ONCE, POISSON))
    words = ("fixed", "uniform", "lognormal")
    yield SectionField(kind, label, start="fixed", choices=words, when=drawn)
    yield SectionField(f"{path}.tokens", "Tokens", start=tokens, when=(kind, ("fixed",)))
    yield SectionField(f"{path}.median", "Median (tokens)", when=(kind, ("lognormal",)))
    yield SectionField(f"{path}.sigma", "Sigma of the logarithm", when=(kind, ("lognormal",)))
    yield SectionField(f"{path}.low", "Least", "1", when=(kind, ("uniform", "lognormal")))
    yield SectionField(f"{path}.high", "Most", when=(kind, ("uniform", "lognormal")))


def _default(model: Any, name: str) -> str:
    return text_of(model.model_fields[name].default)


def _engine(name: str, label: str, hint: str = "", **more: Any) -> SectionField:
    return SectionField(f"serving.{name}", label, hint or _default(ServingSpec, name), **more)


def _search(name: str, label: str, **more: Any) -> SectionField:
    hint = "" if "start" in more else _default(FrontierSpec, name)
    return SectionField(f"frontier.{name}", label, hint, **more)


_FROM_TRACE = (PROCESS, (TRACE,))
ARRIVALS = (
    SectionField(PROCESS, "Arrivals", start=ALL_AT_ONCE, choices=(ALL_AT_ONCE, POISSON, TRACE)),
    SectionField(f"{WORKLOAD}.requests", "Requests", "all of a trace", start="32"),
    SectionField(
        f"{WORKLOAD}.arrivals.rate", "Requests a second", "4", start="4", when=(PROCESS, (POISSON,))
    ),
)
REQUEST_TRACE = (
    SectionField(TRACE_FILE, "Trace", "upload a CSV or JSON lines", when=_FROM_TRACE),
    SectionField(f"{WORKLOAD}.time_scale", "Times ×", _default(Workload, "time_scale"), when=_FROM_TRACE),
    SectionField(
        f"{WORKLOAD}.length_scale", "Lengths ×", _default(Workload, "length_scale"), when=_FROM_TRACE
    ),
)
PROMPTS = tuple(_lengths("prompt_tokens", "Prompts", "64"))
ANSWERS = tuple(_lengths("output_tokens", "Answers", "32"))
MEMORY = (
    _engine("cache_bytes", "Memory of the cache", "16 MiB", start="16 MiB", is_size=True),
    _engine("num_blocks", "or number of blocks", "by memory"),
    _engine("block_size", "Block (tokens)"),
    _engine("max_length", "Room for each (tokens)", "the longest request"),
)
ENGINE = (
    _engine("token_budget", "Token budget a step"),
    _engine("chunk_size", "Prompt chunk (tokens)"),
    _engine("max_batch", "Sequences at a time"),
    _engine("layers", "Layers", bare_only=True),
    SectionField(PASSES, "Passes", str(SERVING_PASSES), start=str(SERVING_PASSES)),
)
PREFIX = (
    SectionField(f"{WORKLOAD}.shared_prefix", "Prefix of all prompts (tokens)", "none"),
    SectionField("serving.prefix_sharing", "Pages hold it once", is_flag=True),
)
LIMITS = (
    _search("memory_bytes", "Memory of one trial", start="1 GiB", is_size=True),
    _search("up_to", "Up to (tokens)", start="8192"),
)
SEARCH = (
    _search("first", "First length (tokens)"),
    _search("resolution", "Gap at the end (tokens)"),
    _search("seconds", "A trial may take (s)"),
)
ROWS: dict[str, tuple[SectionField, ...]] = {
    "arrivals": ARRIVALS,
    "trace": REQUEST_TRACE,
    "prompts": PROMPTS,
    "answers": ANSWERS,
    "memory": MEMORY,
    "engine": ENGINE,
    "prefix": PREFIX,
    "limits": LIMITS,
    "search": SEARCH,
}
FIELDS: dict[str, SectionField] = {field.path: field for row in ROWS.values() for field in row}


def starting_sections(kind: str) -> dict[str, str]:
    """What the fields of a kind hold when it is chosen."""
    return {field.path: field.start for field in FIELDS.values() if field.kind == kind and field.start}


def is_shown(field: SectionField, kind: str, sections: Sections, *, is_bare: bool) -> bool:
    """Whether the form has a use for a field."""
    if field.kind != kind or (field.bare_only and not is_bare):
        return False
    if field.when is None:
        return True
    path, values = field.when
    return sections.get(path, "") in values and is_shown(FIELDS[path], kind, sections, is_bare=is_bare)


def in_use(sections: Sections, kind: str, *, is_bare: bool) -> dict[str, str]:
    """What counts of the sections: the filled fields that are shown, and the trace, also while there is none."""
    texts = {path: sections.get(path, "").strip() for path in FIELDS}
    return {
        path: text
        for path, text in texts.items()
        if (text or path == TRACE_FILE) and is_shown(FIELDS[path], kind, texts, is_bare=is_bare)
    }


def read_sections(document: Document, kind: str, *, is_bare: bool) -> dict[str, str]:
    """What the fields of a kind show for a document."""
    document = _long(document)
    workload = mapping(mapping(document.get("serving")).get("workload"))
    found: dict[str, str] = {}
    for field in (field for field in FIELDS.values() if field.kind == kind):
        value = _at(document, field.path)
        if value is None and field.choices:
            value = field.choices[0]
        if text := field.show(value):
            found[field.path] = text
    if kind == SERVE and workload.get("trace") is not None:
        found[PROCESS] = TRACE
    return in_use(found, kind, is_bare=is_bare)


def write_sections(document: Document, kind: str, before: Sections, after: Sections) -> Document:
    """The document with the fields that changed and the section of its kind; what it says beside them stays."""
    changed = [path for path in FIELDS if before.get(path) != after.get(path)]
    touched = [short for short in SHORT if any(path.startswith(f"{short}.") for path in changed)]
    merged = _long(document, touched)
    for path in changed:
        is_written = path in after and (path, after[path]) != (PROCESS, TRACE)
        value = FIELDS[path].type(after[path]) if is_written else None
        merged = _with(merged, path.split("."), value)
    merged = _short(merged, touched)
    needed = {SERVE: "serving", FRONTIER: "frontier"}.get(kind)
    return merged if needed is None or needed in merged else {**merged, needed: {}}


def _at(document: Document, path: str) -> Any:
    value: Any = document
    for key in path.split("."):
        value = mapping(value).get(key)
    return value


def _with(node: Any, keys: list[str], value: Any) -> Document:
    """A copy with the value at the keys; None takes it away, and what holds nothing then."""
    copied: Document = dict(mapping(node))
    inner = value if len(keys) == 1 else _with(copied.get(keys[0]), keys[1:], value)
    if inner is None or inner == {}:
        copied.pop(keys[0], None)
    else:
        copied[keys[0]] = inner
    return copied


def _long(document: Document, paths: Iterable[str] = SHORT) -> Document:
    """The document with `prompt_tokens: 64` and `arrivals: poisson` written out."""
    for path in paths:
        key, kind, rest = SHORT[path]
        value = _at(document, path)
        if type(value) is kind:
            document = _with(document, path.split("."), {**rest, key: value})
    return document


def _short(document: Document, paths: Iterable[str]) -> Document:
    """The document with the same in one value where that says it all."""
    for path in paths:
        key, kind, rest = SHORT[path]
        value = mapping(_at(document, path))
        if type(value.get(key)) is kind and value == {**rest, key: value[key]}:
            document = _with(document, path.split("."), value[key])
    return document
