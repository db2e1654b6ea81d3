"""The New experiment form and the YAML beside it are one document: this is the way there and back.

The form knows some of the document's keys. A key it does not know, or whose field was not touched, stays as it stands.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attnlab.serving.settings import CACHES
from attnlab.spec_sections import DTYPES, IMPLEMENTATIONS, PHASES, RECORDS
from attnlab_kernels.catalog import MECHANISMS
from attnlab_webui import form_sections
from attnlab_webui.form_sections import FRONTIER, RUN, SERVE, Sections
from attnlab_webui.form_values import (
    Document,
    listed,
    mapping,
    picked,
    text_of,
    texts_of,
    typed,
    typed_list,
)

BARE_MODULE = "bare module"
"""What the model picker holds when the experiment runs on one module with random weights."""

INPUT_KINDS = ("text", "file", "image", "audio", "synthetic")
TEXT, RANDOM, IMAGE, AUDIO = "text", "random tokens", "image", "audio"
"""What goes in: a text, random tokens of the model's vocabulary (`input.synthetic`), a picture, a sound."""

FORM_PHASES = tuple(phase for phase in PHASES if phase != "serving")
"""what the field offers: serving is a kind of experiment of its own"""

Parameters = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Form:
    """What the fields hold. Lists of numbers are text with commas, as typed; sets of choices are in catalog order."""

    name: str = ""
    kind: str = RUN
    """one of `form_sections.KINDS`"""
    model: str = "smollm2-135m"
    module_dim: str = "512"
    module_heads: str = "8"
    source: str = TEXT
    text: str = ""
    image: str = ""
    """a sample, or the name of an upload"""
    size: str = ""
    audio: str = ""
    target: str = ""
    max_tokens: str = ""
    repeat: bool = False
    mechanisms: tuple[str, ...] = ("multi_head",)
    parameters: Parameters = field(default_factory=dict)
    """mechanism -> parameter -> values with commas; an empty text is the default"""
    implementations: tuple[str, ...] = ("auto",)
    sequence_lengths: str = ""
    dtypes: tuple[str, ...] = ("float32",)
    batch_sizes: str = "1"
    phase: str = "prefill"
    steps: str = ""
    """tokens that phase decode decodes one after another"""
    generate: bool = False
    """the model writes them"""
    record: tuple[str, ...] = RECORDS
    layers: str = "all"
    repeats: str = "20"
    seed: str = "0"
    gpus: str = "0"
    caches: tuple[str, ...] = ()
    """of a kind that serves"""
    sections: Sections = field(default_factory=dict)
    """the fields of `form_sections` by path"""

    @property
    def is_bare(self) -> bool:
        """Whether the experiment runs on a bare module instead of a model."""
        return self.model == BARE_MODULE


def form_of(document: Document) -> Form:
    """What the fields show for a document; where it says more than a field can hold, the field shows its default."""
    vary = mapping(document.get("vary"))
    source = mapping(document.get("input"))
    module = mapping(document.get("module"))
    entries = listed(vary.get("mechanism"))
    kind = _kind(document)
    return Form(
        name=text_of(document.get("name")),
        kind=kind,
        model=BARE_MODULE if document.get("module") is not None else text_of(document.get("model")),
        module_dim=text_of(module.get("dim", 512)),
        module_heads=text_of(module.get("num_heads", 8)),
        source=_source(source, module),
        text=text_of(source.get("text")),
        image=text_of(source.get("image")),
        size=text_of(source.get("size")),
        audio=text_of(source.get("audio")),
        target=text_of(source.get("target")),
        max_tokens=text_of(source.get("max_tokens")),
        repeat=source.get("repeat") is True,
        mechanisms=_mechanism_ids(entries),
        parameters=_parameter_texts(entries),
        implementations=picked(vary.get("implementation", ["auto"]), IMPLEMENTATIONS),
        sequence_lengths=texts_of(vary.get("sequence_length")),
        dtypes=picked(vary.get("dtype", ["float32"]), DTYPES),
        batch_sizes=texts_of(vary.get("batch_size", [1])),
        phase="prefill" if kind == SERVE else "".join(picked(document.get("phase", "prefill"), FORM_PHASES)),
        steps="" if kind != RUN else text_of(mapping(document.get("decode")).get("steps")),
        generate=kind == RUN and mapping(document.get("decode")).get("generate") is True,
        record=RECORDS if kind == SERVE else picked(document.get("record", RECORDS), RECORDS),
        layers=texts_of(document.get("layers", "all")),
        repeats="20" if kind == SERVE else text_of(document.get("repeats", 20)),
        seed=text_of(document.get("seed", 0)),
        gpus=text_of(mapping(document.get("resources")).get("gpus", 0)),
        caches=picked(vary.get("cache", ["paged"]), CACHES) if kind == SERVE else (),
        sections=form_sections.read_sections(document, kind, is_bare=document.get("module") is not None),
    )


