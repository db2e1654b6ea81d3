"""What the queue page is looking at, and what its buttons do. No browser in here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnlab_storage import keeping, queue
from attnlab_storage.control import dispatchers, move_to_front, pause, paused, resume
from attnlab_storage.database import Store
from attnlab_storage.listing import RunRow, count_runs, counts_by_state, list_runs, run_ids
from attnlab_storage.tables import STATES
from attnlab_webui import queue_table
from attnlab_webui.queue_table import Row
from attnlab_webui.system_facts import is_alive

PAGE_RUNS = 50
LIKE_RUNS = 5


@dataclass(frozen=True)
class Undo:
    """How to take the last action back: `restore` deleted runs or `retry` cancelled ones."""

    how: str
    words: str
    run_ids: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """Filters, place in the pages, selection, and what can be undone."""

    states: tuple[str, ...] = ()
    mechanism: str = ""
    model: str = ""
    search: str = ""
    cursors: tuple[str, ...] = ()
    """the cursor of every page before this one; the last leads here"""
    selected: frozenset[int] = frozenset()
    last_picked: int = 0
    undo: Undo | None = None
    said: str = ""
    """what the last action did"""

    def filters(self) -> dict[str, Any]:
        return {"state": list(self.states), "mechanism": self.mechanism or None, "model": self.model or None}


@dataclass(frozen=True)
class Shown:
    """What `look` found: the page's HTML, the ids on it, and whether it changes by itself."""

    html: str
    ids: tuple[int, ...]
    moving: bool


def view_of(query: Mapping[str, str]) -> View:
    """The view that an address asks for; values that no run can have are left out."""
    states = tuple(state for state in STATES if state in query.get("state", "").split(","))
    return View(
        states=states,
        mechanism=query.get("mechanism", "")[:60],
        model=query.get("model", "")[:500],
        search=query.get("q", "")[:200],
    )


def looking_at(view: View, query: Mapping[str, str]) -> View:
    """The view with the filters of an address, on its first page; the view itself when they are the same."""
    asked = view_of(query)
    filters = {name: getattr(asked, name) for name in ("states", "mechanism", "model", "search")}
    if all(getattr(view, name) == value for name, value in filters.items()):
        return view
    return replace(view, **filters, cursors=(), said="")


def look(store: Store, view: View, now: float | None = None) -> Shown:
    """Draws the view as it stands."""
    now = time.time() if now is None else now
    filters, after = view.filters(), view.cursors[-1] if view.cursors else None
    page = list_runs(store, filters=filters, search=view.search, limit=PAGE_RUNS, after=after)
    matching = count_runs(store, filters=filters, search=view.search)
    counts = counts_by_state(store)
    heard = dispatchers(store)
    alive = sum(map(is_alive, heard))
    waiting = waiting_words(heard)
    rows = [
        Row(run, run.id in view.selected, remaining(store, run, now), waiting.get(run.id, ""))
        for run in page.rows
    ]
    silent = min((row.silent_seconds for row in heard), default=None)
    html = queue_table.page(
        counts=counts,
        states=view.states,
        notice=queue_table.dispatcher_line(alive, paused(store), silent, counts["queued"]),
        toolbar=queue_table.toolbar(view.selected, matching, view.said, view.undo.words if view.undo else ""),
        rows=rows,
        pager=queue_table.pager(
            len(view.cursors) * PAGE_RUNS, len(rows), matching, bool(view.cursors), bool(page.next)
        ),
        now=now,
        narrowed=bool(view.states or view.mechanism or view.model or view.search),
    )
    moving = any(not run.ended for run in page.rows)
    return Shown(html, tuple(run.id for run in page.rows), moving)


def act(store: Store, view: View, action: str, run: int, shift: bool) -> View:
    """The view after a click; unknown actions change nothing."""
    view = replace(view, said="")
    changed = _look_elsewhere(store, view, action) or _select(store, view, action, run, shift)
    return changed or _do(store, view, action)


def toggle_pause(store: Store) -> bool:
    """Pauses or resumes the queue; returns whether it is paused now."""
    was = paused(store)
    (resume if was else pause)(store)
    return not was


