"""Short names of runs for charts, tables and picture titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnlab_kernels.catalog import MECHANISMS

OUTCOME_WORDS = {
    "succeeded": "succeeded",
    "incorrect": "incorrect",
    "unproved": "unproved",
    "throttled": "throttled",
    "failed": "failed",
    "out_of_memory": "out of memory",
    "unsupported": "unsupported",
    "timed_out": "timed out",
    "cancelled": "cancelled",
    "queued": "queued",
    "running": "running",
}


TIMINGS = ("latency_ms", "attention_latency_ms")


def shown_outcome(document: Mapping[str, Any]) -> str:
    """How a run ended as tables and charts of speed say it.

    ``incorrect`` where its error is over its budget, ``unproved`` where it is faster than anything known and nothing
    here could prove it, ``throttled`` where its device slowed down while it was timed.
    """
    withheld = document.get("speed_withheld")
    if withheld:
        return str(withheld).partition(":")[0]
    return "throttled" if throttling(document) else document["state"]


def throttling(document: Mapping[str, Any]) -> list[str]:
    """Why the device slowed down while the run was timed; empty where it did not."""
    return _reasons(document, "throttled")


def conditions_words(document: Mapping[str, Any]) -> str:
    """``throttled: power cap``, ``disturbed: ...`` or nothing: what its times have of the machine."""
    slowed, disturbed = throttling(document), _reasons(document, "disturbed")
    if slowed:
        return f"throttled: {'; '.join(slowed)}"
    return f"disturbed: {'; '.join(disturbed)}" if disturbed else ""


def _reasons(document: Mapping[str, Any], kind: str) -> list[str]:
    details = [(document.get(name) or {}).get("detail") or {} for name in TIMINGS]
    reasons = [reason for detail in details for reason in (detail.get("conditions") or {}).get(kind, [])]
    return list(dict.fromkeys(reasons))


def run_label(document: Mapping[str, Any]) -> str:
    """``#3 sliding_window(window_size=64) flex``: unique by its id, short enough for an axis."""
    return f"#{document['id']} {mechanism_label(document)} {ran_as(document)}"


def run_labels(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """`run_label` of each, with the model where the runs have several."""
    labels = [run_label(document) for document in documents]
    models = [document.get("model") for document in documents]
    if len(set(models)) < 2:
        return labels
    return [f"{label} {model}" if model else label for label, model in zip(labels, models, strict=True)]


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


def plain_number(value: float) -> str:
    """At least four significant digits, whole and with commas from ten thousand on: 3.142, 30,170, 1.2e+12."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
