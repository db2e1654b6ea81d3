"""Pieces of an HTML page; every value passes through `text`, so nothing a user wrote becomes markup."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from attnlab.export.scene import data_uri


class Markup(str):
    """HTML that was made here and may be put on a page as it is."""


def text(value: Any) -> Markup:
    """A value as escaped text: a dash for None, compact JSON for lists and mappings."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("–")
    if isinstance(value, float):
        return Markup(escape(f"{value:.6g}"))
    if isinstance(value, dict | list | tuple):
        return Markup(escape(json.dumps(value, ensure_ascii=False)))
    return Markup(escape(str(value)))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], marked: Iterable[int] = ()) -> Markup:
    """A table; rows whose index is ``marked`` are tinted."""
    tinted = set(marked)
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{text(cell)}</td>" for cell in row)
        lines.append(f'<tr class="ended-badly">{cells}</tr>' if i in tinted else f"<tr>{cells}</tr>")
    body = "".join(lines)
    return Markup(
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def section(title: str, *parts: str) -> Markup:
    """A titled part of the page; nothing at all when its parts are empty."""
    body = "".join(parts)
    return Markup(f"<section><h2>{text(title)}</h2>{body}</section>") if body else Markup("")


def picture(png: bytes, caption: str) -> Markup:
    """A PNG inside the page with its caption."""
    alt = text(caption)
    return Markup(f'<figure><img src="{data_uri(png)}" alt="{alt}"><figcaption>{alt}</figcaption></figure>')


def notes(lines: Sequence[str]) -> Markup:
    """A list of remarks; nothing when there are none."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return Markup(f'<ul class="notes">{items}</ul>') if items else Markup("")


def details(summary: str, body: str) -> Markup:
    """A part that is folded away at first."""
    return Markup(f"<details><summary>{text(summary)}</summary>{body}</details>")
