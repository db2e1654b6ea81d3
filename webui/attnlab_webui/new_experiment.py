"""What the New experiment page says beside its fields, as escaped HTML: problems, cost, facts, what was queued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from attnlab.documents import write_document
from attnlab.estimate import Estimate, estimate
from attnlab.pictures import open_picture
from attnlab.problems import Problem
from attnlab_storage import queue
from attnlab_storage.database import Store
from attnlab_storage.listing import ExperimentRow, get_experiment, list_experiments
from attnlab_webui import pieces, uploads
from attnlab_webui.advise_query import asked_of, default_asked
from attnlab_webui.drafts import Draft, clone, model_line, starter, token_line
from attnlab_webui.form import AUDIO, IMAGE, Form
from attnlab_webui.pieces import escape

RECENT = 5
PREVIEW_PIXELS = 96
COST_WORDS = {"history": "as runs like these took", "rough": "roughly", "limit": "at most"}


def problem_list(problems: Sequence[Problem]) -> str:
    """Every broken rule with its argument; empty when there is none."""
    if not problems:
        return ""
    items = "".join(f"<li>{_problem(problem)}</li>" for problem in problems)
    count = "one thing" if len(problems) == 1 else f"{len(problems)} things"
    return (
        f'<div class="at-notice at-notice-error" role="alert"><b>{count} to fix</b>'
        f'<ul class="at-problems">{items}</ul></div>'
    )


def _problem(problem: Problem) -> str:
    value = f", got <code>{escape(problem.value)}</code>" if problem.value else ""
    near = f" — did you mean <code>{escape(problem.suggestion)}</code>?" if problem.suggestion else ""
    choices = (
        f'<br><span class="at-muted">choices: {escape(", ".join(problem.choices))}</span>'
        if problem.choices
        else ""
    )
    return f"<b>{escape(problem.argument)}</b> {escape(problem.rule)}{value}{near}{choices}"


def cost_of(store: Store, draft: Draft) -> Estimate | None:
    """What the experiment would cost; None while the draft is not valid."""
    return None if draft.spec is None else estimate(draft.spec, store)


def cost_panel(cost: Estimate | None) -> str:
    """The cost in numbers, what they leave open, and why it cannot be queued if it cannot."""
    if cost is None:
        return '<div class="at-cost at-muted">The cost shows here once nothing is left to fix.</div>'
    numbers = (
        ("runs", f"{cost.runs:,}"),
        ("stored", pieces.size_in_bytes(cost.stored_bytes or None)),
        ("peak memory", pieces.size_in_bytes(cost.peak_bytes or None)),
        (COST_WORDS.get(cost.basis, "time"), pieces.duration(cost.seconds)),
    )
    cells = "".join(f"<div><b>{escape(value)}</b><span>{name}</span></div>" for name, value in numbers)
    notes = "".join(f"<li>{escape(note)}</li>" for note in cost.notes)
    refusals = "".join(pieces.notice(refusal, "error") for refusal in cost.refusals)
    return (
        f'<div class="at-cost">{cells}</div>{f"<ul class=at-notes>{notes}</ul>" if notes else ""}{refusals}'
    )


def facts_line(form: Form) -> str:
    """What the chosen model is, whether it is here, and how long the text is for it."""
    line = model_line(form.model)
    parts = []
    if line.facts is not None:
        facts = line.facts
        named = (
            ("layers", facts.layers),
            ("heads", facts.heads),
            ("KV heads", facts.kv_heads),
            ("head size", facts.head_dim),
            ("context", facts.context),
        )
        parts += [
            f"{value:,} {name}" if name != "context" else f"context {value:,}"
            for name, value in named
            if value
        ]
        if facts.causal is not None:
            parts.append("causal" if facts.causal else "bidirectional")
    words = escape(" · ".join(parts))
    mark = '<span class="at-tag at-tag-good">ready</span> ' if line.ready and line.facts is not None else ""
    how = (
        f'<span class="{"at-muted" if line.ready else "at-warn"}">{escape(line.how)}</span>'
        if line.how
        else ""
    )
    tokens = token_line(form)
    told = f'<span class="at-tokens">{escape(tokens)}</span>' if tokens else ""
    return f'<div class="at-facts-line">{mark}<span>{words}</span>{how}{told}</div>'


def preview(form: Form) -> str:
    """The picture or the sound that goes in; empty for a text, or where there is nothing to show."""
    if form.source not in (IMAGE, AUDIO):
        return ""
    source = form.image if form.source == IMAGE else form.audio
    uri = uploads.contents(form.source, source)
    if uri is None:
        return ""
    if form.source == AUDIO:
        return f'<audio class="at-preview" controls src="{escape(uri)}"></audio>'
    # a few pixels are shown as squares, a photo smooth
    few = min(open_picture(uri).size) < PREVIEW_PIXELS
    kind = "at-preview at-pixels" if few else "at-preview"
    return f'<img class="{kind}" src="{escape(uri)}" alt="{escape(source[:64])}">'


def unavailable_line(reasons: Mapping[str, str]) -> str:
    """Why the implementations marked as missing are missing, folded away."""
    if not reasons:
        return ""
    items = "".join(f"<li><b>{escape(name)}</b> {escape(reason)}</li>" for name, reason in reasons.items())
    words = (
        f"why {len(reasons)} of them are on no known machine"
        if len(reasons) > 1
        else "why one is on no known machine"
    )
    return f'<details class="at-muted at-small"><summary>{words}</summary><ul class="at-notes">{items}</ul></details>'


def submit(store: Store, draft: Draft) -> queue.Submitted:
    """Queues the draft's experiment; the draft must be valid."""
    if draft.spec is None:
        raise ValueError("draft must be valid to be queued")
    spec = draft.spec
    return queue.submit(
        store,
        name=spec.name,
        spec=spec.to_dict(),
        spec_hash=spec.hash(),
        points=[point.to_dict() for point in spec.points()],
        created_by="web page",
    )


