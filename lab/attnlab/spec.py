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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictInt,
    ValidationError,
    model_validator,
)

from .bundled import describe_model
from .documents import read_document, write_document
from .files import MAX_TEXT_BYTES, with_files_read, with_trace_read
from .inputs import count_tokens
from .problems import Problem, SpecError, shown
from .serving.settings import ServingSpec
from .serving.workload import draw_requests
from .spec_problems import problem_of
from .spec_sections import (
    PHASES,
    RECORDS,
    REFERENCES,
    Choices,
    DecodeSpec,
    FrontierSpec,
    InputSpec,
    ModuleSpec,
    Resources,
    Strict,
    VarySpec,
    as_tuple,
    broken,
    choice,
)

SERVING_PASSES = 3
"""default repeats of phase serving: each is a whole pass over the workload"""

MAX_SPEC_BYTES = 2 * MAX_TEXT_BYTES
MAX_RUNS = 512
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


def _layers(value: Any) -> str | tuple[int, ...]:
    if value == "all":
        return "all"
    layers = as_tuple(value)
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise broken("must be 'all' or a list of zero-based layers", value, ("all", "[0, 1, ...]"))
    return tuple(sorted(set(layers)))


def _plain_layers(layers: str | tuple[int, ...]) -> Any:
    return layers if isinstance(layers, str) else list(layers)


class ExperimentSpec(Strict):
    """An experiment: a model or module, an input, a grid and what to record."""

    name: Annotated[str, Field(min_length=1, max_length=120)]
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """a bundled name, a hub id or a local folder"""
    module: ModuleSpec | None = None
    input: InputSpec = InputSpec()
    vary: VarySpec
    frontier: FrontierSpec | None = None
    """search the longest sequence that fits instead of running given ones"""
    phase: Annotated[str, AfterValidator(choice(PHASES))] = "prefill"
    decode: DecodeSpec | None = None
    """of phase decode: how many tokens are decoded, and who writes them"""
    serving: ServingSpec | None = None
    """of phase serving: the workload and the engine"""
    record: Choices[Annotated[str, AfterValidator(choice(RECORDS))]] = RECORDS
    layers: Annotated[str | tuple[int, ...], PlainValidator(_layers), PlainSerializer(_plain_layers)] = "all"
    """``all``, or the zero-based layers whose maps are kept"""
    repeats: Annotated[StrictInt, Field(ge=1, le=1000)] = 20
    reference: Annotated[str, AfterValidator(choice(REFERENCES))] | None = None
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
        raise SpecError([problem_of(detail, ExperimentSpec) for detail in error.errors()]) from None
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
