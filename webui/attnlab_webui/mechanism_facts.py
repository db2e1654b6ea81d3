"""The catalog as documents: what the HTTP API and `attnlab mechanisms --json` give."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from attnlab_kernels.catalog import Mechanism


def mechanism_document(mechanism: Mechanism) -> dict[str, Any]:
    """The record with its parameters; what is no plain value (the cache formula) is left out."""
    values = {item.name: getattr(mechanism, item.name) for item in fields(mechanism)}
    document = {name: value for name, value in values.items() if not callable(value)}
    parameters = [asdict(parameter) for parameter in mechanism.parameters]
    return document | {
        "use_cases": list(mechanism.use_cases),
        "parameters": parameters,
    }
