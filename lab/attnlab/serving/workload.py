"""Requests: when each comes, how long it is. Drawn by a seed, or read from a trace. No torch.

A trace is CSV with a header, or JSON lines. Columns are ``arrival_s``, ``prompt_tokens``, ``output_tokens``, or those
of the public Azure traces, ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens`` (Patel et al., "Splitwise",
https://arxiv.org/abs/2311.18677). Arrivals count from the first.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from .settings import MAX_REQUESTS, MAX_TOKENS, Lengths, Workload

COLUMNS = (
    ("arrival_s", "TIMESTAMP"),
    ("prompt_tokens", "ContextTokens"),
    ("output_tokens", "GeneratedTokens"),
)
Row = tuple[float, int, int]


class TraceError(ValueError):
    """A trace that cannot be read; the text names the line, the rule and the value."""


class Request(NamedTuple):
    """One request: it comes ``arrival`` seconds after the first, and is answered with so many tokens."""

    id: int
    arrival: float
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that the cache has to hold: all but the last of the answer, which nobody attends from."""
        return self.prompt_tokens + self.output_tokens - 1


def draw_requests(workload: Workload, seed: int) -> list[Request]:
    """The requests of a workload, in the order they come; the same for the same seed."""
    if workload.trace is not None:
        return _from_trace(workload)
    assert workload.requests
    assert workload.prompt_tokens
    assert workload.output_tokens
    rng = np.random.default_rng(seed)
    count = workload.requests
    arrivals = np.zeros(count)
    if workload.arrivals.rate is not None:
        # the first comes at time 0
        arrivals[1:] = np.cumsum(rng.exponential(1 / workload.arrivals.rate, count - 1))
    prompts = _draw(workload.prompt_tokens, count, rng) + workload.shared_prefix
    outputs = _draw(workload.output_tokens, count, rng)
    return [Request(i, float(arrivals[i]), int(prompts[i]), int(outputs[i])) for i in range(count)]


def read_trace(text: str) -> tuple[Row, ...]:
    """Rows of a trace by arrival: seconds after the first, prompt tokens, output tokens. Raises TraceError."""
    rows = []
    for line, record in _records(text):
        arrival, prompt, output = (_value(record, names, line) for names in COLUMNS)
        rows.append(
            (_seconds(arrival, line), _tokens(prompt, COLUMNS[1], line), _tokens(output, COLUMNS[2], line))
        )
        if len(rows) > MAX_REQUESTS:
            raise TraceError(f"trace: may hold at most {MAX_REQUESTS} requests; cut the file")
    if not rows:
        raise TraceError("trace: must hold at least one request")
    first = min(row[0] for row in rows)
    return tuple(sorted((arrival - first, prompt, output) for arrival, prompt, output in rows))


def _from_trace(workload: Workload) -> list[Request]:
    def scaled(tokens: int) -> int:
        return min(math.ceil(tokens * workload.length_scale), MAX_TOKENS)

    rows = (workload.trace or ())[: workload.requests]
    return [
        Request(i, arrival * workload.time_scale, scaled(prompt) + workload.shared_prefix, scaled(output))
        for i, (arrival, prompt, output) in enumerate(rows)
    ]


def _draw(lengths: Lengths, count: int, rng: np.random.Generator) -> np.ndarray:
    low, high = lengths.low or 1, lengths.high or MAX_TOKENS
    match lengths.distribution:
        case "fixed":
            return np.full(count, lengths.tokens)
        case "uniform":
            return rng.integers(low, high + 1, count)
    assert lengths.median is not None
    assert lengths.sigma is not None
    drawn = np.exp(np.log(lengths.median) + lengths.sigma * rng.standard_normal(count))
    return np.clip(np.rint(drawn), low, high).astype(int)


def _records(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = text.lstrip("\ufeff")
    if not text.lstrip().startswith("{"):
        for number, record in enumerate(csv.DictReader(io.StringIO(text)), start=2):
            yield number, {str(key).strip(): value for key, value in record.items() if key is not None}
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TraceError(f"trace, line {number}: must be a JSON object ({error})") from None
        if not isinstance(record, Mapping):
            raise TraceError(f"trace, line {number}: must be a JSON object, got {line[:40]!r}")
        yield number, record


def _value(record: Mapping[str, Any], names: tuple[str, str], line: int) -> Any:
    for name in names:
        if record.get(name) not in (None, ""):
            return record[name]
    raise TraceError(
        f"trace, line {line}: needs a column {names[0]} (or {names[1]}); has {', '.join(record)}"
    )


def _seconds(value: Any, line: int) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            moment = datetime.fromisoformat(str(value))
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            rule = "must be seconds or a date and time"
            raise TraceError(f"trace, line {line}: {COLUMNS[0][0]} {rule}, got {value!r}") from None
    if not math.isfinite(seconds):
        raise TraceError(f"trace, line {line}: {COLUMNS[0][0]} must be finite, got {value!r}")
    return seconds


def _tokens(value: Any, names: tuple[str, str], line: int) -> int:
    try:
        tokens = int(str(value))
    except ValueError:
        tokens = 0
    if not 1 <= tokens <= MAX_TOKENS:
        raise TraceError(
            f"trace, line {line}: {names[0]} must be a whole number from 1 to {MAX_TOKENS}, got {value!r}"
        )
    return tokens
