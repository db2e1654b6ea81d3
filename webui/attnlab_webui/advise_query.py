"""An advice as an address: answers, shape and scale there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from attnlab.advise import (
    KNOWN_SHAPES,
    SCALES,
    Advice,
    Answers,
    ModelShape,
    advise,
    machine_scale,
    parse_tokens,
)
from attnlab_storage.database import Store
from attnlab_webui.system_facts import machines

WORDS = ("goal", "scarce", "task", "aim")
COUNTS = ("layers", "heads", "kv_heads", "head_dim", "batch")
FIRST = Answers(goal="serving", context=8192, scarce="memory")


@dataclass(frozen=True)
class Asked:
    """What the fields of the page hold."""

    answers: Answers = FIRST
    shape: ModelShape = KNOWN_SHAPES["llama-3-8b"].shape
    scale: str = "cpu"

    def advice(self) -> Advice:
        """The recommendation. Raises AdviceError."""
        return advise(self.answers, self.shape, self.scale)

    def query(self) -> str:
        """The address that asks for the same."""
        shape = self.shape.to_dict()
        given = {name: getattr(self.answers, name) for name in WORDS}
        told = given | {name: shape[name] for name in ("context", *COUNTS, "dtype")} | {"scale": self.scale}
        return urlencode({name: value for name, value in told.items() if value is not None})


def asked_of(values: Mapping[str, Any], default: Asked) -> Asked:
    """Answers and shape from the words of an address or the values of fields. Raises AdviceError, ValueError."""
    counts = {name: _count(name, values[name]) for name in COUNTS if values.get(name) not in (None, "")}
    context = parse_tokens(str(values["context"])) if values.get("context") else default.shape.context
    told: dict[str, Any] = {**counts, "context": context}
    if values.get("dtype"):
        told["dtype"] = values["dtype"]
    given = {name: values.get(name) or None for name in WORDS}
    answers = (
        Answers(**given, context=context) if given["goal"] else replace(default.answers, context=context)
    )
    scale = values.get("scale") or default.scale
    return Asked(answers, replace(default.shape, **told), scale)


def _count(name: str, value: Any) -> int:
    text = str(value)
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"{name} must be a whole number from 1 to 1,000,000,000; got {text[:40]!r}")
    return int(text)


def lab_scale(store: Store) -> str:
    """``gpu`` where a machine that serves the queue has one, or this one has; else ``cpu``."""
    served = any(machine["gpus"] for machine in machines(store))
    return "gpu" if served else machine_scale()


def default_asked(store: Store) -> Asked:
    """What the page opens with."""
    scale = lab_scale(store)
    return Asked(scale=scale if scale in SCALES else "cpu")
