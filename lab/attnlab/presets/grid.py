"""What a preset is made of: grids that become specs at the scale of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnlab.presets.claim import Claim
from attnlab.spec import ExperimentSpec, parse_spec

SCALES = ("cpu", "gpu")
Entry = str | dict[str, dict[str, Any]]


class PresetError(ValueError):
    """An unknown preset or scale; the text has the choices."""


@dataclass(frozen=True)
class Size:
    """How large a bare module's grid is on one kind of machine."""

    dim: int
    heads: int
    lengths: tuple[int, ...]
    kv_heads: int | None = None
    batches: tuple[int, ...] = (1,)
    repeats: int = 5
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """by mechanism: what differs from its entry"""


@dataclass(frozen=True)
class Grid:
    """One experiment of a preset, on a bare module or a bundled model.

    Attributes:
        model: a bundled model, whose ``text`` the runs read; None: a bare module.
    """

    name: str
    mechanisms: tuple[Entry, ...]
    cpu: Size
    gpu: Size
    phase: str = "prefill"
    implementations: tuple[str, ...] = ("auto",)
    record: tuple[str, ...] = ("timing", "memory")
    causal: bool = True
    layers: tuple[int, ...] | None = None
    model: str | None = None
    text: str = ""

    def document(self, scale: str) -> dict[str, Any]:
        """The spec as plain values. Raises PresetError."""
        _check_scale(scale)
        size = self.gpu if scale == "gpu" else self.cpu
        return {
            "name": self.name,
            **(self._subject(size)),
            "vary": {
                "mechanism": [_scaled(entry, size.parameters) for entry in self.mechanisms],
                "implementation": list(self.implementations),
                "sequence_length": list(size.lengths),
                "dtype": ["bfloat16" if scale == "gpu" else "float32"],
                "batch_size": list(size.batches),
            },
            "phase": self.phase,
            "record": list(self.record),
            "layers": "all" if self.layers is None else list(self.layers),
            "repeats": size.repeats,
            "resources": {"gpus": int(scale == "gpu")},
        }

    def spec(self, scale: str) -> ExperimentSpec:
        """The spec, checked. Raises PresetError, SpecError."""
        return parse_spec(self.document(scale))

    def _subject(self, size: Size) -> dict[str, Any]:
        if self.model is not None:
            return {"model": self.model, "input": {"text": self.text, "repeat": True}}
        module: dict[str, Any] = {"dim": size.dim, "num_heads": size.heads, "causal": self.causal}
        if size.kv_heads is not None:
            module["num_kv_heads"] = size.kv_heads
        return {"module": module, "input": {"synthetic": "random"}}


@dataclass(frozen=True)
class ServedSize:
    """How large a served workload is on one kind of machine: a bare module's sizes, and the ``serving`` section."""

    dim: int
    heads: int
    serving: Mapping[str, Any]
    repeats: int = 3
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """by mechanism: what differs from its entry"""


@dataclass(frozen=True)
class ServedGrid:
    """One experiment of a preset that serves requests, with each mechanism's cache contiguous and in pages."""

    name: str
    mechanisms: tuple[Entry, ...]
    cpu: ServedSize
    gpu: ServedSize
    phase: str = "serving"

    def document(self, scale: str) -> dict[str, Any]:
        """The spec as plain values. Raises PresetError."""
        _check_scale(scale)
        size = self.gpu if scale == "gpu" else self.cpu
        return {
            "name": self.name,
            "module": {"dim": size.dim, "num_heads": size.heads},
            "vary": {
                "mechanism": [_scaled(entry, size.parameters) for entry in self.mechanisms],
                "cache": ["contiguous", "paged"],
                "dtype": ["bfloat16" if scale == "gpu" else "float32"],
            },
            "phase": self.phase,
            "serving": dict(size.serving),
            "record": ["timing"],
            "repeats": size.repeats,
            "resources": {"gpus": int(scale == "gpu")},
        }

    def spec(self, scale: str) -> ExperimentSpec:
        """The spec, checked. Raises PresetError, SpecError."""
        return parse_spec(self.document(scale))


@dataclass(frozen=True)
class Preset:
    """A few experiments under one name, and the claims that they put to the test."""

    name: str
    title: str
    about: str
    grids: tuple[Grid | ServedGrid, ...]
    claims: tuple[Claim, ...] = ()
    correction: str = ""

    @property
    def kind(self) -> str:
        """``claims`` or ``stack``."""
        return "claims" if self.claims else "stack"

    @property
    def tag(self) -> str:
        """What marks the experiments of this preset in the store."""
        return f"preset:{self.name}"

    def specs(self, scale: str) -> list[ExperimentSpec]:
        """Its experiments, checked. Raises PresetError, SpecError."""
        return [grid.spec(scale) for grid in self.grids]


def _check_scale(scale: str) -> None:
    if scale not in SCALES:
        raise PresetError(f"scale must be one of {', '.join(SCALES)}; got {scale!r}")


def _scaled(entry: Entry, changes: Mapping[str, Mapping[str, Any]]) -> Entry:
    name = entry if isinstance(entry, str) else next(iter(entry))
    given = {} if isinstance(entry, str) else entry[name]
    parameters = dict(changes.get(name, {})) | given
    return {name: parameters} if parameters else name
