"""The System page's panels as escaped HTML, from the document of `system_facts`. Every function is pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnlab_webui import pieces
from attnlab_webui.pieces import Raw, escape

Document = Mapping[str, Any]


def overview(document: Document) -> str:
    """Program, database and queue, side by side."""
    return (
        '<div class="at-sys-columns">'
        f"{panel('Database', database(document['database']))}"
        f"{panel('Dispatchers', dispatchers(document))}"
        f"{panel('This program', program(document['program']))}</div>"
    )


def panel(title: str, body: str, hint: str = "") -> str:
    small = f' <span class="at-muted">{escape(hint)}</span>' if hint else ""
    return f'<section class="at-sys-panel"><h3 class="at-section-title">{escape(title)}{small}</h3>{body}</section>'


def database(facts: Document) -> str:
    return pieces.facts(
        (
            ("kind", f"{facts['kind']} {facts['version']}"),
            ("address", Raw(f'<span class="at-mono at-select">{escape(facts["url"])}</span>')),
            ("size", pieces.size_in_bytes(facts["bytes"])),
            ("tables", f"version {facts['revision']}"),
        )
    )


def program(facts: Document) -> str:
    versions = [(name, version) for name, version in facts["versions"].items() if version]
    return pieces.facts((("python", facts["python"]), *versions, ("data folder", facts["home"])))


def dispatchers(document: Document) -> str:
    """Each dispatcher with its heartbeat; without a living one, how to start it."""
    rows = document["dispatchers"]
    body = "".join(map(_dispatcher, rows))
    if document["queue"]["paused"]:
        body = pieces.notice("The queue is paused.", "warning") + body
    if not any(row["alive"] for row in rows):
        body = (
            pieces.notice(
                "No dispatcher is running. Start one with: attnlab dispatch (or attnlab up)", "warning"
            )
            + body
        )
    return body


def _dispatcher(row: Document) -> str:
    state = tag("alive", good=True) if row["alive"] else tag("stopped")
    seen = f"heartbeat {pieces.duration(row['silent_seconds'])} ago"
    room = f"{_of(row['free_slots'], row['slots'])} slots, {_of(row['free_gpus'], row['gpus'])} GPUs free"
    running = row["running"] or []
    pairs = [
        ("where", f"{row['host'] or row['owner']}, process {row['pid'] or '—'}"),
        ("Ray", f"{row['ray'] or '—'} at {row['address'] or 'this machine'}"),
        ("room", room if row["alive"] else None),
        ("running", ", ".join(map(str, running)) or "nothing"),
    ]
    waiting = [f"run {run}: {why}" for run, why in (row["waiting_for"] or {}).items()]
    if waiting:
        pairs.append(("waiting", "; ".join(waiting)))
    shown = pieces.facts([(name, value) for name, value in pairs if value is not None])
    return f'<div class="at-block">{state} <span class="at-muted">{escape(seen)}</span>{shown}</div>'


def _of(free: Any, total: Any) -> str:
    if total is None:
        return "unknown"
    return f"{free if free is not None else '?'} of {total}"


def machine(facts: Document) -> str:
    """One machine: device, versions, and each implementation with the reason where it is missing."""
    document = facts["environment"]
    hint = f"seen {facts['seen']}"
    if document is None and facts.get("slots") == 0:
        return panel(facts["host"], '<p class="at-muted">takes no runs</p>', hint)
    if document is None:
        problem = facts["survey_error"] or "its survey has not come in yet"
        return panel(facts["host"], pieces.notice(problem, "warning"), hint)
    body = (
        f'<div class="at-sys-columns"><div>{pieces.facts(_device(document, facts))}</div>'
        f"<div>{pieces.facts(versions(document))}</div></div>{implementations(document)}"
    )
    return panel(facts["host"], body, hint)


def _device(document: Document, facts: Document) -> list[tuple[str, object]]:
    cpu = document.get("cpu") or {}
    gpus = document.get("gpus") or []
    threads = f", {cpu['threads']} threads" if cpu.get("threads") else ""
    pairs: list[tuple[str, object]] = [
        ("device", document.get("device")),
        (
            "processor",
            f"{cpu.get('model', '—')}, {cpu.get('usable_cores', '?')} of {cpu.get('cores', '?')} cores{threads}",
        ),
        ("memory", pieces.size_in_bytes(document.get("memory_bytes"))),
    ]
    pairs += [(f"GPU {index}", _gpu(gpu)) for index, gpu in enumerate(gpus)] or [("GPUs", "none")]
    if facts["slots"] is not None:
        pairs.append(("slots", f"{facts['slots']}"))
    return [*pairs, ("platform", document.get("platform")), ("commit", document.get("commit"))]


def _gpu(gpu: Document) -> str:
    capability = str(gpu.get("capability", "")).replace(".", "")
    driver = f", driver {gpu['driver_version']}" if gpu.get("driver_version") else ""
    return f"{gpu.get('name')}, {pieces.size_in_bytes(gpu.get('memory_bytes'))}, sm_{capability}{driver}"


def versions(document: Document) -> list[tuple[str, object]]:
    return sorted((document.get("versions") or {}).items())


def implementations(document: Document) -> str:
    rows = [
        (
            Raw(f'<span class="at-mono">{escape(item["name"])}</span>'),
            item.get("label") or "",
            Raw(tag("yes", good=True) if item.get("available") else tag("no")),
            item.get("reason") or "",
        )
        for item in document.get("implementations") or []
    ]
    if not rows:
        return pieces.notice("This machine's survey says nothing about implementations.", "warning")
    return pieces.table(
        ("implementation", "what it is", "here", "why, or why not"), rows, label="Implementations"
    )


def models(rows: list[Document]) -> str:
    """The bundled models, and how to fetch those that are not here."""
    lines = [
        (
            Raw(f'<span class="at-mono">{escape(row["name"])}</span>'),
            row["title"],
            f"{row['layers']} × {row['heads']}",
            f"{row['context']:,}",
            row["license"],
            Raw(tag("fetched", good=True) if row["fetched"] else _fetch_words(row)),
        )
        for row in rows
    ]
    columns = ("model", "what it is", "layers × heads", "context", "license", "on the web server's machine")
    return panel("Bundled models", pieces.table(columns, lines, label="Models"))


def _fetch_words(row: Document) -> str:
    size = pieces.size_in_bytes(row["size_bytes"])
    return f'{tag("no")} <code class="at-select">attnlab models fetch {escape(row["name"])}</code> ({size})'


def tag(words: str, *, good: bool = False) -> str:
    return f'<span class="at-tag{" at-tag-good" if good else ""}">{escape(words)}</span>'


def page(document: Document) -> str:
    """The whole page."""
    shown = document["machines"]
    if not shown:
        empty = pieces.empty_state(
            "No machine has been surveyed yet",
            "A dispatcher surveys its machines when it starts, and every run stores where it ran. "
            "Start one with: attnlab up",
        )
        shown_html = panel("Machines", empty)
    else:
        shown_html = "".join(map(machine, shown))
    return f'<div class="at-system">{overview(document)}{shown_html}{models(document["models"])}</div>'
