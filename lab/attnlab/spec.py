"""What an experiment is: a spec whose grid expands to runs. Torch-free.

A spec as YAML::

    name: window-vs-full
    model: smollm2-135m               # or `module: {dim: 512, num_heads: 8}` for a bare module
    input: {text: "...", max_tokens: 2048}
    vary:
      mechanism: [multi_head, {sliding_window: {window_size: 256}}]
      sequence_length: [512, 2048]
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from attnlab_kernels.catalog import MECHANISMS, validate_parameters

from .bundled import describe_model
from .documents import read_document, write_document
from .files import MAX_TEXT_BYTES, with_files_read, with_trace_read
from .inputs import count_tokens
from .pictures import PictureError, open_picture, picture_samples
from .problems import Problem, SpecError, shown
from .serving.settings import CACHES, Arrivals, Lengths, ServingSpec, Workload
from .serving.workload import draw_requests
from .sounds import SoundError, open_sound, sound_samples

IMPLEMENTATIONS = (
    "auto",
    "eager",
    "sdpa_math",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "flex",
    "triton",
    "triton_hopper",
    "banded",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "flash_attn_hub",
    "flashinfer",
    "xformers",
)
DTYPES = ("float32", "float16", "bfloat16", "float64")
PHASES = ("prefill", "decode", "train", "serving")
RECORDS = ("maps", "timing", "memory", "accuracy", "statistics")

SERVING_PASSES = 3
"""default repeats of phase serving: each is a whole pass over the workload"""
REFERENCES = ("sdpa",)

MAX_SPEC_BYTES = 2 * MAX_TEXT_BYTES
MAX_RUNS = 512
MAX_SEQUENCE = 1 << 20
MAX_CELLS = 1 << 22
"""tokens in one run: batch_size x sequence_length"""


@dataclass(frozen=True)
class RunPoint:
    """One point of the grid: everything that tells this run from its neighbours."""

    mechanism: str
    parameters: dict[str, Any]
    implementation: str
    sequence_length: int
    """tokens; 0: as long as the text turns out to be (its tokenizer is not on the machine that asks)"""
    dtype: str
    batch_size: int
    phase: str
    model: str
    kind: str
    """``bench`` when time or memory is measured (such a run owns its device), else ``inspect``"""
    gpus: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise _broken("must be one of the choices", value, choices)
        return value

    return check


def _broken(rule: str, value: Any, choices: tuple[str, ...] = ()) -> PydanticCustomError:
    # rule and choices go through ctx, as pydantic would read braces in the text as a template
    return PydanticCustomError("attnlab", "{rule}", {"rule": rule, "shown": shown(value), "choices": choices})


def _opened(open_: Callable[[str], Any]) -> Callable[[str], str]:
    def check(value: str) -> str:
        try:
            open_(value)
        except (PictureError, SoundError) as error:
            choices = tuple(picture_samples() if open_ is open_picture else sound_samples())
            raise _broken(str(error), value[:64], choices) from None
        return value

    return check


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _some_and_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise _broken("must name at least one value (an empty grid has no runs)", [])
    for index, value in enumerate(values):
        if value in values[:index]:
            raise _broken("names the same value twice", value)
    return values


T = TypeVar("T")
Choices = Annotated[tuple[T, ...], BeforeValidator(_as_tuple), AfterValidator(_some_and_distinct)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleSpec(_Strict):
    """A bare attention module, run on synthetic hidden states."""

    dim: Annotated[StrictInt, Field(ge=1, le=65_536)]
    num_heads: Annotated[StrictInt, Field(ge=1, le=1024)]
    num_kv_heads: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    """key and value heads of grouped_query and sliding_window, where the mechanism does not say itself"""
    causal: StrictBool = True
    """no query sees a later key, in every mechanism alike"""


class NeedleSpec(_Strict):
    """A sentence hidden in the text, asked for at its end and said again as the answer (Wu et al. 2024)."""

    sentence: Annotated[str, Field(min_length=1, max_length=2000)]
    depth: Annotated[float, Field(ge=0, le=1)] = 0.5
    """where in the haystack it stands: 0 at its beginning, 1 at its end"""
    question: Annotated[str, Field(max_length=2000)] = ""
    """asked after the haystack"""


class InputSpec(_Strict):
    """What goes in: exactly one of text, file, image, audio and synthetic."""

    text: str | None = None
    file: str | None = None
    """a text file; read when the spec is parsed, by the command line and by Python only"""
    image: Annotated[str, AfterValidator(_opened(open_picture))] | None = None
    """a sample's name or a data URI; a file becomes one when the spec is parsed (command line and Python only)"""
    size: Annotated[StrictInt, Field(ge=1, le=4096)] | None = None
    """pixels a side that the picture is brought to; None: what the model was trained on"""
    audio: Annotated[str, AfterValidator(_opened(open_sound))] | None = None
    """a sample's name or a data URI, as with image"""
    target: str | None = None
    """what the decoder of an encoder-decoder has written; None: what it writes itself, greedily"""
    synthetic: Annotated[str, AfterValidator(_choice(("random",)))] | None = None
    """random tokens from the model's vocabulary; the only input of a bare module (normal hidden states)"""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_SEQUENCE)] | None = None
    """cut the text after this many tokens"""
    repeat: StrictBool = False
    """repeat the text until sequence_length is reached"""
    needle: NeedleSpec | None = None
    """a sentence to hide in the text, which becomes the haystack"""


