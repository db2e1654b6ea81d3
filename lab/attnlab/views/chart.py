"""A chart of runs with chosen axes. Two pure functions: what is shown, then the Plotly figure.

Runs that gave no number stay where their line ends, as a cross with the outcome and its reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attnlab.intervals import median_interval
from attnlab.views.chart_style import WIDE
from attnlab.views.chart_table import (
    FIELDS,
    MEASURES,
    NUMERIC_FIELDS,
    chart_rows,
    measured,
    samples_of,
    varying,
)
from attnlab.views.errors import ViewError
from attnlab.views.labels import OUTCOME_WORDS
from attnlab.views.scaling_fit import Fit, fit_power

LIVE = ("queued", "running")
MOST_LINES = 40


class Axes(NamedTuple):
    """What is drawn against what. x: a field or a measure; y: a measure; colour and facet: a field or ""."""

    x: str
    y: str
    colour: str = ""
    facet: str = ""
    bars: str = "interval"
    """what the error bars are: the 95 % interval of the median, or the 10th to 90th percentile of the samples"""


BARS = {"interval": "95 % interval of the median", "percentiles": "10th to 90th percentile"}
PRESETS: dict[str, tuple[str, Axes]] = {
    "latency": ("Time", Axes("run", "latency_ms", "mechanism")),
    "attention": ("Time of the attention alone", Axes("run", "attention_latency_ms", "mechanism")),
    "throughput": ("Throughput", Axes("run", "tokens_per_s", "mechanism")),
    "memory": ("Memory", Axes("run", "peak_memory_bytes", "mechanism")),
    "scaling": ("Scaling of time", Axes("sequence_length", "attention_latency_ms", "mechanism")),
    "memory-scaling": (
        "Scaling of memory",
        Axes("sequence_length", "attention_peak_memory_bytes", "mechanism"),
    ),
    "error": ("Error against speed", Axes("attention_latency_ms", "attention_error", "mechanism")),
    "frontier": ("Longest that fits", Axes("run", "longest_fit", "mechanism")),
}
ROOFLINE = "roofline"
SAMPLES = "samples"


class Point(NamedTuple):
    """All runs that are alike at one x: their samples together."""

    x: Any
    y: float  # median
    interval: tuple[float, float] | None  # of the median, 95 %; None with fewer than three samples
    percentiles: tuple[float, float]  # 10th and 90th of all samples
    runs: tuple[int, ...]
    samples: int
    conditions: tuple[
        str, ...
    ] = ()  # "#3 throttled: power cap", of the runs that were slowed down or disturbed
    throttled: bool = False

    def ends(self, bars: str) -> tuple[float, float]:
        """Where the error bar ends."""
        return self.percentiles if bars == "percentiles" else self.interval or (self.y, self.y)


class End(NamedTuple):
    """A run without a number."""

    x: Any  # None where x is a measure, and so unknown too
    run: int
    outcome: str
    reason: str
    y: float | None = None  # where it ended, if that is known


class Line(NamedTuple):
    """One colour in one facet."""

    label: str
    facet: str
    points: list[Point]
    ends: list[End]
    fit: Fit | None  # None unless both axes are numbers


class ChartInfo(NamedTuple):
    title: str
    axes: Axes
    x_words: str
    y_words: str
    log_x: bool
    log_y: bool
    lines: list[Line]
    facets: list[str]
    labels: list[str]  # the positions of x in order, where it is no number


def check_axes(axes: Axes) -> None:
    """Raises ViewError where an axis is none of the choices."""
    choices = {
        "x": (*FIELDS, *MEASURES),
        "y": tuple(MEASURES),
        "colour": ("", *FIELDS),
        "facet": ("", *FIELDS),
        "bars": tuple(BARS),
    }
    for name, allowed in choices.items():
        if (value := getattr(axes, name)) not in allowed:
            words = ", ".join(choice or "(none)" for choice in allowed)
            raise ViewError(f"{name} must be one of {words}; got {value!r}")


def best_axes(documents: Sequence[Mapping[str, Any]]) -> str:
    """The preset that says most of these runs at first sight."""
    rows = chart_rows(documents)
    numbers = measured(rows)
    if "longest_fit" in numbers:
        return "frontier"
    if "sequence_length" in varying(rows):
        if "attention_latency_ms" in numbers:
            return "scaling"
        if "attention_peak_memory_bytes" in numbers:
            return "memory-scaling"
    return "memory" if "latency_ms" not in numbers and "peak_memory_bytes" in numbers else "latency"


def chart_info(documents: Sequence[Mapping[str, Any]], axes: Axes) -> ChartInfo:
    """Group runs that are alike in everything but their number, and lines that are alike in everything but x."""
    check_axes(axes)
    rows = chart_rows(documents)
    if axes.x == "run":
        rows = _told_apart(rows, axes.facet)
    alike = _as_the_others_chose(rows, documents)
    apart = [name for name in varying(alike) if name not in (axes.x, axes.facet)]
    if axes.x in MEASURES:  # a scatter: lengths and batches are its points, not its colours
        apart = [name for name in apart if name not in NUMERIC_FIELDS]
    named = [name for name in dict.fromkeys((axes.colour, *apart)) if name]
    if axes.x == "run":
        named = [axes.colour] if axes.colour else []
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(alike):
        label = " · ".join(_told(name, row[name]) for name in named) or "all runs"
        groups.setdefault((label, _text(row, axes.facet)), []).append(index)
    numeric = axes.x in NUMERIC_FIELDS or axes.x in MEASURES
    lines = [
        _line(label, facet, [(rows[i], documents[i]) for i in members], axes, numeric)
        for (label, facet), members in list(groups.items())[:MOST_LINES]
    ]
    labels = [] if numeric else list(dict.fromkeys(str(row[axes.x]) for row in rows))
    y = MEASURES[axes.y]
    x_words = FIELDS[axes.x].words if axes.x in FIELDS else _words(axes.x)
    values = [point.y for line in lines for point in line.points]
    return ChartInfo(
        title=f"{y.words[:1].upper()}{y.words[1:]}" + (f" by {x_words}" if axes.x != "run" else ""),
        axes=axes,
        x_words=x_words,
        y_words=_words(axes.y),
        log_x=numeric and all(point.x > 0 for line in lines for point in line.points),
        log_y=bool(values) and min(values) > 0 and (numeric or max(values) > WIDE * min(values)),
        lines=lines,
        facets=list(dict.fromkeys(line.facet for line in lines)),
        labels=labels,
    )


def _told(name: str, value: Any) -> str:
    """A value of a field where no heading says of what: a bare number would be anything's."""
    return {"sequence_length": "{} tokens", "batch_size": "batch {}"}.get(name, "{}").format(value)


