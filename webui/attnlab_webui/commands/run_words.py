"""The document of a run as lines for a terminal, without its samples and its environment's details."""

from collections.abc import Mapping
from typing import Any

from attnlab.intervals import median_interval
from attnlab.views.labels import conditions_words, shown_outcome
from attnlab_webui.commands.console import short_bytes, short_number


def run_words(document: Mapping[str, Any]) -> str:
    """One line a fact: what was run, how it ended, what was measured and what has to be known of the figures."""
    check = document["map_check"]
    lines = {
        "run": f"{document['id']} of experiment {document['experiment']}",
        "state": shown_outcome(document) + (f": {document['reason']}" if document["reason"] else ""),
        "model": document["model"],
        "mechanism": " ".join(
            [document["mechanism"], *(f"{k}={v}" for k, v in document["parameters"].items() if v is not None)]
        ),
        "implementation": f"{document['implementation']}, ran {', '.join(document['kernels']) or '-'}",
        "input": f"{document['sequence_length']} tokens x {document['batch_size']}, {document['dtype']}",
        **_speed(document),
        "peak memory": short_bytes(document["peak_memory_bytes"]),
        "accuracy": ", ".join(f"{k} {short_number(v)}" for k, v in document["accuracy"].items()) or "-",
        "map check": ", ".join(f"{name} {short_number(value)}" for name, value in check.items()),
        "stored": short_bytes(document["stored_bytes"]),
    }
    return "\n".join(f"{name:<15} {value}" for name, value in lines.items())


def _speed(document: Mapping[str, Any]) -> dict[str, str]:
    """Lines of a served run, of a search, or of a timed one; why a speed is withheld, what disturbed it."""
    lines = {"latency": _median(document["latency_ms"])}
    if serving := document["serving"]:
        lines = {
            "tokens written": _figure(serving, "output_tokens_per_second", "a second"),
            "first token": _figure(serving, "time_to_first_token", "ms"),
            "between tokens": _figure(serving, "inter_token_latency", "ms"),
        }
    elif frontier := document["frontier"]:
        lines = {"longest": f"{frontier['fits']:,} tokens fit {short_bytes(frontier['memory_bytes'])}"}
    elif document["attention_latency_ms"]:
        lines["attention"] = _median(document["attention_latency_ms"])
    if withheld := document["speed_withheld"]:
        lines["withheld"] = withheld
    if conditions := conditions_words(document):
        lines["conditions"] = conditions
    return lines


def _median(timing: Mapping[str, Any] | None) -> str:
    """``2.1 ms median, 95 % 2.0 to 2.3``"""
    if timing is None:
        return "-"
    words = f"{short_number(timing['median'], 'ms')} median"
    if interval := median_interval(timing["samples"]):
        words += f", 95 % {short_number(interval[0])} to {short_number(interval[1])}"
    return words


def _figure(serving: Mapping[str, Any], name: str, unit: str) -> str:
    return short_number((serving.get(name) or {}).get("value"), unit)