def _kind(document: Document) -> str:
    if document.get("phase") == "serving" or document.get("serving") is not None:
        return SERVE
    return FRONTIER if document.get("frontier") is not None else RUN


def _source(given: Document, module: Document) -> str:
    if given.get("synthetic") is not None or module:
        return RANDOM
    return next((kind for kind in (IMAGE, AUDIO) if given.get(kind) is not None), TEXT)


def merge(form: Form, document: Document, shown: Form | None = None) -> Document:
    """The document with every key whose field was changed; the rest of it stays as written, in its order.

    Args:
        shown: what the fields showed before they were edited; by default what the document says.
    """
    shown = _effective(form_of(document) if shown is None else shown)
    form = _effective(form)
    changed = {item.name for item in fields(Form) if getattr(form, item.name) != getattr(shown, item.name)}
    merged: Document = dict(document)
    if "kind" in changed:
        merged = _without_other_kinds(merged, form.kind)
    if changed & {"kind", "sections"}:
        merged = form_sections.write_sections(merged, form.kind, shown.sections, form.sections)
    if "name" in changed:
        merged["name"] = form.name
    if changed & {"model", "module_dim", "module_heads"}:
        merged = _with_model(merged, form)
    if changed & {"source", "text", "image", "size", "audio", "target", "max_tokens", "repeat"}:
        merged["input"] = _input(form, mapping(document.get("input")), changed)
    if vary := _vary(form, changed):
        both = {**mapping(merged.get("vary")), **vary}
        merged["vary"] = {key: value for key, value in both.items() if value is not None}
    plain = {
        "phase": form.phase,
        "record": list(form.record),
        "layers": _layers(form.layers),
        "repeats": typed(form.repeats),
        "seed": typed(form.seed),
    }
    merged |= {key: value for key, value in plain.items() if key in changed - _written_elsewhere(form.kind)}
    if changed & {"steps", "generate"}:
        merged["decode"] = _decode(form)
        merged = {key: value for key, value in merged.items() if value is not None}
    if "gpus" in changed:
        merged["resources"] = {**mapping(document.get("resources")), "gpus": typed(form.gpus)}
    return merged


def _without_other_kinds(document: Document, kind: str) -> Document:
    """The document without the sections of the kinds that it no longer is of, and what they had to record."""
    gone = {"serving", "frontier"} - {"serving" if kind == SERVE else kind}
    gone |= _written_elsewhere(kind)
    kept = {key: value for key, value in document.items() if key not in gone}
    if kind != SERVE and "vary" in kept:
        kept["vary"] = {key: value for key, value in mapping(kept["vary"]).items() if key != "cache"}
    return kept


def _written_elsewhere(kind: str) -> set[str]:
    """Plain fields that serving has no use for; what it repeats are its passes, a field of the section."""
    return {"record", "repeats"} if kind == SERVE else set()


def _effective(form: Form) -> Form:
    """The form without what does not count: a text beside a bare module, fields of mechanisms that are not chosen."""
    form = _of_kind(form)
    if form.is_bare:
        form = replace(form, source=RANDOM, text="", target="")
    if form.source != IMAGE:
        form = replace(form, image="", size="")
    if form.source != AUDIO:
        form = replace(form, audio="")
    if form.phase != "decode":
        form = replace(form, steps="", generate=False)
    return replace(form, parameters=_parameters_in_use(form))


def _of_kind(form: Form) -> Form:
    """The form without the fields that its kind of experiment has no use for."""
    sections = form_sections.in_use(form.sections, form.kind, is_bare=form.is_bare)
    form = replace(form, sections=sections)
    if form.kind != RUN:
        form = replace(form, steps="", generate=False)
    if form.kind == SERVE:
        nothing = {"sequence_lengths": "", "batch_sizes": "", "record": (), "repeats": ""}
        return replace(form, phase="serving", repeat=False, **nothing)
    form = replace(form, caches=())
    if form.kind == FRONTIER:
        nothing = {"sequence_lengths": "", "text": "", "target": "", "max_tokens": "", "repeat": False}
        return replace(form, source=RANDOM, record=("memory",), **nothing)
    return form