def _told_apart(rows: Sequence[dict[str, Any]], facet: str) -> list[dict[str, Any]]:
    """The rows with runs named by batch, length and so on too where these differ; mechanism and kernel are said."""
    differing = [name for name in varying(rows) if name not in ("mechanism", "implementation", facet)]
    return [
        row | {"run": " · ".join([row["run"], *(_told(name, row[name]) for name in differing if row[name])])}
        for row in rows
    ]


def _as_the_others_chose(
    rows: Sequence[dict[str, Any]], documents: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows with what never came to choose an implementation under the one that all runs asked alike chose.

    So a line ends where its own run gave no number, and not as a line of its own.
    """
    asked = [
        (row["mechanism"], document["implementation"]) for row, document in zip(rows, documents, strict=True)
    ]
    chosen: dict[tuple[str, str], set[str]] = {}
    for key, document in zip(asked, documents, strict=True):
        if (name := document.get("chosen")) is not None:
            chosen.setdefault(key, set()).add(str(name))
    return [
        row | {"implementation": next(iter(chosen[key]))}
        if document.get("chosen") is None and len(chosen.get(key, ())) == 1
        else row
        for row, key, document in zip(rows, asked, documents, strict=True)
    ]


def _line(
    label: str, facet: str, members: list[tuple[dict[str, Any], Mapping[str, Any]]], axes: Axes, numeric: bool
) -> Line:
    found: dict[Any, list[tuple[int, list[float]]]] = {}
    marked: dict[int, tuple[str, bool]] = {}
    ends: list[End] = []
    for row, document in members:
        x = row[axes.x] if numeric else str(row[axes.x])
        samples = samples_of(document, axes.y)
        if x is not None and samples:
            found.setdefault(x, []).append((row["id"], samples))
            if row["conditions"]:
                marked[row["id"]] = (row["conditions"], row["outcome"] == "throttled")
            fails = (document.get("frontier") or {}).get("fails") if axes.y == "longest_fit" else None
            if fails:
                ends.append(End(x, row["id"], fails["outcome"], fails["reason"], fails["tokens"]))
        elif row["outcome"] not in LIVE:
            ends.append(End(x, row["id"], row["outcome"], str(row["reason"] or "")))
    timed = bool(MEASURES[axes.y].samples)  # memory and errors do not change with the clock
    points = [_point(x, runs, marked if timed else {}) for x, runs in found.items()]
    fit = None
    if numeric:
        points.sort(key=lambda point: point.x)
        if axes.x in NUMERIC_FIELDS and all(point.x > 0 and point.y > 0 for point in points):
            fit = fit_power([point.x for point in points], [point.y for point in points])
    return Line(label, facet, points, ends, fit)


def _point(x: Any, runs: list[tuple[int, list[float]]], marked: Mapping[int, tuple[str, bool]]) -> Point:
    samples = [sample for _, found in runs for sample in found]
    low, high = np.percentile(samples, [10, 90]).tolist()
    numbers = tuple(run for run, _ in runs)
    return Point(
        x,
        statistics.median(samples),
        median_interval(samples),
        (low, high),
        numbers,
        len(samples),
        tuple(f"#{run} {marked[run][0]}" for run in numbers if run in marked),
        any(marked[run][1] for run in numbers if run in marked),
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    return str(row[name]) if name else ""


def _words(name: str) -> str:
    measure = MEASURES[name]
    return f"{measure.words} ({measure.unit})" if measure.unit else measure.words


def outcome_words(end: End) -> str:
    """``#3 out of memory: asked for ...``."""
    word = "not recorded" if end.outcome == "succeeded" else OUTCOME_WORDS.get(end.outcome, end.outcome)
    return f"#{end.run} {word}" + (f": {end.reason}" if end.reason else "")
