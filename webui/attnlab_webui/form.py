"""The New experiment form and the YAML beside it are one document: this is the way there and back.

The form knows some of the document's keys. A key it does not know, or whose field was not touched, stays as it stands.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attnlab.spec import DTYPES, IMPLEMENTATIONS, PHASES, RECORDS
from attnlab_kernels.catalog import MECHANISMS

BARE_MODULE = "bare module"
"""What the model picker holds when the experiment runs on one module with random weights."""

INPUT_KINDS = ("text", "file", "image", "audio", "synthetic")
TEXT, RANDOM, IMAGE, AUDIO = "text", "random tokens", "image", "audio"
"""What goes in: a text, random tokens of the model's vocabulary (`input.synthetic`), a picture, a sound."""

FORM_PHASES = tuple(phase for phase in PHASES if phase != "serving")
"""what the field offers: a workload to serve is written as YAML"""

Document = dict[str, Any]
Parameters = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Form:
    """What the fields hold. Lists of numbers are text with commas, as typed; sets of choices are in catalog order."""

    name: str = ""
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

    @property
    def is_bare(self) -> bool:
        """Whether the experiment runs on a bare module instead of a model."""
        return self.model == BARE_MODULE


def form_of(document: Document) -> Form:
    """What the fields show for a document; where it says more than a field can hold, the field shows its default."""
    vary = _mapping(document.get("vary"))
    source = _mapping(document.get("input"))
    module = _mapping(document.get("module"))
    entries = _list(vary.get("mechanism"))
    return Form(
        name=_text(document.get("name")),
        model=BARE_MODULE if document.get("module") is not None else _text(document.get("model")),
        module_dim=_text(module.get("dim", 512)),
        module_heads=_text(module.get("num_heads", 8)),
        source=_source(source, module),
        text=_text(source.get("text")),
        image=_text(source.get("image")),
        size=_text(source.get("size")),
        audio=_text(source.get("audio")),
        target=_text(source.get("target")),
        max_tokens=_text(source.get("max_tokens")),
        repeat=source.get("repeat") is True,
        mechanisms=_mechanism_ids(entries),
        parameters=_parameter_texts(entries),
        implementations=_known(vary.get("implementation", ["auto"]), IMPLEMENTATIONS),
        sequence_lengths=_commas(vary.get("sequence_length")),
        dtypes=_known(vary.get("dtype", ["float32"]), DTYPES),
        batch_sizes=_commas(vary.get("batch_size", [1])),
        phase="".join(_known(document.get("phase", "prefill"), FORM_PHASES)),
        steps=_text(_mapping(document.get("decode")).get("steps")),
        generate=_mapping(document.get("decode")).get("generate") is True,
        record=_known(document.get("record", RECORDS), RECORDS),
        layers=_commas(document.get("layers", "all")),
        repeats=_text(document.get("repeats", 20)),
        seed=_text(document.get("seed", 0)),
        gpus=_text(_mapping(document.get("resources")).get("gpus", 0)),
    )


def _source(given: Document, module: Document) -> str:
    if given.get("synthetic") is not None or module:
        return RANDOM
    return next((kind for kind in (IMAGE, AUDIO) if given.get(kind) is not None), TEXT)


def merge(form: Form, document: Document, shown: Form | None = None) -> Document:
    """The document with every key whose field was changed; the rest of it stays as written, in its order.

    Args:
        shown: what the fields showed before they were edited; by default what the document says.
    """
    shown = form_of(document) if shown is None else _effective(shown)
    form = _effective(form)
    changed = {item.name for item in fields(Form) if getattr(form, item.name) != getattr(shown, item.name)}
    merged: Document = dict(document)
    if "name" in changed:
        merged["name"] = form.name
    if changed & {"model", "module_dim", "module_heads"}:
        merged = _with_model(merged, form)
    if changed & {"source", "text", "image", "size", "audio", "target", "max_tokens", "repeat"}:
        merged["input"] = _input(form, _mapping(document.get("input")), changed)
    if vary := _vary(form, changed):
        both = {**_mapping(document.get("vary")), **vary}
        merged["vary"] = {key: value for key, value in both.items() if value is not None}
    plain = {
        "phase": form.phase,
        "record": list(form.record),
        "layers": _layers(form.layers),
        "repeats": _value(form.repeats),
        "seed": _value(form.seed),
    }
    merged |= {key: value for key, value in plain.items() if key in changed}
    if changed & {"steps", "generate"}:
        merged["decode"] = _decode(form)
        merged = {key: value for key, value in merged.items() if value is not None}
    if "gpus" in changed:
        merged["resources"] = {**_mapping(document.get("resources")), "gpus": _value(form.gpus)}
    return merged


