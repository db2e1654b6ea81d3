"""A run or an experiment as a JSON document: what `attnlab show --json` prints, what charts are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from attnlab.snapshot import unpack_snapshot
from attnlab.views import statistics
from attnlab.views.errors import NotFound, ViewError
from attnlab.views.viewport import find_run
from attnlab_storage import results, tensors
from attnlab_storage.database import Store
from attnlab_storage.results import ExperimentRow, MeasurementRow, RunRow, TraceRow
from attnlab_storage.tables import OUTCOMES

ACCURACY = ("check_error", "logit_error", "kl", "perplexity", "map_change", "attention_error", "lse_error")
SERVING = (
    "output_tokens_per_second",
    "prompt_tokens_per_second",
    "requests_per_second",
    "time_to_first_token",
    "inter_token_latency",
    "queueing_time",
    "end_to_end_latency",
    "cache_used",
    "cache_reserved",
    "internal_fragmentation",
    "external_fragmentation",
    "running_sequences",
    "preemptions",
    "reused_tokens",
    "answers_equal",
    "cache_bytes",
)
SPEED = frozenset(
    {
        "latency",
        "attention_latency",
        "layout_latency",
        "reference_ratio",
        "inputs_ratio",
        "roofline",
        "capture_overhead",
    }
)
STATISTICS = tuple(statistics.STATISTICS)
TIMELINES = {"memory_timeline": "forward pass", "attention_memory_timeline": "attention kernel alone"}


def run_document(store: Store, run_id: int) -> dict[str, Any]:
    """Everything that is known of a run except its per-head numbers and its maps; every value is plain JSON.

    ``outcome`` is None until the run has ended. ``implementation`` is what was asked for, ``chosen`` what it
    came to, ``kernels`` the operators or GPU kernels that really ran. A measurement not taken is None.

    Raises NotFound when there is no such run.
    """
    run = find_run(store, run_id)
    rows = results.measurements(store, run_id)
    summary = run.summary or {}
    kept = [row for row in rows if not (hides_speed(run) and row.name in SPEED)]
    whole = {row.name: row for row in kept if row.layer is None and row.head is None}
    traces = results.traces(store, run_id)
    return {
        **run_brief(run),
        "outcome": run.state if run.state in OUTCOMES else None,
        "reason": run.reason,
        "error_kind": run.error_kind,
        "error_detail": run.error_detail,
        "cancel_requested": run.cancel_requested_at is not None,
        "layers": summary.get("layers") or len(traces) or None,
        "heads": summary.get("heads") or max((trace.heads for trace in traces), default=None),
        "provenance": summary.get("provenance"),
        "compilation": summary.get("compilation"),
        "progress": _progress(run),
        "attempts": {"used": run.attempt, "most": run.max_attempts},
        "times": _times(run),
        "speed_withheld": summary.get("speed_withheld"),
        "speed_discarded": len(kept) < len(rows),
        "latency_ms": _timing(whole.get("latency")),
        "attention_latency_ms": _timing(whole.get("attention_latency")),
        "layout_latency_ms": _timing(whole.get("layout_latency")),
        "reference_ratio": _timing(whole.get("reference_ratio")),
        "inputs_ratio": _timing(whole.get("inputs_ratio")),
        "peak_memory_bytes": _whole_number(whole.get("peak_memory")),
        "peak_memory": _detail(whole.get("peak_memory")),
        "attention_peak_memory_bytes": _whole_number(whole.get("attention_peak_memory")),
        "attention_peak_memory": _detail(whole.get("attention_peak_memory")),
        "cache_bytes": _whole_number(whole.get("cache_bytes")),
        "cache": _detail(whole.get("cache_bytes")),
        "roofline": _detail(whole.get("roofline")),
        "frontier": _detail(whole.get("frontier")),
        "serving": _serving(whole),
        "capture_overhead": _number(whole.get("capture_overhead")),
        "accuracy": {name: _worst(rows, name) for name in ACCURACY if any(r.name == name for r in rows)},
        "statistics": [name for name in STATISTICS if any(row.name == name for row in rows)],
        "map_check": _map_check(traces),
        "swap": _swap(summary, rows),
        "stored_bytes": tensors.stored_bytes(store, run_id),
        "environment": results.environment(store, run_id),
    }


def hides_speed(run: RunRow) -> bool:
    """Whether what a run measured of speed is not to be shown: it ended otherwise than it should."""
    return run.state in OUTCOMES and run.state != "succeeded"


def memory_timeline(store: Store, run_id: int, what: str = "memory_timeline") -> dict[str, Any] | None:
    """What a run's forward, or its attention alone, held at every moment (``probes.allocations.replay``).

    None where memory was not recorded. Raises ViewError for another ``what``, NotFound for an unknown run.
    """
    if what not in TIMELINES:
        raise ViewError(f"what must be one of {', '.join(TIMELINES)}; got {what!r}")
    found = results.measurements(store, find_run(store, run_id).id, what)
    return found[0].detail if found else None


def memory_snapshot(store: Store, run_id: int) -> bytes | None:
    """The CUDA allocator's own snapshot of a run's forward as JSON; None where there is none.

    Raises NotFound for an unknown run.
    """
    found = results.measurements(store, find_run(store, run_id).id, "memory_snapshot")
    return unpack_snapshot(found[0].detail or {}) if found else None


def experiment_document(store: Store, experiment_id: int) -> dict[str, Any]:
    """The experiment's spec and the documents of all its runs, in the order of its grid.

    Raises NotFound when there is no such experiment.
    """
    experiment = find_experiment(store, experiment_id)
    return {
        "experiment": experiment.id,
        "name": experiment.name,
        "note": experiment.note,
        "tags": list(experiment.tags),
        "created_by": experiment.created_by,
        "created_at": experiment.created_at,
        "spec": experiment.spec,
        "spec_hash": experiment.spec_hash,
        "runs": [run_document(store, run.id) for run in results.runs_of(store, experiment_id=experiment_id)],
    }


def find_experiment(store: Store, experiment_id: int) -> ExperimentRow:
    """The experiment; NotFound when there is none with this id."""
    experiment = results.get_experiment(store, experiment_id)
    if experiment is None:
        raise NotFound(f"experiment must be the id of one in this store; got {experiment_id}")
    return experiment


def run_brief(run: RunRow) -> dict[str, Any]:
    """What a title needs to say of a run, from its row alone."""
    return {
        "id": run.id,
        "experiment": run.experiment_id,
        "position": run.position,
        "kind": run.kind,
        "state": run.state,
        "mechanism": run.mechanism,
        "parameters": dict(run.parameters),
        "implementation": run.implementation,
        "chosen": (run.summary or {}).get("implementation"),
        "kernels": list((run.summary or {}).get("kernels") or []),
        "model": run.model,
        "sequence_length": run.sequence_length,
        "dtype": run.dtype,
        "batch_size": run.batch_size,
        "phase": run.phase,
    }


def _progress(run: RunRow) -> dict[str, Any]:
    return {
        "phase": run.phase_name,
        "done": run.progress_done,
        "total": run.progress_total,
        "at": run.progress_at,
    }


def _times(run: RunRow) -> dict[str, float | None]:
    took = None
    if run.started_at is not None and run.finished_at is not None:
        took = run.finished_at - run.started_at
    return {
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "seconds": took,
    }


def _timing(row: MeasurementRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    samples = [float(sample) for sample in row.samples or [row.value] if math.isfinite(sample)]
    if not samples:
        return None
    low, middle, high = np.percentile(samples, [10, 50, 90]).tolist()
    return {"median": middle, "p10": low, "p90": high, "samples": samples, "detail": row.detail or {}}


def _serving(whole: Mapping[str, MeasurementRow]) -> dict[str, Any] | None:
    """What was measured of a server, each with its value, unit, samples and detail; None where nothing was served."""
    if SERVING[0] not in whole:
        return None
    found: dict[str, Any] = {}
    for name in SERVING:
        if (row := whole.get(name)) is not None:
            found[name] = {"value": row.value, "unit": row.unit, **(row.detail or {})}
            if row.samples:
                found[name]["samples"] = row.samples
    return found


def _number(row: MeasurementRow | None) -> float | None:
    value = None if row is None else row.value
    return None if value is None or not math.isfinite(value) else value


def _whole_number(row: MeasurementRow | None) -> int | None:
    value = _number(row)
    return None if value is None else int(value)


def _detail(row: MeasurementRow | None) -> dict[str, Any] | None:
    return None if row is None else row.detail or {}


def _worst(rows: Iterable[MeasurementRow], name: str) -> float | None:
    """The value of the whole run, or else the largest of its layers."""
    found = [row for row in rows if row.name == name]
    whole = [row for row in found if row.layer is None and row.head is None]
    numbers = [number for row in whole or found if (number := _number(row)) is not None]
    return max(numbers, default=None)


def _map_check(traces: Iterable[TraceRow]) -> dict[str, float | None]:
    """The largest defects over all recorded layers.

    Rows of the map that do not sum to 1, P V that is not the kernel's output, and the kernel's own log-sum-exp off
    the exact one of its Q and K.
    """
    traces = list(traces)
    found = {
        "row_sum_defect": [trace.row_sum_defect for trace in traces],
        "output_defect": [trace.output_defect for trace in traces],
        "lse_defect": [(trace.detail or {}).get("lse_defect") for trace in traces],
    }
    check: dict[str, float | None] = {}
    for name, numbers in found.items():
        known = [number for number in numbers if number is not None and not math.isnan(number)]
        check[name] = max(known, default=None)
    return check


def _swap(summary: dict[str, Any], rows: Iterable[MeasurementRow]) -> dict[str, Any]:
    """Whether the mechanism computes what the model was trained with, and what it loses where it does not."""
    rows = list(rows)
    loss = {name: _worst(rows, name) for name in ("kl", "perplexity", "map_change", "logit_error")}
    return {"kind": summary.get("swap"), "loss": {k: v for k, v in loss.items() if v is not None}}
