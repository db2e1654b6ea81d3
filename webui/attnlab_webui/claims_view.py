"""What the Claims page says, as escaped HTML: the presets, the verdict of each claim, the experiments."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from attnlab.presets import PRESETS, Claim, Preset, Verdict
from attnlab.presets.outcome import PresetState
from attnlab.presets.verdict import KIND_WORDS
from attnlab.views.labels import mechanism_label, ran_as
from attnlab_webui import pieces
from attnlab_webui.pieces import Raw, escape

TONES = {
    "holds": "at-succeeded",
    "does_not_hold": "at-failed",
    "not_measurable": "at-unsupported",
    "not_run": "",
}


def preset_choices() -> list[tuple[str, str]]:
    """Titles and names, claims first."""
    ordered = sorted(PRESETS.values(), key=lambda preset: preset.kind != "claims")
    return [(preset.title if preset.claims else f"Stack: {preset.title}", preset.name) for preset in ordered]


def head(preset: Preset, state: PresetState) -> str:
    """What the preset is about, how its claims stand, and its experiments."""
    kinds = [verdict.kind for verdict in state.verdicts.values()]
    chips = "".join(
        f'<span class="at-chip {TONES[kind]}">{escape(words)}: {kinds.count(kind)}</span> '
        for kind, words in KIND_WORDS.items()
        if kind in kinds
    )
    wrong = f"<p><b>Not so:</b> {escape(preset.correction)}</p>" if preset.correction else ""
    links = "".join(
        f'<a class="at-button" href="/experiment?{urlencode({"id": one})}">experiment {one}</a> '
        for one in state.experiments
    )
    return (
        f'<div class="at-claims-head"><h1>{escape(preset.title)}</h1><p>{escape(preset.about)}</p>{wrong}'
        f"<p>{chips}</p><p>{links or no_runs(preset)}</p></div>"
    )


def no_runs(preset: Preset) -> str:
    """What to do where it was never run."""
    return (
        '<span class="at-muted">Not run yet: press “Run this preset”, or in a terminal '
        f'<span class="at-mono at-select">attnlab preset run {escape(preset.name)}</span></span>'
    )


def claims_table(preset: Preset, state: PresetState) -> str:
    """A row a claim: what is said, of what, how it is measured, and the verdict with its reason."""
    if not preset.claims:
        names = [(grid.name, ", ".join(map(_entry, grid.mechanisms)), grid.phase) for grid in preset.grids]
        grids = pieces.table(("experiment", "mechanisms", "phase"), names, label="experiments")
        return grids + stack_table(preset, state)
    homes = {document["id"]: document["experiment"] for document in state.documents}
    rows = [_row(claim, state.verdicts[claim.id], homes) for claim in preset.claims]
    columns = ("claim", "said of", "verdict", "why", "runs")
    return pieces.table(columns, rows, label="claims", css="at-claims")


def stack_table(preset: Preset, state: PresetState) -> str:
    """How the runs of a stack's newest round ended, with what they took; empty where there are none."""
    newest = state.experiments[: len(preset.grids)]
    runs = [document for document in state.documents if document["experiment"] in newest]
    rows = [_ended(document) for document in sorted(runs, key=lambda document: document["id"])]
    columns = ("run", "mechanism", "tokens", "batch", "outcome", "forward pass", "attention's peak", "why")
    if not rows:
        return ""
    return f"<h3>How its runs ended</h3>{pieces.table(columns, rows, label='how its runs ended')}"


def _ended(document: dict[str, Any]) -> tuple[object, ...]:
    address = escape(urlencode({"id": document["experiment"], "run": document["id"]}))
    timing, peak = document["latency_ms"], document["attention_peak_memory_bytes"]
    return (
        Raw(f'<a href="/experiment?{address}">{document["id"]}</a>'),
        f"{mechanism_label(document)} {ran_as(document)}",
        f"{document['sequence_length']:,}",
        document["batch_size"],
        Raw(pieces.chip(document["state"])),
        "—" if timing is None else pieces.milliseconds(timing["median"]),
        "—" if peak is None else pieces.size_in_bytes(peak),
        document["reason"] or document["speed_withheld"] or "",
    )


def _row(claim: Claim, verdict: Verdict, homes: dict[int, int]) -> tuple[object, ...]:
    chip = Raw(f'<span class="at-chip {TONES[verdict.kind]}">{escape(KIND_WORDS[verdict.kind])}</span>')
    quoted = f'<br><span class="at-muted">{escape(claim.quoted)}</span>' if claim.quoted else ""
    said = Raw(f'<span title="{escape(claim.source)}">{escape(claim.says)}</span>{quoted}')
    why = Raw(f'<span title="{escape(claim.how)}">{escape(verdict.reason)}</span>')
    runs = " ".join(
        f'<a href="/experiment?{escape(urlencode({"id": homes[run], "run": run}))}">{run}</a>'
        for run in verdict.runs
    )
    return said, claim.device or "any device", chip, why, Raw(runs or "—")


def _entry(entry: str | dict[str, dict[str, object]]) -> str:
    if isinstance(entry, str):
        return entry
    ((name, parameters),) = entry.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in parameters.items())})"