def _effective(form: Form) -> Form:
    """The form without what does not count: a text beside a bare module, fields of mechanisms that are not chosen."""
    if form.is_bare:
        form = replace(form, source=RANDOM, text="", target="")
    if form.source != IMAGE:
        form = replace(form, image="", size="")
    if form.source != AUDIO:
        form = replace(form, audio="")
    if form.phase != "decode":
        form = replace(form, steps="", generate=False)
    return replace(form, parameters=_parameters_in_use(form))


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
        shape = {"dim": _value(form.module_dim), "num_heads": _value(form.module_heads)}
        chosen = {"module": {**_mapping(document.get("module")), **shape}}
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
        layers.extend(range(int(ends[1]), int(ends[2]) + 1) if ends else [_value(part)])
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
        source["size"] = _value(form.size)
    if form.target:
        source["target"] = form.target
    if form.max_tokens.strip():
        source["max_tokens"] = _value(form.max_tokens)
    if form.repeat:
        source["repeat"] = True
    return source


def _decode(form: Form) -> Document | None:
    section: Document = {"steps": _value(form.steps)} if form.steps.strip() else {}
    return section | ({"generate": True} if form.generate else {}) or None


def _vary(form: Form, changed: set[str]) -> Document:
    vary: Document = {}
    if changed & {"mechanisms", "parameters"}:
        vary["mechanism"] = mechanism_entries(form.mechanisms, form.parameters)
    if "implementations" in changed:
        vary["implementation"] = list(form.implementations)
    if "sequence_lengths" in changed:
        vary["sequence_length"] = _values(form.sequence_lengths) or None
    if "dtypes" in changed:
        vary["dtype"] = list(form.dtypes)
    if "batch_sizes" in changed:
        vary["batch_size"] = _values(form.batch_sizes)
    return vary


def mechanism_entries(mechanisms: Sequence[str], parameters: Parameters) -> list[Any]:
    """`sliding_window` with `window_size: "64, 256"` becomes two entries; without parameters the bare name."""
    entries: list[Any] = []
    for mechanism in mechanisms:
        choices = {
            name: _values(text) for name, text in parameters.get(mechanism, {}).items() if text.strip()
        }
        for combination in itertools.product(*choices.values()):
            chosen = dict(zip(choices, combination, strict=True))
            entries.append({mechanism: chosen} if chosen else mechanism)
    return entries


def _mechanism_ids(entries: list[Any]) -> tuple[str, ...]:
    return _known(
        [next(iter(entry), "") if isinstance(entry, dict) else entry for entry in entries], MECHANISMS
    )


def _parameter_texts(entries: list[Any]) -> dict[str, dict[str, str]]:
    """Each parameter's values over all entries of a mechanism, as the field shows them: "64, 256"."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        for mechanism, given in entry.items():
            for name, value in _mapping(given).items():
                seen.setdefault(_text(mechanism), {}).setdefault(_text(name), {})[_text(value)] = None
    return {
        mechanism: {name: ", ".join(values) for name, values in named.items()}
        for mechanism, named in seen.items()
    }


def _value(text: str) -> Any:
    """A typed number where the text is one; anything else stays text, for the spec to complain about."""
    text = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _values(text: str) -> list[Any]:
    return [_value(part) for part in text.split(",") if part.strip()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _commas(value: Any) -> str:
    return ", ".join(_text(item) for item in _list(value))


def _known(values: Any, choices: Iterable[str]) -> tuple[str, ...]:
    """The choices among the values, in the order of the choices; a field cannot show anything else."""
    given = {_text(value) for value in _list(values)}
    return tuple(choice for choice in choices if choice in given)


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
