"""The catalog as documents and in words: what the HTTP API, `attnlab mechanisms` and the form give."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from attnlab_kernels.catalog import Mechanism, Parameter


def mechanism_document(mechanism: Mechanism) -> dict[str, Any]:
    """The record with its parameters; what is no plain value (the cache formula) is left out."""
    values = {item.name: getattr(mechanism, item.name) for item in fields(mechanism)}
    document = {name: value for name, value in values.items() if not callable(value)}
    parameters = [asdict(parameter) for parameter in mechanism.parameters]
    return document | {
        "use_cases": list(mechanism.use_cases),
        "parameters": parameters,
    }


def parameter_hint(parameter: Parameter) -> str:
    """What an empty field means, and what may be typed: `256 (1 to 8,192)`."""
    return f"{parameter_default(parameter)} ({range_words(parameter)})"


def parameter_default(parameter: Parameter) -> str:
    return "the model's own" if parameter.default is None else str(parameter.default).lower()


def range_words(parameter: Parameter) -> str:
    """`1 to 64`, `from 1`, or the choices."""
    if parameter.choices:
        return ", ".join(map(str, parameter.choices))
    if parameter.kind == "bool":
        return "true or false"
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None:
        return f"{low:,.7g} to {high:,.7g}"
    if low is not None:
        return f"from {low:,.7g}"
    return f"up to {high:,.7g}" if high is not None else parameter.kind