def remaining(store: Store, run: RunRow, now: float) -> float | None:
    """Seconds left for a running run, from how long the newest runs like it took; None when there are none."""
    if run.state != "running" or run.started_at is None:
        return None
    like = {
        "state": "succeeded",
        "mechanism": run.mechanism,
        "model": run.model,
        "dtype": run.dtype,
        "sequence_length": run.sequence_length,
    }
    took = sorted(
        done.finished_at - done.started_at
        for done in list_runs(store, filters=like, sort="-finished_at", limit=LIKE_RUNS).rows
        if done.finished_at is not None and done.started_at is not None
    )
    return max(0.0, took[len(took) // 2] - (now - run.started_at)) if took else None


def waiting_words(heard: Sequence[Any]) -> dict[int, str]:
    """Run -> why no machine of a living dispatcher can take it."""
    found: dict[int, str] = {}
    for row in heard:
        if is_alive(row):
            found |= {int(run): str(why) for run, why in (row.cluster.get("waiting_for") or {}).items()}
    return found


def _look_elsewhere(store: Store, view: View, action: str) -> View | None:
    if action == "before":
        return replace(view, cursors=view.cursors[:-1])
    if action == "after":
        after = view.cursors[-1] if view.cursors else None
        page = list_runs(store, filters=view.filters(), search=view.search, limit=PAGE_RUNS, after=after)
        return replace(view, cursors=(*view.cursors, page.next)) if page.next else view
    return None


def _select(store: Store, view: View, action: str, run: int, shift: bool) -> View | None:
    if action == "none":
        return replace(view, selected=frozenset(), last_picked=0)
    if action == "all":
        return replace(view, selected=frozenset(run_ids(store, filters=view.filters(), search=view.search)))
    if action not in ("pick", "page"):
        return None
    shown = look(store, view).ids
    if action == "page":
        every = frozenset(shown)
        selected = view.selected - every if every <= view.selected else view.selected | every
        return replace(view, selected=selected, last_picked=0)
    if shift and run in shown and view.last_picked in shown:
        first, last = sorted((shown.index(run), shown.index(view.last_picked)))
        return replace(view, selected=view.selected | set(shown[first : last + 1]), last_picked=run)
    return replace(view, selected=view.selected ^ {run}, last_picked=run)


def _do(store: Store, view: View, action: str) -> View:
    ids = sorted(view.selected)
    if action == "cancel" and ids:
        waiting = tuple(sorted(view.selected.intersection(run_ids(store, filters={"state": "queued"}))))
        count = queue.cancel(store, ids)
        undo = Undo("retry", f"put {len(waiting):,} back in the queue", waiting) if waiting else None
        return replace(view, said=_counted(count, len(ids), "cancelled"), undo=undo)
    if action == "retry" and ids:
        return replace(view, said=_counted(len(queue.retry(store, ids)), len(ids), "queued again"), undo=None)
    if action == "delete" and ids:
        gone = tuple(keeping.delete_runs(store, ids))
        undo = Undo("restore", f"bring {len(gone):,} back", gone) if gone else None
        said = _counted(len(gone), len(ids), "deleted", "running ones and those of pinned experiments stay")
        return replace(view, said=said, undo=undo, selected=view.selected - set(gone))
    if action == "first" and ids:
        moved = sum(move_to_front(store, run) for run in reversed(ids))
        return replace(view, said=_counted(moved, len(ids), "moved to the front", "only queued runs can be"))
    if action == "undo" and view.undo is not None:
        return _take_back(store, view, view.undo)
    return view


def _take_back(store: Store, view: View, undo: Undo) -> View:
    take_back = keeping.restore_runs if undo.how == "restore" else queue.retry
    back = take_back(store, undo.run_ids)
    return replace(view, undo=None, said=_counted(len(back), len(undo.run_ids), "are back"))


def _counted(done: int, asked: int, words: str, why: str = "") -> str:
    if done == asked:
        return f"{done:,} {words}."
    return f"{done:,} of {asked:,} {words}{f'; {why}' if why else ''}."
