"""The memory of one run over time: two charts, and the allocations at the peak as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from attnlab.describe import TIMELINES, memory_timeline
from attnlab.views.memory_timeline import OWNER_WORDS, TimelineInfo, timeline_figure, timeline_info
from attnlab_storage.database import Store
from attnlab_webui import pieces
from attnlab_webui.pieces import escape


def memory_charts(store: Store, run_id: int | None) -> tuple[go.Figure | None, go.Figure | None, str]:
    """The forward's and the attention's memory over time, and what makes the peaks."""
    if run_id is None:
        return None, None, ""
    infos = []
    for what, words in TIMELINES.items():
        timeline = memory_timeline(store, run_id, what)
        infos.append(timeline_info(timeline, f"Memory of the {words}") if timeline else None)
    whole, kernel = infos
    if whole is None:
        text = "This run recorded no memory: add memory to record in its spec."
        return None, None, pieces.notice(text)
    figures = [None if info is None else timeline_figure(info) for info in (whole, kernel)]
    return figures[0], figures[1], holders_table(whole) + timeline_links(run_id)


def holders_table(info: TimelineInfo) -> str:
    """The largest allocations alive at the peak: whose, how large, which operator, which line asked."""
    total = max(1, info.peak[1] if info.peak else 1)
    rows = [
        (
            OWNER_WORDS.get(holder.owner, holder.owner),
            pieces.size_in_bytes(holder.bytes),
            f"{100 * holder.bytes / total:.0f} %",
            holder.allocations,
            holder.operator or "—",
            holder.place or "—",
        )
        for holder in info.holders
    ]
    columns = ("whose", "bytes", "of the peak", "allocations", "operator", "asked for in")
    return "<h3>What is alive at the peak of the forward pass</h3>" + pieces.table(
        columns, rows, label="Allocations at the peak"
    )


def timeline_links(run_id: int) -> str:
    """Downloads of both timelines."""
    links = "".join(
        f'<a href="/api/v1/runs/{run_id}/memory/{what}" download>{escape(words)}</a>'
        for what, words in TIMELINES.items()
    )
    return f'<div class="at-exports"><span class="at-label">timeline as JSON</span>{links}</div>'


def memory_facts(document: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The peak by each method beside the other, and a cache against its formula."""
    rows: list[tuple[str, object]] = []
    peak = document["peak_memory"] or {}
    for key, words in PEAK_WORDS.items():
        if isinstance(peak.get(key), int):
            rows.append((words, pieces.size_in_bytes(peak[key])))
    if document["cache_bytes"] is not None:
        rows.append(("KV cache, measured", pieces.size_in_bytes(document["cache_bytes"])))
        cache = document["cache"] or {}
        if cache.get("formula_bytes"):
            words = f"{pieces.size_in_bytes(cache['formula_bytes'])} = {cache['formula']}"
            rows.append(("KV cache, formula", words))
    return rows


def frontier_facts(frontier: Mapping[str, Any]) -> str:
    """The longest length that fits, the first that does not, and every trial."""
    fails = frontier["fails"]
    rows: list[tuple[str, object]] = [
        ("fits", f"{frontier['fits']:,} tokens" if frontier["fits"] else "no length that was tried"),
        ("does not fit", f"{fails['tokens']:,} tokens" if fails else "none up to the longest tried"),
        ("memory", pieces.size_in_bytes(frontier["memory_bytes"])),
    ]
    if fails:
        rows.append(("because", fails["reason"]))
    trials = [
        (
            f"{trial['tokens']:,}",
            trial["outcome"].replace("_", " "),
            pieces.size_in_bytes(trial["peak_bytes"]),
            pieces.duration(trial["seconds"]),
        )
        for trial in frontier["trials"]
    ]
    columns = ("tokens", "outcome", "process grew by", "took")
    return pieces.facts(rows) + pieces.table(columns, trials, label="Trials")


PEAK_WORDS = {
    "resident_peak_bytes": "growth of the process",
    "process_peak_bytes": "process at its peak",
    "allocated_peak_bytes": "allocated at its peak",
    "reserved_peak_bytes": "reserved at its peak",
    "process_bytes": "host process",
}
