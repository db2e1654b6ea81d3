"""How the queue page looks: its counts, its rows, its pager, as escaped HTML. Every function is pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from attnlab_storage.listing import RunRow
from attnlab_storage.tables import STATES
from attnlab_webui import pieces
from attnlab_webui.pieces import Raw, escape

MAX_COMPARED = 16
COLUMNS = ("run", "experiment", "mechanism", "implementation", "tokens", "dtype", "state", "time", "latency")


@dataclass(frozen=True)
class Row:
    """One run as the table shows it; `waiting` says why no machine can take it."""

    run: RunRow
    selected: bool
    seconds_left: float | None
    waiting: str = ""


def page(
    *,
    counts: Mapping[str, int],
    states: Collection[str],
    notice: str,
    toolbar: str,
    rows: Sequence[Row],
    pager: str,
    now: float,
    narrowed: bool,
) -> str:
    """The whole page below its filter fields."""
    body = run_table(rows, now) if rows else nothing(narrowed, pager)
    return f'<div class="at-queue">{notice}{count_strip(counts, states)}{toolbar}{body}{pager}</div>'


def nothing(narrowed: bool, pager: str) -> str:
    """What an empty table says."""
    if narrowed:
        return pieces.empty_state(
            "No run matches", "Take a filter away to see more.", [("All runs", "/queue")]
        )
    return pieces.empty_state(
        "Nothing in the queue yet",
        "Choose a model, a text and some mechanisms; every combination becomes a run and shows up here.",
        [("New experiment", "/")],
    )


def count_strip(counts: Mapping[str, int], chosen: Collection[str]) -> str:
    """The states with how many runs are in each; a click filters by it."""
    shown = [s for s in STATES if counts.get(s, 0) or s in chosen or s in pieces.LIVE_STATES]
    buttons = [_count_button("", "all", sum(counts.values()), not chosen)]
    buttons += [_count_button(s, pieces.STATE_WORDS[s], counts.get(s, 0), s in chosen) for s in shown]
    return f'<div class="at-counts" role="group" aria-label="Filter by state">{"".join(buttons)}</div>'


def _count_button(state: str, words: str, count: int, pressed: bool) -> str:
    return (
        f'<button type="button" class="at-count" data-do="state" data-value="{state}"'
        f' aria-pressed="{str(pressed).lower()}"><span class="at-dot at-{state or "all"}"></span>'
        f"{escape(words)} <b>{count:,}</b></button>"
    )


def toolbar(chosen: Collection[int], matching: int, said: str, undo: str) -> str:
    """What can be done with the selected runs, and what the last action did."""
    selected = len(chosen)
    if selected:
        parts = [
            f"<b>{selected:,} selected</b>",
            _action("cancel", "Cancel"),
            _action("retry", "Retry"),
            _action("first", "Run next"),
            _compare(chosen),
            _action("delete", "Delete"),
            _action("all", f"Select all {matching:,}") if selected < matching else "",
            _action("none", "Clear"),
        ]
    else:
        words = "1 run" if matching == 1 else f"{matching:,} runs"
        parts = [f'<span class="at-muted">{words}</span>', _action("all", "Select all") if matching else ""]
    if said:
        parts.append(f'<span class="at-said" role="status">{escape(said)}</span>')
    if undo:
        parts.append(_action("undo", f"Undo: {undo}"))
    return f'<div class="at-toolbar" role="toolbar" aria-label="Selected runs">{"".join(parts)}</div>'


def _compare(chosen: Collection[int]) -> str:
    """A link, so that it opens like any other; shown while there are few enough runs to put side by side."""
    if not 2 <= len(chosen) <= MAX_COMPARED:
        return ""
    runs = ",".join(map(str, sorted(chosen)))
    return f'<a class="at-button" href="/compare?runs={runs}">Compare</a>'


def _action(name: str, words: str, *, enabled: bool = True) -> str:
    off = "" if enabled else " disabled"
    return f'<button type="button" class="at-button" data-do="{name}"{off}>{escape(words)}</button>'


def run_table(rows: Sequence[Row], now: float) -> str:
    """The page of runs; each row carries its id, so that a click means the run and never a position."""
    body = "".join(_row(row, now) for row in rows)
    chosen = sum(row.selected for row in rows)
    mark = " checked" if chosen == len(rows) else ' data-some="1"' if chosen else ""
    every = f'<input type="checkbox" data-do="page" aria-label="Select every run on this page"{mark}>'
    header = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    return (
        '<div class="at-scroll"><table class="at-table at-queue-table" aria-label="Runs">'
        f'<thead><tr><th scope="col">{every}</th>{header}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(row: Row, now: float) -> str:
    run = row.run
    checked = " checked" if row.selected else ""
    link = f"/experiment?{urlencode({'id': run.experiment_id, 'run': run.id})}"
    cells: tuple[object, ...] = (
        Raw(f'<input type="checkbox" data-do="pick" aria-label="Select run {run.id}"{checked}>'),
        Raw(f'<a href="{escape(link)}">{run.id}</a>'),
        clipped(run.experiment_name),
        mechanism_words(run),
        implementation_words(run),
        Raw(f'<span class="at-number">{length_words(run)}</span>'),
        run.dtype,
        Raw(state_cell(row)),
        Raw(time_cell(row, now)),
        Raw(f'<span class="at-number">{escape(pieces.milliseconds(run.latency_ms))}</span>'),
    )
    tags = "".join(f"<td>{pieces.cell(value)}</td>" for value in cells)
    selected = ' aria-selected="true"' if row.selected else ""
    return f'<tr data-run="{run.id}" data-href="{escape(link)}"{selected}>{tags}</tr>'


def clipped(words: str, muted: bool = False) -> Raw:
    """One line that ends in an ellipsis where there is no room; the whole of it is the tooltip."""
    more = " at-muted" if muted else ""
    return Raw(f'<span class="at-clip{more}" title="{escape(words)}">{escape(words)}</span>')


def mechanism_words(run: RunRow) -> Raw:
    parameters = " ".join(f"{name}={value}" for name, value in run.parameters.items() if value is not None)
    more = f' <span class="at-muted">{escape(parameters)}</span>' if parameters else ""
    return Raw(f"{escape(run.mechanism)}{more}")


def implementation_words(run: RunRow) -> str:
    """What was asked for, and what `auto` chose once it has."""
    chosen = (run.summary or {}).get("implementation")
    return f"auto → {chosen}" if run.implementation == "auto" and chosen else run.implementation


def length_words(run: RunRow) -> str:
    if not run.sequence_length:
        return "text"
    batch = f" × {run.batch_size}" if run.batch_size != 1 else ""
    return f"{run.sequence_length:,}{batch}"


def state_cell(row: Row) -> str:
    """The chip; while it runs its phase and progress, when it ended badly or waits the reason in short."""
    run = row.run
    chip = pieces.chip(run.state, run.reason or "")
    if run.state == "running" and run.cancel_requested_at is not None:
        return f'{chip} <span class="at-muted">cancelling…</span>'
    if run.state == "running":
        return f"{chip} {pieces.progress_bar(run.progress_done, run.progress_total, run.phase_name or 'starting')}"
    if run.state == "queued":
        tried = f"attempt {run.attempt + 1} of {run.max_attempts}" if run.attempt else ""
        return f"{chip} {clipped(row.waiting or tried, muted=True).html}" if row.waiting or tried else chip
    if run.state != "succeeded" and run.reason:
        return f"{chip} {clipped(run.reason, muted=True).html}"
    return chip


def time_cell(row: Row, now: float) -> str:
    """How long it took, has taken, or has waited; with what is left when that is known."""
    run = row.run
    if run.state == "running" and run.started_at is not None:
        words = pieces.duration(max(0.0, now - run.started_at))
        left = row.seconds_left
        more = f' <span class="at-muted">{left_words(left)}</span>' if left is not None else ""
        return f'<span class="at-number">{words}</span>{more}'
    if run.state == "queued":
        return f'<span class="at-muted">{pieces.ago(run.created_at, now)}</span>'
    if run.started_at is not None and run.finished_at is not None:
        return f'<span class="at-number">{pieces.duration(run.finished_at - run.started_at)}</span>'
    return '<span class="at-muted">—</span>'


def left_words(seconds: float) -> str:
    return f"~{pieces.duration(seconds)} left" if seconds >= 1 else "any moment"


def pager(first: int, shown: int, matching: int, has_before: bool, has_after: bool) -> str:
    """`1–50 of 50,000` with the buttons that lead further; nothing when all is on one page."""
    if not has_before and not has_after:
        return ""
    words = f"{first + 1:,}–{first + shown:,} of {matching:,}"
    before = _action("before", "← Newer", enabled=has_before)
    after = _action("after", "Older →", enabled=has_after)
    return f'<div class="at-pager">{before}<span class="at-number">{words}</span>{after}</div>'


def dispatcher_line(alive: int, paused: bool, silent_seconds: float | None, queued: int) -> str:
    """Why queued runs do not start, and what to do about it; nothing when they do."""
    if paused:
        return pieces.notice("The queue is paused: what runs goes on, nothing else starts.", "warning")
    if alive:
        return ""
    seen = (
        "" if silent_seconds is None else f" The last one was heard of {pieces.duration(silent_seconds)} ago."
    )
    waits = (
        f"so {queued:,} queued {'run waits' if queued == 1 else 'runs wait'}"
        if queued
        else "so nothing new would start"
    )
    return pieces.notice(
        f"No dispatcher is running, {waits}. Start one with: attnlab dispatch (or attnlab up).{seen}",
        "warning",
    )
