"""Two or more runs side by side: what differs, by how much, and whether the comparison is fair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnlab.describe import run_document
from attnlab.views.difference import MapDistance, difference, map_distance
from attnlab.views.labels import OUTCOME_WORDS, conditions_words, run_label, run_labels
from attnlab_storage import results
from attnlab_storage.database import Store

__all__ = [
    "CompareError",
    "CompareRow",
    "Comparison",
    "MapDistance",
    "compare_runs",
    "difference",
    "map_distance",
]

MAX_RUNS = 16
_SPEC = (
    "model",
    "mechanism",
    "implementation",
    "chosen",
    "kernels",
    "sequence_length",
    "dtype",
    "batch_size",
    "phase",
    "kind",
)
_MEASURED: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "latency_ms": lambda document: (document["latency_ms"] or {}).get("median"),
    "attention_latency_ms": lambda document: (document["attention_latency_ms"] or {}).get("median"),
    "peak_memory_bytes": lambda document: document["peak_memory_bytes"],
    "attention_peak_memory_bytes": lambda document: document["attention_peak_memory_bytes"],
    "capture_overhead": lambda document: document["capture_overhead"],
    "stored_bytes": lambda document: document["stored_bytes"] or None,
    "row_sum_defect": lambda document: document["map_check"]["row_sum_defect"],
    "output_defect": lambda document: document["map_check"]["output_defect"],
    "output_tokens_per_second": lambda document: _served(document, "output_tokens_per_second"),
    "time_to_first_token_ms": lambda document: _served(document, "time_to_first_token"),
    "inter_token_latency_ms": lambda document: _served(document, "inter_token_latency"),
    "cache_used": lambda document: _served(document, "cache_used"),
    "preemptions": lambda document: _served(document, "preemptions"),
}
_RATIOS = (
    "latency_ms",
    "attention_latency_ms",
    "peak_memory_bytes",
    "attention_peak_memory_bytes",
    "stored_bytes",
)
# what may differ between two environments without making their numbers incomparable
_HARMLESS = ("created", "time", "started", "pid", "hostname")
# what was run, which is compared, and not on what
_SUBJECT = "model."


class CompareError(ValueError):
    """Runs that cannot be put side by side; the text names the rule and the value."""


@dataclass(frozen=True)
class CompareRow:
    """One property of every run. ``ratios`` are to the first run (None where there is no number)."""

    group: str
    name: str
    values: list[Any]
    ratios: list[float | None]

    @property
    def varies(self) -> bool:
        return any(value != self.values[0] for value in self.values)


@dataclass(frozen=True)
class Comparison:
    """What differs between runs, what does not, and the notes that whoever reads the numbers has to know."""

    run_ids: list[int]
    labels: list[str]
    documents: list[dict[str, Any]]
    varying: list[CompareRow]
    equal: list[CompareRow]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """One JSON document: ids, labels, rows that vary, rows that do not, notes, the run documents."""
        return asdict(self) | {"runs": self.documents, "documents": None}


def compare_runs(store: Store, run_ids: Sequence[int]) -> Comparison:
    """The table of what differs between two or more runs, as given; the first is the base of ratios.

    Raises CompareError for fewer than two or too many runs, or one named twice; NotFound for an unknown run.
    """
    ids = list(run_ids)
    if not 2 <= len(ids) <= MAX_RUNS:
        raise CompareError(f"runs must be 2 to {MAX_RUNS} run ids; got {len(ids)}: {ids}")
    if len(set(ids)) < len(ids):
        raise CompareError(f"runs must not name a run twice; got {ids}")
    documents = [run_document(store, run_id) for run_id in ids]
    rows = comparison_rows(documents)
    inputs = [results.run_input(store, run_id) for run_id in ids]
    tokens = [None if row is None else (tuple(row.query_tokens), tuple(row.key_tokens)) for row in inputs]
    return Comparison(
        ids,
        run_labels(documents),
        documents,
        [row for row in rows if row.varies],
        [row for row in rows if not row.varies],
        validity_notes(documents, tokens),
    )


def comparison_rows(documents: Sequence[Mapping[str, Any]]) -> list[CompareRow]:
    """One row for every property that any of the runs has: spec, outcome, measurements, environment."""
    rows = [_row("spec", name, [document[name] for document in documents]) for name in _SPEC]
    parameters = [document["parameters"] for document in documents]
    rows += [_row("spec", name, values) for name, values in _columns(parameters)]
    rows.append(_row("outcome", "state", [document["state"] for document in documents]))
    for name in ("reason", "error_kind"):
        rows.append(_row("outcome", name, [document[name] for document in documents]))
    rows.append(_row("outcome", "swap", [document["swap"]["kind"] for document in documents]))
    for name, read in _MEASURED.items():
        rows.append(_row("measurement", name, [read(document) for document in documents], name in _RATIOS))
    accuracy = [document["accuracy"] for document in documents]
    rows += [_row("measurement", name, values) for name, values in _columns(accuracy)]
    machines = [flatten(document["environment"] or {}) for document in documents]
    rows += [_row("environment", name, values) for name, values in _columns(machines)]
    return [row for row in rows if any(value not in (None, [], {}) for value in row.values)]


def validity_notes(
    documents: Sequence[Mapping[str, Any]], tokens: Sequence[tuple[Any, ...] | None]
) -> list[str]:
    """Why some of these numbers may not be compared, each in one sentence; empty when they all may."""
    notes = []
    if _differ(documents, "model"):
        notes.append("The models differ: maps, losses and times are of different weights.")
    known = [(document, one) for document, one in zip(documents, tokens, strict=True) if one is not None]
    lengths = {document["sequence_length"] for document, _ in known}
    if len({one for _, one in known}) > 1:
        what = "lengths" if len(lengths) > 1 and _nested([one for _, one in known]) else "tokens"
        both = "that both have"
        if _differ(documents, "model"):
            both = "that say the same, however a tokenizer marks where a word begins"
        notes.append(f"The inputs differ in their {what}: their maps are compared at the tokens {both}.")
    if len(lengths) > 1:
        notes.append("The sequence lengths differ: compare how numbers grow, not their size.")
    if _differ(documents, "dtype"):
        notes.append("The dtypes differ: part of every difference is rounding.")
    if _differ(documents, "batch_size") or _differ(documents, "phase"):
        notes.append("Batch size or phase differ: times and memory are of different work.")
    notes += _environment_notes(documents)
    notes += _conditions_notes(documents)
    changed = [document for document in documents if document["swap"]["kind"] == "approximate"]
    if changed:
        names = ", ".join(run_label(document) for document in changed)
        notes.append(f"Approximate swap, so not the function the weights were trained for: {names}.")
    for document in documents:
        if withheld := document.get("speed_withheld"):
            notes.append(f"{run_label(document)}: {withheld}.")
        if document["state"] != "succeeded":
            word = OUTCOME_WORDS.get(document["state"], document["state"])
            reason = f" ({document['reason']})" if document["reason"] else ""
            notes.append(f"{run_label(document)} has no full result: {word}{reason}.")
    return notes


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names; a list of named records is keyed by their names."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
            value = {str(v["name"]): {k: w for k, w in v.items() if k != "name"} for v in value}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _environment_notes(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    told = [document["environment"] for document in documents if document["environment"]]
    # what only a timed run notes is no difference from one that was not timed
    common = set.intersection(*(set(environment) for environment in told)) if told else set()
    machines = [flatten({name: environment[name] for name in common}) for environment in told]
    names = [
        name
        for name, values in _columns(machines)
        if any(value != values[0] for value in values)
        and not name.startswith(_SUBJECT)
        and not any(word in name for word in _HARMLESS)
    ]
    if not names:
        return []
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return [f"The environments differ ({shown}): times and memory are of different machines or software."]


def _conditions_notes(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for all runs that were disturbed, one for all that were throttled."""
    found: dict[str, dict[str, str]] = {}
    for document in documents:
        kind, _, reasons = conditions_words(document).partition(": ")
        if kind:
            found.setdefault(kind, {})[f"#{document['id']}"] = reasons
    notes = []
    for kind, runs in found.items():
        *first, last = runs
        if not first:
            notes.append(f"{last} was {kind} while timed: {runs[last]}.")
        else:
            each = " ".join(f"{run}: {reasons}." for run, reasons in runs.items())
            notes.append(f"{', '.join(first)} and {last} were {kind} while timed: {each}")
    return notes


def _served(document: Mapping[str, Any], name: str) -> float | None:
    return ((document.get("serving") or {}).get(name) or {}).get("value")


def _row(group: str, name: str, values: list[Any], ratio: bool = False) -> CompareRow:
    base = values[0]
    ratios: list[float | None] = [None] * len(values)
    if ratio and base:
        ratios = [None if value is None else value / base for value in values]
    return CompareRow(group, name, values, ratios)


def _columns(documents: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    names = dict.fromkeys(name for document in documents for name in document)
    return [(name, [document.get(name) for document in documents]) for name in names]


def _differ(documents: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(document[name] != documents[0][name] for document in documents)


def _nested(tokens: Sequence[tuple[Any, ...]]) -> bool:
    """Whether every input is the beginning of the longest one."""
    longest = max((one[0] for one in tokens), key=len)
    return all(one[0] == longest[: len(one[0])] for one in tokens)
