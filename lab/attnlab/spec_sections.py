"""The sections of a spec, each a strict, frozen record, and what their values may be. Torch-free."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from attnlab_kernels.catalog import MECHANISMS, validate_parameters

from .pictures import PictureError, open_picture, picture_samples
from .problems import shown
from .serving.settings import CACHES
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
    "tiled",
    "fused",
    "natten",
    "parallel",
    "recurrent",
    "chunked",
    "fla",
)
DTYPES = ("float32", "float16", "bfloat16", "float64")
PHASES = ("prefill", "decode", "train", "serving")
RECORDS = ("maps", "timing", "memory", "accuracy", "statistics")

REFERENCES = ("sdpa",)

MAX_SEQUENCE = 1 << 20


def choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise broken("must be one of the choices", value, choices)
        return value

    return check


def broken(rule: str, value: Any, choices: tuple[str, ...] = ()) -> PydanticCustomError:
    # rule and choices go through ctx, as pydantic would read braces in the text as a template
    return PydanticCustomError("attnlab", "{rule}", {"rule": rule, "shown": shown(value), "choices": choices})


def _opened(open_: Callable[[str], Any]) -> Callable[[str], str]:
    def check(value: str) -> str:
        try:
            open_(value)
        except (PictureError, SoundError) as error:
            choices = tuple(picture_samples() if open_ is open_picture else sound_samples())
            raise broken(str(error), value[:64], choices) from None
        return value

    return check


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _some_and_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise broken("must name at least one value (an empty grid has no runs)", [])
    for index, value in enumerate(values):
        if value in values[:index]:
            raise broken("names the same value twice", value)
    return values


T = TypeVar("T")
Choices = Annotated[tuple[T, ...], BeforeValidator(as_tuple), AfterValidator(_some_and_distinct)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleSpec(Strict):
    """A bare attention module, run on synthetic hidden states."""

    dim: Annotated[StrictInt, Field(ge=1, le=65_536)]
    num_heads: Annotated[StrictInt, Field(ge=1, le=1024)]
    num_kv_heads: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    """key and value heads of grouped_query and sliding_window, where the mechanism does not say itself"""
    causal: StrictBool = True
    """no query sees a later key, in every mechanism alike"""


class NeedleSpec(Strict):
    """A sentence hidden in the text, asked for at its end and said again as the answer (Wu et al. 2024)."""

    sentence: Annotated[str, Field(min_length=1, max_length=2000)]
    depth: Annotated[float, Field(ge=0, le=1)] = 0.5
    """where in the haystack it stands: 0 at its beginning, 1 at its end"""
    question: Annotated[str, Field(max_length=2000)] = ""
    """asked after the haystack"""


class InputSpec(Strict):
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
    synthetic: Annotated[str, AfterValidator(choice(("random",)))] | None = None
    """random tokens from the model's vocabulary; the only input of a bare module (normal hidden states)"""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_SEQUENCE)] | None = None
    """cut the text after this many tokens"""
    repeat: StrictBool = False
    """repeat the text until sequence_length is reached"""
    needle: NeedleSpec | None = None
    """a sentence to hide in the text, which becomes the haystack"""


class MechanismChoice(Strict):
    """A mechanism and all its parameters; written as its name, or ``{name: {parameter: value}}``."""

    name: str
    parameters: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        name, given = _mechanism_entry(value)
        if name not in MECHANISMS:
            raise broken("must be a mechanism of the catalog", name, tuple(MECHANISMS))
        try:
            return {"name": name, "parameters": validate_parameters(name, given)}
        except ValueError as error:
            raise broken(str(error), "") from None

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
    raise broken("must be a name or {name: {parameter: value}}", value)


class VarySpec(Strict):
    """The grid: every combination becomes one run."""

    mechanism: Choices[MechanismChoice]
    implementation: Choices[Annotated[str, AfterValidator(choice(IMPLEMENTATIONS))]] = ("auto",)
    sequence_length: Choices[Annotated[StrictInt, Field(ge=1, le=MAX_SEQUENCE)]] | None = None
    dtype: Choices[Annotated[str, AfterValidator(choice(DTYPES))]] = ("float32",)
    batch_size: Choices[Annotated[StrictInt, Field(ge=1, le=4096)]] = (1,)
    cache: Choices[Annotated[str, AfterValidator(choice(CACHES))]] | None = None
    """of phase serving: room for the longest sequence each, or pages; default paged"""


class Resources(Strict):
    gpus: Annotated[StrictInt, Field(ge=0, le=64)] = 0


class DecodeSpec(Strict):
    """Of phase decode: the last tokens are decoded one after another, and each is a row of the maps."""

    steps: Annotated[StrictInt, Field(ge=1, le=4096)]
    """how many; without this section one"""
    generate: StrictBool = False
    """the model writes these tokens itself, greedily and through its own attention; false: they are the input's"""


class FrontierSpec(Strict):
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