def _parameters_in_use(form: Form) -> dict[str, dict[str, str]]:
    """The filled fields of the chosen mechanisms, each written the way `form_of` writes it."""
    filled = {
        mechanism: {
            name: ", ".join(part.strip() for part in text.split(",") if part.strip())
            for name, text in form.parameters.get(mechanism, {}).items()
            if text.strip(", ")
        }
        for mechanism in form.mechanisms
    }
    return {mechanism: named for mechanism, named in filled.items() if named}


def _with_model(document: Document, form: Form) -> Document:
    """The document with the form's model or module, where the other stood before."""
    if form.is_bare:
        shape = {"dim": typed(form.module_dim), "num_heads": typed(form.module_heads)}
        chosen = {"module": {**mapping(document.get("module")), **shape}}
    else:
        chosen = {"model": form.model}
    place = next((key for key in document if key in {"model", "module"}), None)
    if place is None:
        return {**document, **chosen}
    merged: Document = {}
    for key, value in document.items():
        if key == place:
            merged |= chosen
        elif key not in {"model", "module"}:
            merged[key] = value
    return merged


def _layers(text: str) -> Any:
    """`all`, or numbers and ranges: "0, 4-6" is [0, 4, 5, 6]."""
    if text.strip() in {"all", ""}:
        return "all"
    layers: list[Any] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        ends = re.fullmatch(r"([0-9]{1,4}) *- *([0-9]{1,4})", part)
        layers.extend(range(int(ends[1]), int(ends[2]) + 1) if ends else [typed(part)])
    return layers


def _input(form: Form, before: Document, changed: set[str]) -> Document:
    chosen = changed & {"source", "text", "image", "audio"}
    source = {} if chosen else {key: before[key] for key in before if key in INPUT_KINDS}
    if not source:
        written = {
            RANDOM: ("synthetic", "random"),
            IMAGE: ("image", form.image),
            AUDIO: ("audio", form.audio),
        }
        key, value = written.get(form.source, ("text", form.text))
        source[key] = value
    if form.size.strip():
        source["size"] = typed(form.size)
    if form.target:
        source["target"] = form.target
    if form.max_tokens.strip():
        source["max_tokens"] = typed(form.max_tokens)
    if form.repeat:
        source["repeat"] = True
    return source


def _decode(form: Form) -> Document | None:
    section: Document = {"steps": typed(form.steps)} if form.steps.strip() else {}
    return section | ({"generate": True} if form.generate else {}) or None


def _vary(form: Form, changed: set[str]) -> Document:
    vary: Document = {}
    if changed & {"mechanisms", "parameters"}:
        vary["mechanism"] = mechanism_entries(form.mechanisms, form.parameters)
    if "implementations" in changed:
        vary["implementation"] = list(form.implementations)
    if "sequence_lengths" in changed:
        vary["sequence_length"] = typed_list(form.sequence_lengths) or None
    if "dtypes" in changed:
        vary["dtype"] = list(form.dtypes)
    if "batch_sizes" in changed:
        vary["batch_size"] = typed_list(form.batch_sizes) or None
    if "caches" in changed:
        vary["cache"] = list(form.caches) or None
    return vary


def mechanism_entries(mechanisms: Sequence[str], parameters: Parameters) -> list[Any]:
    """`sliding_window` with `window_size: "64, 256"` becomes two entries; without parameters the bare name."""
    entries: list[Any] = []
    for mechanism in mechanisms:
        choices = {
            name: typed_list(text) for name, text in parameters.get(mechanism, {}).items() if text.strip()
        }
        for combination in itertools.product(*choices.values()):
            chosen = dict(zip(choices, combination, strict=True))
            entries.append({mechanism: chosen} if chosen else mechanism)
    return entries


def _mechanism_ids(entries: list[Any]) -> tuple[str, ...]:
    return picked(
        [next(iter(entry), "") if isinstance(entry, dict) else entry for entry in entries], MECHANISMS
    )


def _parameter_texts(entries: list[Any]) -> dict[str, dict[str, str]]:
    """Each parameter's values over all entries of a mechanism, as the field shows them: "64, 256"."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        for mechanism, given in entry.items():
            for name, value in mapping(given).items():
                seen.setdefault(text_of(mechanism), {}).setdefault(text_of(name), {})[text_of(value)] = None
    return {
        mechanism: {name: ", ".join(values) for name, values in named.items()}
        for mechanism, named in seen.items()
    }
