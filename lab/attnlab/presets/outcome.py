"""What the store knows of a preset: its experiments, and the verdict of each claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from attnlab.describe import run_document
from attnlab.presets.grid import Preset
from attnlab.presets.verdict import Verdict, judge
from attnlab_storage import queue, results
from attnlab_storage.database import Store

ROUNDS = 2
"""how many times over its experiments are looked at, newest first"""


class PresetState(NamedTuple):
    """A preset as it stands: ids of its experiments (newest first), documents of their runs, verdicts by claim."""

    experiments: list[int]
    documents: list[dict[str, Any]]
    verdicts: dict[str, Verdict]


def preset_state(store: Store, preset: Preset) -> PresetState:
    """Read the newest experiments of a preset and judge its claims."""
    rows = results.list_experiments(store, tag=preset.tag, limit=ROUNDS * len(preset.grids)).rows
    documents = [
        run_document(store, run.id) for row in rows for run in results.runs_of(store, experiment_id=row.id)
    ]
    verdicts = {claim.id: judge(claim, documents) for claim in preset.claims}
    return PresetState([row.id for row in rows], documents, verdicts)


def submit_preset(store: Store, preset: Preset, scale: str, created_by: str) -> list[queue.Submitted]:
    """Queue every experiment of a preset, marked as its own. Raises PresetError, SpecError: nothing is queued then."""
    specs = preset.specs(scale)
    return [
        queue.submit(
            store,
            name=spec.name,
            spec=spec.to_dict(),
            spec_hash=spec.hash(),
            points=[point.to_dict() for point in spec.points()],
            created_by=created_by,
            tags=(preset.tag,),
        )
        for spec in specs
    ]


def preset_document(preset: Preset, state: PresetState | None = None) -> dict[str, Any]:
    """A preset as plain values, with its verdicts where a store was read."""
    claims: list[Mapping[str, Any]] = []
    for claim in preset.claims:
        verdict = {} if state is None else state.verdicts[claim.id].to_dict()
        claims.append(asdict(claim) | {"verdict": verdict or None})
    return {
        "name": preset.name,
        "title": preset.title,
        "kind": preset.kind,
        "about": preset.about,
        "correction": preset.correction,
        "specs": {scale: [grid.document(scale) for grid in preset.grids] for scale in ("cpu", "gpu")},
        "claims": claims,
        "experiments": [] if state is None else state.experiments,
    }
