"""Pieces that every page is made of: the bar, chips, numbers in words, small tables, notices.

Everything here returns escaped HTML text for `gr.HTML`, except `navigation`, which creates its component.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.context import Context

from attnlab.views.labels import format_bytes
from attnlab_webui.site_map import PAGES

# listener arguments: handlers that run by themselves, and handlers that a person waits for
INTERNAL: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
ACTION: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}

LIVE_STATES = ("queued", "running")
STATE_WORDS = {
    "queued": "queued",
    "running": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "out_of_memory": "out of memory",
    "unsupported": "unsupported",
    "timed_out": "timed out",
    "cancelled": "cancelled",
    "incorrect": "incorrect",
    "unproved": "unproved",
    "throttled": "throttled",
}


@dataclass(frozen=True)
class Raw:
    """HTML that is already escaped; `table` leaves it as it is."""

    html: str


def page() -> gr.Blocks:
    """The Blocks that the page being built belongs to (for `.load`)."""
    if Context.root_block is None:
        raise ValueError("page() must be called inside build(store)")
    return Context.root_block


def escape(value: object) -> str:
    """Text made safe inside HTML elements and quoted attributes."""
    return html.escape(str(value), quote=True)


def navigation(active: str) -> gr.HTML:
    """The bar on top of every page; `active` is the key of the page (see `site_map.PAGES`)."""
    here = ' aria-current="page"'
    links = "".join(
        f'<a class="at-link" href="/{page.path}"{here if page.key == active else ""}>{escape(page.title)}</a>'
        for page in PAGES
        if page.key != "experiment"
    )
    return gr.HTML(
        f'<nav class="at-nav" aria-label="Pages"><a class="at-brand" href="/">'
        f'<span class="at-mark" aria-hidden="true"></span>attnlab</a>{links}'
        '<span class="at-spacer"></span>'
        '<a class="at-live" data-attnlab-live href="/queue" hidden></a>'
        '<button type="button" class="at-theme" data-attnlab-theme'
        ' aria-label="Switch between light and dark">'
        "</button></nav>",
        elem_classes="at-nav-block",
        apply_default_css=False,
        js_on_load=None,
    )


def chip(state: str, detail: str = "") -> str:
    """A run's state as a coloured chip; `detail` becomes its tooltip."""
    words = STATE_WORDS.get(state, state)
    title = f' title="{escape(detail)}"' if detail else ""
    return f'<span class="at-chip at-{escape(state)}"{title}>{escape(words)}</span>'


def progress_bar(done: float | None, total: float | None, label: str = "") -> str:
    """A thin bar with its phase; without a total it only moves."""
    share = min(1.0, max(0.0, (done or 0) / total)) if total else None
    width = f"width:{share * 100:.1f}%" if share is not None else ""
    count = f" {done:g}/{total:g}" if total and done is not None else ""
    moving = "" if share is not None else " at-moving"
    now = f' aria-valuenow="{share * 100:.0f}"' if share is not None else ""
    return (
        f'<span class="at-progress{moving}" role="progressbar" aria-valuemin="0" aria-valuemax="100"{now}'
        f' aria-label="{escape(label or "progress")}"><span style="{width}"></span></span>'
        f'<span class="at-muted">{escape(label)}{escape(count)}</span>'
    )


def milliseconds(value: float | None) -> str:
    """12.3 ms, 1.20 s; an em dash when there is none."""
    if value is None:
        return "—"
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms"


def size_in_bytes(value: float | None) -> str:
    """1.5 MB, powers of 1000 as everywhere in attnlab."""
    return "—" if value is None else format_bytes(value)


def scientific(value: float | None) -> str:
    """3.1e-07 for errors and defects."""
    return "—" if value is None else f"{value:.1e}"


def ago(then: float | None, now: float | None = None) -> str:
    """'just now', '4 min ago'; times are epoch seconds."""
    if then is None:
        return "—"
    seconds = max(0.0, (now or time.time()) - then)
    if seconds < 10:
        return "just now"
    for limit, unit, word in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {word} ago"
    return f"{seconds / 86400:.0f} days ago"


def duration(seconds: float | None) -> str:
    """0.8 s, 3 min 20 s."""
    if seconds is None:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, label: str = "", css: str = "") -> str:
    """A dense table; cells are escaped unless they are `Raw`."""
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    aria = f' aria-label="{escape(label)}"' if label else ""
    return (
        f'<div class="at-scroll"><table class="at-table {escape(css)}"{aria}>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cell(value: object) -> str:
    """One table cell: `Raw` as it is, None as an em dash, everything else escaped."""
    if isinstance(value, Raw):
        return value.html
    return "—" if value is None else escape(value)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A two-column list of names and values."""
    body = "".join(f"<dt>{escape(name)}</dt><dd>{cell(value)}</dd>" for name, value in pairs)
    return f'<dl class="at-facts">{body}</dl>'


def notice(text: str, kind: str = "info") -> str:
    """One line of information, warning or error; kind is info, warning or error."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="at-notice at-notice-{escape(kind)}" role="{role}">{escape(text)}</div>'


def empty_state(title: str, text: str, actions: Sequence[tuple[str, str]] = ()) -> str:
    """What an empty page says: what is missing and, as links (label, address), what to do next."""
    links = "".join(
        f'<a class="at-button" href="{escape(href)}">{escape(label)}</a>' for label, href in actions
    )
    return (
        f'<div class="at-empty"><h2>{escape(title)}</h2><p>{escape(text)}</p>'
        f'<div class="at-actions">{links}</div></div>'
    )