class MechanismChoice(_Strict):
    """A mechanism and all its parameters; written as its name, or ``{name: {parameter: value}}``."""

    name: str
    parameters: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        name, given = _mechanism_entry(value)
        if name not in MECHANISMS:
            raise _broken("must be a mechanism of the catalog", name, tuple(MECHANISMS))
        try:
            return {"name": name, "parameters": validate_parameters(name, given)}
        except ValueError as error:
            raise _broken(str(error), "") from None

    @model_serializer
    def _write(self) -> str | dict[str, dict[str, Any]]:
        if self.parameters == validate_parameters(self.name, {}):
            return self.name
        return {self.name: dict(self.parameters)}


def _mechanism_entry(value: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(value, MechanismChoice):
        return value.name, dict(value.parameters)
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        name, given = next(iter(value.items()))
        if isinstance(name, str) and isinstance(given, Mapping | None):
            return name, {str(key): item for key, item in (given or {}).items()}
    raise _broken("must be a name or {name: {parameter: value}}", value)


class VarySpec(_Strict):
    """The grid: every combination becomes one run."""

    mechanism: Choices[MechanismChoice]
    implementation: Choices[Annotated[str, AfterValidator(_choice(IMPLEMENTATIONS))]] = ("auto",)
    sequence_length: Choices[Annotated[StrictInt, Field(ge=1, le=MAX_SEQUENCE)]] | None = None
    dtype: Choices[Annotated[str, AfterValidator(_choice(DTYPES))]] = ("float32",)
    batch_size: Choices[Annotated[StrictInt, Field(ge=1, le=4096)]] = (1,)
    cache: Choices[Annotated[str, AfterValidator(_choice(CACHES))]] | None = None
    """of phase serving: room for the longest sequence each, or pages; default paged"""


class Resources(_Strict):
    gpus: Annotated[StrictInt, Field(ge=0, le=64)] = 0


class DecodeSpec(_Strict):
    """Of phase decode: the last tokens are decoded one after another, and each is a row of the maps."""

    steps: Annotated[StrictInt, Field(ge=1, le=4096)]
    """how many; without this section one"""
    generate: StrictBool = False
    """the model writes these tokens itself, greedily and through its own attention; false: they are the input's"""


class FrontierSpec(_Strict):
    """A search for the longest sequence that fits: every run of the grid doubles its length, then bisects."""

    up_to: Annotated[StrictInt, Field(ge=2, le=MAX_SEQUENCE)]
    """the longest that is tried"""
    memory_bytes: Annotated[StrictInt, Field(ge=1 << 20, le=1 << 44)]
    """what one trial may allocate: weights, inputs, cache and everything that the step takes"""
    first: Annotated[StrictInt, Field(ge=2, le=MAX_SEQUENCE)] = 256
    """the length that is tried first"""
    resolution: Annotated[StrictInt, Field(ge=1, le=MAX_SEQUENCE)] = 64
    """tokens between the longest that fits and the first that does not, at most"""
    seconds: Annotated[float, Field(gt=0, le=3600)] = 60
    """a trial that takes longer does not fit"""

    def trials(self) -> int:
        """Return how many lengths a search tries at most."""
        doublings = math.ceil(math.log2(self.up_to / self.first)) + 1
        gap = max(self.up_to - self.up_to // 2, self.first)
        return doublings + max(0, math.ceil(math.log2(gap / self.resolution)))


def _layers(value: Any) -> str | tuple[int, ...]:
    if value == "all":
        return "all"
    layers = _as_tuple(value)
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise _broken("must be 'all' or a list of zero-based layers", value, ("all", "[0, 1, ...]"))
    return tuple(sorted(set(layers)))


def _plain_layers(layers: str | tuple[int, ...]) -> Any:
    return layers if isinstance(layers, str) else list(layers)


class ExperimentSpec(_Strict):
    """An experiment: a model or module, an input, a grid and what to record."""

    name: Annotated[str, Field(min_length=1, max_length=120)]
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """a bundled name, a hub id or a local folder"""
    module: ModuleSpec | None = None
    input: InputSpec = InputSpec()
    vary: VarySpec
    frontier: FrontierSpec | None = None
    """search the longest sequence that fits instead of running given ones"""
    phase: Annotated[str, AfterValidator(_choice(PHASES))] = "prefill"
    decode: DecodeSpec | None = None
    """of phase decode: how many tokens are decoded, and who writes them"""
    serving: ServingSpec | None = None
    """of phase serving: the workload and the engine"""
    record: Choices[Annotated[str, AfterValidator(_choice(RECORDS))]] = RECORDS
    layers: Annotated[str | tuple[int, ...], PlainValidator(_layers), PlainSerializer(_plain_layers)] = "all"
    """``all``, or the zero-based layers whose maps are kept"""
    repeats: Annotated[StrictInt, Field(ge=1, le=1000)] = 20
    reference: Annotated[str, AfterValidator(_choice(REFERENCES))] | None = None
    """timed in turn with the attention, sample by sample: ``sdpa`` is plain causal attention of the same shape"""
    seed: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] = 0
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _serving_defaults(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("phase") == "serving":
            return {"repeats": SERVING_PASSES, "record": ["timing", "accuracy"], **values}
        return values

    @property
    def model_name(self) -> str:
        """The model as lists show it; a bare module is named by its shape."""
        if self.module is None:
            return cast(str, self.model)
        kv_heads = f"/{self.module.num_kv_heads}" if self.module.num_kv_heads else ""
        return f"module {self.module.dim}x{self.module.num_heads}{kv_heads}"

    @property
    def decoded(self) -> int:
        """How many tokens phase decode decodes one after another, the rows of its maps; 0 in other phases."""
        if self.phase != "decode":
            return 0
        return self.decode.steps if self.decode else 1

    @property
    def generated(self) -> int:
        """How many tokens the model writes itself, after those of the input."""
        return self.decode.steps if self.decode and self.decode.generate else 0

    def points(self) -> list[RunPoint]:
        """Return the runs of the grid in the order they are queued: mechanism varies slowest."""
        if self.serving is not None:
            return self._serving_points(self.serving)
        vary = self.vary
        kind = "bench" if {"timing", "memory"} & set(self.record) else "inspect"
        longest = self.frontier.up_to if self.frontier else self._text_length() or 0
        lengths = vary.sequence_length or (longest,)
        grid = itertools.product(vary.mechanism, vary.implementation, lengths, vary.dtype, vary.batch_size)
        return [
            RunPoint(
                mechanism=mechanism.name,
                parameters=dict(mechanism.parameters),
                implementation=implementation,
                sequence_length=length,
                dtype=dtype,
                batch_size=batch_size,
                phase=self.phase,
                model=self.model_name,
                kind=kind,
                gpus=self.resources.gpus,
            )
            for mechanism, implementation, length, dtype, batch_size in grid
        ]

    def _serving_points(self, serving: ServingSpec) -> list[RunPoint]:
        """As `points`: the length is that of the longest sequence, the batch the most sequences at a time."""
        longest = serving.max_length or max(one.tokens for one in draw_requests(serving.workload, self.seed))
        vary = self.vary
        grid = itertools.product(vary.mechanism, vary.cache or ("paged",), vary.implementation, vary.dtype)
        return [
            RunPoint(
                mechanism=mechanism.name,
                parameters=mechanism.parameters | {"cache": cache},
                implementation=implementation,
                sequence_length=longest,
                dtype=dtype,
                batch_size=serving.max_batch,
                phase=self.phase,
                model=self.model_name,
                kind="bench",
                gpus=self.resources.gpus,
            )
            for mechanism, cache, implementation, dtype in grid
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that parse_spec reads back into an equal spec."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        return write_document(self.to_dict())

    def hash(self) -> str:
        """Return the sha256 of the spec without its name: equal for experiments that would run the same."""
        values = {key: value for key, value in self.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def text_tokens(self) -> int | None:
        """Return how many tokens the text has, or None where the model's tokenizer is not on this machine."""
        if self.model is None or self.input.text is None:
            return None
        return count_tokens(self.model, self.input.text)

    def _text_length(self) -> int | None:
        if self.input.image is not None or self.input.audio is not None:
            facts = describe_model(self.model or "")
            return facts and facts.positions(self.input.size)
        given = self.input.max_tokens
        if self.input.text is not None:
            counted = self.text_tokens()
            given = counted if counted is None or given is None else min(counted, given)
        return given and given + self.generated


def parse_spec(source: str | bytes | Mapping[str, Any], *, folder: Path | None = None) -> ExperimentSpec:
    """Read and check a spec.

    Args:
        source: YAML or JSON text, or plain values.
        folder: where the files of ``input`` are looked up; None refuses them (a request names no files).

    Raises:
        SpecError: with every problem found.
    """
    from .spec_rules import broken_rules

    values = with_trace_read(with_files_read(_document(source), folder), folder)
    try:
        spec = ExperimentSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError([_problem(detail) for detail in error.errors()]) from None
    if problems := broken_rules(spec):
        raise SpecError(problems)
    return spec


def _document(source: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, str | bytes):
        size = len(source.encode() if isinstance(source, str) else source)
        if size > MAX_SPEC_BYTES:
            raise SpecError([Problem("spec", f"must be at most {MAX_SPEC_BYTES} bytes", str(size))])
        try:
            text = source if isinstance(source, str) else source.decode()
        except UnicodeDecodeError as error:
            raise SpecError([Problem("spec", f"must be UTF-8 text: byte {error.start} is not")]) from None
        source = read_document(text)
    if not isinstance(source, Mapping):
        fields = tuple(ExperimentSpec.model_fields)
        raise SpecError([Problem("spec", "must be a mapping of fields to values", shown(source), fields)])
    return {str(key): value for key, value in source.items()}


def _problem(detail: Any) -> Problem:
    argument = _path(detail["loc"])
    context = detail.get("ctx") or {}
    match detail["type"]:
        case "attnlab":
            value = context["shown"] if context["shown"] != "''" else ""
            return Problem(argument, context["rule"], value, tuple(context["choices"]))
        case "extra_forbidden":
            fields = tuple(_fields_at(detail["loc"][:-1]))
            return Problem(argument, "is not a field of a spec", shown(str(detail["loc"][-1])), fields)
        case "missing":
            return Problem(argument, "must be given")
        case _:
            message = detail["msg"].removeprefix("Input should be ")
            return Problem(argument, f"must be {message}", shown(detail["input"]))


def _path(location: tuple[Any, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or "spec"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    nested: dict[tuple[Any, ...], type[BaseModel]] = {
        ("module",): ModuleSpec,
        ("input",): InputSpec,
        ("input", "needle"): NeedleSpec,
        ("vary",): VarySpec,
        ("decode",): DecodeSpec,
        ("frontier",): FrontierSpec,
        ("resources",): Resources,
        ("serving",): ServingSpec,
        ("serving", "workload"): Workload,
        ("serving", "workload", "arrivals"): Arrivals,
        ("serving", "workload", "prompt_tokens"): Lengths,
        ("serving", "workload", "output_tokens"): Lengths,
    }
    kind = nested.get(location, ExperimentSpec)
    return list(kind.model_fields)
