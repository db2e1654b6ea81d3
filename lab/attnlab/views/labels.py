"""Short names of runs for charts, tables and picture titles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnlab_kernels.catalog import MECHANISMS

OUTCOME_WORDS = {
    "succeeded": "succeeded",
    "incorrect": "incorrect",
    "unproved": "unproved",
    "failed": "failed",
    "out_of_memory": "out of memory",
    "unsupported": "unsupported",
    "timed_out": "timed out",
    "cancelled": "cancelled",
    "queued": "queued",
    "running": "running",
}


def shown_outcome(document: Mapping[str, Any]) -> str:
    """How a run ended as tables and charts of speed say it.

    ``incorrect`` where its error is over its budget, ``unproved`` where it is faster than anything known and nothing
    here could prove it.
    """
    withheld = document.get("speed_withheld")
    return str(withheld).partition(":")[0] if withheld else document["state"]


def run_label(document: Mapping[str, Any]) -> str:
    """``#3 sliding_window(window_size=64) flex``: unique by its id, short enough for an axis."""
    return f"#{document['id']} {mechanism_label(document)} {ran_as(document)}"


def mechanism_label(document: Mapping[str, Any]) -> str:
    """``sliding_window(window_size=64)``: what differs from the catalog's defaults and has an effect.

    Of a mechanism or a parameter that this version's catalog lacks, all that the run says.
    """
    name, given = str(document["mechanism"]), dict(document.get("parameters") or {})
    if name in MECHANISMS:
        record = MECHANISMS[name]
        defaults = record.validate({})
        used = record.in_use(defaults | given)
        given = {key: value for key, value in used.items() if key not in defaults or value != defaults[key]}
    inside = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    return f"{name}({inside})" if inside else name


def ran_as(document: Mapping[str, Any]) -> str:
    """The implementation that ran, or the one asked for when the run never got so far."""
    return str(document.get("chosen") or document["implementation"])


def map_label(document: Mapping[str, Any], layer: int, head: int) -> str:
    """``#3 multi_head · L5H2 · smollm2-135m``."""
    return view_label(document, f"L{layer}H{head}")


def view_label(document: Mapping[str, Any], shown: str) -> str:
    """``#3 multi_head · entropy · smollm2-135m``: whose, what is shown, of which model."""
    parts = [f"#{document['id']} {mechanism_label(document)}", shown]
    return " · ".join([*parts, str(document["model"])] if document.get("model") else parts)


def format_bytes(count: float) -> str:
    """``188.7 MB``: decimal units, as disks and the documents of this project count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
