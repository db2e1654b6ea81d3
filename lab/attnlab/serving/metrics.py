"""What a server is judged by, from the timelines of its passes. Torch-free.

Time to first token counts from the arrival; inter-token latency is the time between two tokens of one answer; queueing
from the arrival to the first step that computes anything of the request. Shares of the cache are means over time.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnlab_storage.results import MeasurementRow

from .timeline import Served, Step, Timeline
from .workload import Request

STEP_FIELDS = Step._fields
REQUEST_FIELDS = (
    "id",
    "arrival",
    "prompt_tokens",
    "output_tokens",
    "started",
    "preemptions",
    "reused",
    "computed",
)


def middle_pass(passes: Sequence[Timeline]) -> Timeline:
    """The pass whose duration is the median (of two the longer)."""
    return sorted(passes, key=lambda one: one.seconds)[len(passes) // 2]


def measure(passes: Sequence[Timeline]) -> list[MeasurementRow]:
    """All measurements: rates with a sample for each pass, the rest from the pass of median duration."""
    shown = middle_pass(passes)
    return [*_rates(passes), *_waits(shown), *_cache(shown), *_batch(shown)]


def series(timeline: Timeline) -> dict[str, np.ndarray]:
    """A timeline as float64 arrays ``[1, rows, fields]``: steps, requests, times of tokens, the cache's size."""
    requests = [
        (
            *(served.request.id, served.request.arrival, served.request.prompt_tokens),
            *(
                served.request.output_tokens,
                served.started,
                served.preemptions,
                served.reused,
                served.computed,
            ),
        )
        for served in timeline.requests
    ]
    tokens = [(at,) for served in timeline.requests for at in served.tokens_at]
    rows: dict[str, Any] = {
        "serving_steps": timeline.steps,
        "serving_requests": requests,
        "serving_tokens": tokens,
    }
    rows["serving_total"] = [(timeline.total_tokens,)]
    return {name: np.array(values, np.float64)[None] for name, values in rows.items()}


def read_series(total: int, steps: np.ndarray, requests: np.ndarray, tokens: np.ndarray) -> Timeline:
    """The timeline that was written: steps ``[steps, fields]``, requests ``[requests, fields]``, times ``[tokens]``."""
    timeline = Timeline(total)
    timeline.steps = [Step(*row[:2], *map(int, row[2:])) for row in steps.tolist()]
    first = 0
    for row in requests.tolist():
        request = Request(int(row[0]), row[1], int(row[2]), int(row[3]))
        last = first + request.output_tokens
        counts = (int(value) for value in row[5:])
        timeline.requests.append(Served(request, row[4], tokens[first:last].tolist(), *counts))
        first = last
    return timeline


def _rates(passes: Sequence[Timeline]) -> list[MeasurementRow]:
    outputs = sum(served.request.output_tokens for served in passes[0].requests)
    prompts = sum(served.request.prompt_tokens for served in passes[0].requests)
    counts = {
        "output_tokens_per_second": (outputs, "tokens/s"),
        "prompt_tokens_per_second": (prompts, "tokens/s"),
        "requests_per_second": (len(passes[0].requests), "requests/s"),
    }
    rows = []
    for name, (count, unit) in counts.items():
        samples = [count / one.seconds for one in passes]
        p10, p90 = np.percentile(samples, [10, 90]).tolist()
        detail = {"p10": p10, "p90": p90}
        rows.append(MeasurementRow(name, statistics.median(samples), unit, samples=samples, detail=detail))
    return rows


def waits_of(timeline: Timeline) -> dict[str, list[float]]:
    """Seconds that every request waited, and between the tokens of every answer."""
    return {
        "time_to_first_token": [served.tokens_at[0] - served.request.arrival for served in timeline.requests],
        "inter_token_latency": [gap for served in timeline.requests for gap in gaps_of(served)],
        "queueing_time": [served.started - served.request.arrival for served in timeline.requests],
        "end_to_end_latency": [served.finished - served.request.arrival for served in timeline.requests],
    }


def _waits(timeline: Timeline) -> list[MeasurementRow]:
    found = waits_of(timeline)
    return [_distribution(name, 1e3 * np.array(values), "ms") for name, values in found.items() if values]


def gaps_of(served: Served) -> list[float]:
    """Seconds between the tokens of one answer."""
    return [later - earlier for earlier, later in itertools.pairwise(served.tokens_at)]


def _distribution(name: str, values: np.ndarray, unit: str) -> MeasurementRow:
    p10, median, p90, p99 = np.percentile(values, [10, 50, 90, 99]).tolist()
    detail = {"p10": p10, "p90": p90, "p99": p99, "mean": float(values.mean()), "count": len(values)}
    return MeasurementRow(name, median, unit, detail=detail)


def _cache(timeline: Timeline) -> list[MeasurementRow]:
    """How full the cache is: the means over time, with the largest of all steps."""
    total = timeline.total_tokens
    used = np.array([step.used for step in timeline.steps])
    reserved = np.array([step.reserved for step in timeline.steps])
    stranded = np.array([step.stranded for step in timeline.steps])
    shares = {
        "cache_used": used / total,
        "cache_reserved": reserved / total,
        # room inside what is set aside, and room that is free and of no use to who waits
        "internal_fragmentation": 1 - used / reserved,
        "external_fragmentation": stranded / total,
    }
    weights = np.array([step.end - step.start for step in timeline.steps])
    detail: dict[str, Any] = {"total_tokens": total}
    return [
        MeasurementRow(
            name,
            float(np.average(values, weights=weights)),
            "share",
            detail=detail | {"largest": float(values.max()), "smallest": float(values.min())},
        )
        for name, values in shares.items()
    ]


def _batch(timeline: Timeline) -> list[MeasurementRow]:
    running = np.array([step.running for step in timeline.steps])
    weights = np.array([step.end - step.start for step in timeline.steps])
    detail = {"largest": int(running.max()), "steps": len(running)}
    mean = float(np.average(running, weights=weights))
    again = sum(served.computed + served.reused - served.request.tokens for served in timeline.requests)
    preempted = sum(step.preempted for step in timeline.steps)
    reused = sum(served.reused for served in timeline.requests)
    return [
        MeasurementRow("running_sequences", mean, "sequences", detail=detail),
        MeasurementRow("preemptions", float(preempted), "count", detail={"computed_again": again}),
        MeasurementRow("reused_tokens", float(reused), "tokens"),
    ]
