"""Experiments that are ready to run: stacks of mechanisms, and the claims that people quote. No torch."""

from __future__ import annotations

from attnlab.presets.claim import Claim, Which
from attnlab.presets.grid import Grid, Preset, PresetError, Size
from attnlab.presets.quoted_memory import MEMORY_PRESETS
from attnlab.presets.quoted_serving import BATCH_SERVING
from attnlab.presets.quoted_speed import SPEED_PRESETS
from attnlab.presets.stacks import STACKS
from attnlab.presets.verdict import Verdict, judge

__all__ = [
    "PRESETS",
    "Claim",
    "Grid",
    "Preset",
    "PresetError",
    "Size",
    "Verdict",
    "Which",
    "find_preset",
    "judge",
]

PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (*MEMORY_PRESETS, *SPEED_PRESETS, BATCH_SERVING, *STACKS)
}
"""every preset by its name"""


def find_preset(name: str) -> Preset:
    """The preset; PresetError with the choices where there is none of that name."""
    if name not in PRESETS:
        raise PresetError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
