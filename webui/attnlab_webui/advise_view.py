"""What the Advise page says, as escaped HTML: the way there, the recommendation, cache bytes, tables, sources."""

from __future__ import annotations

from collections.abc import Sequence

from attnlab.advice.model_shapes import CacheLine, ModelShape
from attnlab.advise import LENGTHS, Advice
from attnlab.spec import parse_spec
from attnlab_kernels.catalog import MECHANISMS
from attnlab_webui import pieces
from attnlab_webui.pieces import Raw, escape


def recommendation(found: Advice) -> str:
    """Everything about one recommendation but its experiment."""
    leaf = found.leaf
    steps = "".join(
        f"<li><span class=at-muted>{escape(step.question.text)}</span> <b>{escape(step.choice.label)}</b>"
        f" <span class=at-muted>— {escape(step.choice.why)}</span></li>"
        for step in found.steps
    )
    parts = [_part(part.mechanism, part.role, part.instead_of) for part in leaf.parts]
    wrong = (
        f'<h3 class="at-section-title">Often said, and not so</h3><p>{escape(leaf.correction)}</p>'
        if leaf.correction
        else ""
    )
    avoid = "".join(
        f"<li>{mechanism_link(item.mechanism)} <span>{escape(item.why)}</span></li>" for item in leaf.avoid
    )
    return (
        f'<div class="at-advice"><ol class="at-steps">{steps}</ol>'
        f'<div class="at-parts">{"".join(parts)}</div>'
        f"<p>{escape(leaf.reason)}</p>{wrong}"
        f'<h3 class="at-section-title">Not here</h3><ul class="at-avoid">{avoid}</ul></div>'
    )


def _part(mechanism: str, role: str, instead_of: str | None) -> str:
    title = escape(MECHANISMS[mechanism].title)
    other = (
        ""
        if instead_of is None
        else f' <span class="at-tag">instead of {escape(MECHANISMS[instead_of].title)}</span>'
    )
    css = "at-part" if instead_of is None else "at-part at-part-other"
    return (
        f'<div class="{css}"><a href="/mechanisms#{escape(mechanism)}">{title}</a>{other}'
        f"<span>{escape(role)}</span></div>"
    )


def mechanism_link(mechanism: str) -> str:
    """A mechanism's title, leading to its record."""
    return f'<a href="/mechanisms#{escape(mechanism)}">{escape(MECHANISMS[mechanism].title)}</a>'


def cache_panel(found: Advice) -> str:
    """Cache bytes for the shape as bars beside multi-head's."""
    title = f'<h3 class="at-section-title">Key-value cache, {escape(shape_words(found.shape))}</h3>'
    if not found.lines:
        return (
            f"{title}<p class=at-muted>None: this is not autoregressive, nothing is kept between tokens.</p>"
        )
    largest = max(line.bytes_in_all for line in found.lines)
    rows = "".join(_cache_row(line, largest) for line in found.lines)
    note = (
        "By the catalog's formulas, for the shape in the fields; where it has as many KV heads as heads, "
        "grouped-query is shown with a quarter. Window, latent and state have the catalog's default sizes."
    )
    return f'{title}<div class="at-cache-rows">{rows}</div><p class="at-muted">{note}</p>'


def shape_words(shape: ModelShape) -> str:
    at_once = "" if shape.batch == 1 else f" × {shape.batch:,} sequences"
    return f"{shape.context:,} tokens{at_once}, {shape.dtype}"


def _cache_row(line: CacheLine, largest: int) -> str:
    width = 100 * line.bytes_in_all / largest
    name = f"<b>{escape(line.title)}</b>" if line.recommended else escape(line.title)
    share = "100%" if line.share == 1 else f"{line.share:.1%}" if line.share >= 0.001 else f"{line.share:.1e}"
    return (
        f'<span title="{escape(line.formula)}">{name}</span>'
        f'<span class="at-bar" aria-hidden="true"><span style="width:{width:.2f}%"></span></span>'
        f'<span class="at-number">{escape(pieces.size_in_bytes(line.bytes_in_all))}</span>'
        f'<span class="at-number at-muted">{share}</span>'
    )


def lengths_table(found: Advice) -> str:
    """The table by context length, the reader's row marked."""
    columns = ("context", "training", "inference", "to save memory", "")
    rows = []
    for row in LENGTHS:
        mine = row is found.row
        label = Raw(f"<b>{escape(row.label)}</b> ←") if mine else row.label
        cells = [", ".join(names) for names in (row.training, row.inference, row.memory)]
        rows.append((label, *cells, row.note))
    title = '<h3 class="at-section-title">Language models by context length</h3>'
    return title + pieces.table(columns, rows, label="by context length")


def sources(found: Advice) -> str:
    """Papers, as text to copy: no page of the lab leads out of it."""
    items = "".join(
        f'<li>{escape(source.title)} <span class="at-mono at-select">{escape(source.url)}</span></li>'
        for source in found.sources
    )
    return f'<h3 class="at-section-title">Sources</h3><ul class="at-sources">{items}</ul>'


def trial_head(found: Advice, query: str) -> str:
    """The question that the experiment answers, and the way to put it into New experiment."""
    try:
        runs = len(parse_spec(found.experiment).points())
        ready = f"{runs} runs on a {found.scale.upper()}"
    except ValueError as problem:
        ready = str(problem)
    return (
        f'<h3 class="at-section-title">The experiment that tests it</h3><p>{escape(found.leaf.trial.asks)}</p>'
        f'<p class="at-muted">{escape(ready)}</p>'
        f'<a class="at-button" href="/?advice=1&amp;{escape(query)}">Put it into New experiment</a>'
    )


def problems(texts: Sequence[str]) -> str:
    return "".join(pieces.notice(text, "error") for text in texts)