def queued_notice(submitted: queue.Submitted, alive: int) -> str:
    """Where the experiment that was just queued can be seen."""
    link = f"/experiment?{urlencode({'id': submitted.experiment_id})}"
    runs = len(submitted.run_ids)
    words = "1 run is queued" if runs == 1 else f"{runs} runs are queued"
    waits = "" if alive else " No dispatcher is running, so they wait: start one with attnlab dispatch."
    return (
        f'<div class="at-notice at-notice-info" role="status">{words}. '
        f'<a class="at-button at-primary" href="{link}">Open experiment {submitted.experiment_id}</a> '
        f'<a class="at-button" href="/queue">Queue</a>{escape(waits)}</div>'
    )


def first_text(store: Store, query: Mapping[str, str]) -> tuple[str, str]:
    """The YAML the page opens with (`?clone=ID`, `?mechanism=ID`, `?advice=1&...`, or the starter), and a notice."""
    wanted = query.get("clone")
    if wanted is not None:
        found = get_experiment(store, int(wanted)) if wanted.isdecimal() and len(wanted) < 18 else None
        if found is None:
            return starter(), pieces.notice(f"There is no experiment {wanted[:40]!r} to clone.", "warning")
        return clone(found.spec), pieces.notice(
            f"A copy of experiment {found.id}: change what you like, then queue it."
        )
    if "advice" in query:
        return _advised(store, query)
    return starter(query.get("mechanism")), ""


def _advised(store: Store, query: Mapping[str, str]) -> tuple[str, str]:
    try:
        found = asked_of(query, default_asked(store)).advice()
    except ValueError as problem:
        return starter(), pieces.notice(f"This advice cannot be read: {problem}", "warning")
    return write_document(found.experiment), pieces.notice(found.leaf.trial.asks)


def recent_list(store: Store) -> str:
    """The newest experiments with their states, a line each; before the first one, what will be here."""
    rows = list_experiments(store, limit=RECENT).rows
    title = '<h3 class="at-section-title">Recent experiments'
    if not rows:
        return f'{title}</h3><p class="at-muted">What you queue shows up here.</p>'
    more = '<a class="at-quiet-link" href="/queue">queue</a>'
    return f'{title} {more}</h3><div class="at-recent">{"".join(map(_recent, rows))}</div>'


def _recent(row: ExperimentRow) -> str:
    name = escape(row.name)
    told = {state: count for state, count in row.states.items() if count}
    chips = "".join(_state_chip(state, count, alone=len(told) == 1) for state, count in told.items())
    return (
        f'<a class="at-clip" href="/experiment?{urlencode({"id": row.id})}" title="{name}">'
        f'<span class="at-number at-muted">{row.id}</span> {name}</a>'
        f'<span class="at-recent-states">{chips}</span>'
        f'<span class="at-muted">{pieces.ago(row.created_at)}</span>'
        f'<a class="at-quiet-link" href="/?{urlencode({"clone": row.id})}" aria-label="Clone {name}">clone</a>'
    )


def _state_chip(state: str, count: int, *, alone: bool) -> str:
    """How many runs are in a state; only the number where several states share the line."""
    words = f"{count} {pieces.STATE_WORDS[state]}"
    shown = words if alone else str(count)
    return f'<span class="at-chip at-{escape(state)}" title="{escape(words)}">{escape(shown)}</span>'
