"""What a served run shows: four charts and a column of numbers. No component in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from attnlab.describe import run_brief, run_document
from attnlab.views.errors import ViewError
from attnlab.views.labels import mechanism_label
from attnlab.views.serving import (
    WAITS,
    cache_figure,
    cache_info,
    load_timeline,
    rate_figure,
    rate_info,
    request_figure,
    request_info,
    wait_figure,
    wait_info,
)
from attnlab_storage.database import Store
from attnlab_storage.results import RunRow
from attnlab_webui import pieces
from attnlab_webui.pieces import Raw

MOST_RUNS = 8
ALL_RUNS = ("serving_rate", "serving_first", "serving_between")
ONE_RUN = ("serving_cache", "serving_requests")
CHARTS = ALL_RUNS + ONE_RUN
COLUMNS = ("tokens/s", "first token", "between tokens")
RATES = {"output_tokens_per_second": "tokens written", "prompt_tokens_per_second": "prompt tokens"}
WAIT_WORDS = {
    "time_to_first_token": "time to first token",
    "inter_token_latency": "between tokens",
    "queueing_time": "in the queue",
}
SHARE_WORDS = {
    "cache_used": "cache used",
    "cache_reserved": "cache set aside",
    "internal_fragmentation": "empty inside what is set aside",
    "external_fragmentation": "free, too small for who waits",
}


def is_served(runs: Sequence[RunRow]) -> bool:
    """Whether these runs are of phase serving."""
    return bool(runs) and runs[0].phase == "serving"


def columns(run: RunRow) -> list[str]:
    """The numbers of a run in the list of runs, under ``COLUMNS``."""
    summary = run.summary or {}
    rate = summary.get("output_tokens_per_second")
    waits = [pieces.milliseconds(summary.get(name)) for name in WAITS]
    return [f"{rate:,.1f}" if rate else "—", *waits]


def run_figures(store: Store, run_id: int | None) -> tuple[go.Figure | None, go.Figure | None]:
    """The cache over time and the requests of one run; None where it has served nothing (yet)."""
    try:
        timeline = None if run_id is None else load_timeline(store, run_id)
    except ViewError:
        timeline = None
    if timeline is None:
        return None, None
    title = f"The cache of run #{run_id} over time"
    return cache_figure(cache_info(timeline, title)), request_figure(request_info(timeline))


def compare_figures(store: Store, runs: Sequence[RunRow]) -> tuple[go.Figure | None, ...]:
    """Rates and both waits of all served runs, side by side; Nones where there are none."""
    served = [run for run in runs if run.phase == "serving"][:MOST_RUNS]
    if not served:
        return None, None, None
    timelines = {}
    for run in served:
        if run.state == "succeeded":
            timelines[f"#{run.id} {mechanism_label(run_brief(run))}"] = load_timeline(store, run.id)
    documents = [run_document(store, run.id) for run in served]
    waits = [wait_figure(wait_info(timelines, what)) if timelines else None for what in WAITS]
    return rate_figure(rate_info(documents)), *waits


EXPORTS = {"timeline": "all as JSON", "steps": "steps as CSV", "requests": "requests as CSV"}


def exports(document: Mapping[str, Any]) -> str:
    """Downloads of a served run's timeline."""
    links = "".join(
        f'<a href="/api/v1/runs/{document["id"]}/serving/{what}" download>{words}</a>'
        for what, words in EXPORTS.items()
    )
    return f'<div class="at-exports"><span class="at-label">what happened</span>{links}</div>'


def facts(document: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Rates, waits, cache and preemptions of a served run as rows of a list."""
    served = document.get("serving")
    if not served:
        return []
    rows: list[tuple[str, object]] = [
        (words, Raw(f"<b>{served[name]['value']:,.1f}</b> a second")) for name, words in RATES.items()
    ]
    for name, words in WAIT_WORDS.items():
        if (wait := served.get(name)) is not None:
            text = f"<b>{pieces.milliseconds(wait['value'])}</b>"
            tail = f" <span class='at-muted'>p90 {pieces.milliseconds(wait['p90'])} · p99 "
            rows.append((words, Raw(text + tail + f"{pieces.milliseconds(wait['p99'])}</span>")))
    rows += [(words, f"{served[name]['value']:.0%}") for name, words in SHARE_WORDS.items()]
    running = served["running_sequences"]
    rows.append(("running at a time", f"{running['value']:.1f}, at most {running['largest']}"))
    preempted = served["preemptions"]
    again = f", {preempted['computed_again']:,} tokens computed again" if preempted["value"] else ""
    rows.append(("preemptions", f"{preempted['value']:.0f}{again}"))
    if served["reused_tokens"]["value"]:
        rows.append(("prompt tokens shared", f"{served['reused_tokens']['value']:,.0f}"))
    if (equal := served.get("answers_equal")) is not None:
        rows.append((f"answers as alone, of {equal['requests']}", f"{equal['value']:.0%}"))
    return rows
