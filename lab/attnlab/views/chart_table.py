"""Run documents as one flat table: a row a run, its fields and every number that a chart can draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from attnlab.views.labels import conditions_words, mechanism_label, ran_as, run_label, shown_outcome

Document = Mapping[str, Any]


class Field(NamedTuple):
    """What tells runs apart: an axis of the grid, or what it came to."""

    words: str
    read: Callable[[Document], Any]


class Measure(NamedTuple):
    """A number of a run."""

    words: str
    unit: str
    read: Callable[[Document], float | None]
    samples: str = ""
    """the key of the document that has every sample of it"""


def _number(key: str) -> Callable[[Document], float | None]:
    return lambda document: document.get(key)


def _median(key: str) -> Callable[[Document], float | None]:
    return lambda document: (document.get(key) or {}).get("median")


def _accuracy(key: str) -> Callable[[Document], float | None]:
    return lambda document: (document.get("accuracy") or {}).get(key)


def _inside(key: str, name: str, times: float = 1.0) -> Callable[[Document], float | None]:
    def read(document: Document) -> float | None:
        value = (document.get(key) or {}).get(name)
        return None if value is None else value * times

    return read


def tokens_per_second(document: Document) -> float | None:
    """Tokens that a forward makes or reads: one a sequence in a decoding step, all of them otherwise."""
    median = _median("latency_ms")(document)
    if not median:
        return None
    tokens = 1 if document["phase"] == "decode" else document["sequence_length"]
    return tokens * document["batch_size"] / (median / 1e3) if tokens else None


FIELDS: dict[str, Field] = {
    "run": Field("run", run_label),
    "mechanism": Field("mechanism", mechanism_label),
    "implementation": Field("implementation", ran_as),
    "model": Field("model", lambda document: document.get("model")),
    "sequence_length": Field("tokens", lambda document: document.get("sequence_length")),
    "batch_size": Field("batch", lambda document: document.get("batch_size")),
    "dtype": Field("dtype", lambda document: document.get("dtype")),
    "phase": Field("phase", lambda document: document.get("phase")),
}
TEXTS = ("outcome", "reason", "conditions")
"""how a run ended, why, and what disturbed or slowed down its times"""
NUMERIC_FIELDS = ("sequence_length", "batch_size")

MEASURES: dict[str, Measure] = {
    "latency_ms": Measure("time of the forward pass", "ms", _median("latency_ms"), "latency_ms"),
    "attention_latency_ms": Measure(
        "time of the attention alone", "ms", _median("attention_latency_ms"), "attention_latency_ms"
    ),
    "tokens_per_s": Measure("throughput", "tokens/s", tokens_per_second),
    "attention_flops_per_s": Measure(
        "speed of the attention alone", "FLOP/s", _inside("roofline", "flops_per_s")
    ),
    "ceiling_percent": Measure("share of the device's ceiling", "%", _inside("roofline", "share", 100)),
    "intensity": Measure("operations for each byte", "FLOP/byte", _inside("roofline", "intensity")),
    "peak_memory_bytes": Measure("peak memory of the forward pass", "bytes", _number("peak_memory_bytes")),
    "attention_peak_memory_bytes": Measure(
        "peak memory of the attention alone", "bytes", _number("attention_peak_memory_bytes")
    ),
    "process_growth_bytes": Measure(
        "growth of the process", "bytes", _inside("peak_memory", "resident_peak_bytes")
    ),
    "cache_bytes": Measure("KV cache", "bytes", _number("cache_bytes")),
    "longest_fit": Measure("longest that fits", "tokens", _inside("frontier", "fits")),
    "attention_error": Measure("error of the attention, against float64", "", _accuracy("attention_error")),
    "lse_error": Measure("error of the log-sum-exp", "", _accuracy("lse_error")),
    "check_error": Measure("check against the reference", "", _accuracy("check_error")),
    "logit_error": Measure("largest error of the logits", "", _accuracy("logit_error")),
    "kl": Measure("KL of the logits", "nats", _accuracy("kl")),
    "perplexity": Measure("perplexity", "", _accuracy("perplexity")),
    "map_change": Measure("change of the maps", "", _accuracy("map_change")),
}


def chart_rows(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """One flat row a run: ``id``, `FIELDS`, `TEXTS` and `MEASURES`, None where not measured."""
    return [
        {"id": document["id"]}
        | {name: field.read(document) for name, field in FIELDS.items()}
        | {
            "outcome": shown_outcome(document),
            "reason": document.get("speed_withheld") or document.get("reason"),
            "conditions": conditions_words(document),
        }
        | {name: measure.read(document) for name, measure in MEASURES.items()}
        for document in documents
    ]


def samples_of(document: Document, measure: str) -> list[float]:
    """Every sample of a measure; its one number where it has none."""
    spec = MEASURES[measure]
    samples = (document.get(spec.samples) or {}).get("samples") if spec.samples else None
    value = spec.read(document)
    return [float(sample) for sample in samples] if samples else [] if value is None else [float(value)]


def measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures that at least one row has."""
    return [name for name in MEASURES if any(row[name] is not None for row in rows)]


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields, without the run itself, that differ between rows."""
    return [name for name in FIELDS if name != "run" and len({row[name] for row in rows}) > 1]
