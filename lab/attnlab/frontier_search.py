"""A run that looks for the longest sequence that fits, in the place of the steps of other runs."""

from typing import Any

import torch

from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage.results import MeasurementRow

from .probes.frontier import Trial, find_frontier, frontier_detail
from .probes.memory import available
from .recorder import Recorder
from .spec import ExperimentSpec, RunPoint
from .trials import Trials

SAFE_SHARE = 0.9
"""of the memory that is free now; the rest of the machine goes on living"""


def search(recorder: Recorder, spec: ExperimentSpec, point: RunPoint, device: torch.device) -> dict[str, Any]:
    """Find the frontier of one point of the grid; returns the run's summary.

    Raises:
        Unsupported: the point cannot run at any length, or its memory is not there.
        RuntimeError: the shortest length fails for another reason than memory.
    """
    given = spec.frontier
    assert given is not None
    check_budget(given.memory_bytes, device)
    most, made = given.trials(), 0
    with Trials(spec, point, str(device), memory_bytes=given.memory_bytes, seconds=given.seconds) as trials:

        def attempt(tokens: int) -> Trial:
            nonlocal made
            recorder.phase(f"trying {tokens:,} tokens", made, most)
            made += 1
            trial = trials.attempt(tokens)
            words = trial.outcome.replace("_", " ")
            how = words if trial.fits else f"{words}: {trial.reason.removeprefix(f'{words}: ')}"
            recorder.log(f"{tokens} tokens: {how} ({trial.seconds:.1f} s)")
            if trial.outcome == "unsupported":
                raise Unsupported(trial.reason)
            if trial.outcome == "failed":
                raise RuntimeError(f"{tokens} tokens: {trial.reason}")
            return trial

        found = find_frontier(attempt, first=given.first, up_to=given.up_to, resolution=given.resolution)
        recorder.phase("naming the kernels", made, most)
        named = name_kernels(trials, [trial.tokens for trial in found if trial.fits])
    if named is not None:
        recorder.log(f"kernels that ran at {named.tokens} tokens: {', '.join(named.kernels)}")
    detail = frontier_detail(found, given.memory_bytes, given.resolution)
    recorder.measurements([MeasurementRow("frontier", float(detail["fits"]), "tokens", detail=detail)])
    return {
        "implementation": point.implementation if named is None else ", ".join(named.implementations),
        "kernels": [] if named is None else named.kernels,
        "provenance": None if named is None else named.provenance,
        "tokens": detail["fits"],
        "device": str(device),
    }


def name_kernels(trials: Trials, fitting: list[int]) -> Trial | None:
    """Profile a step of the longest length that fits with the profiler beside it; None if there is none."""
    tried = (trials.attempt(tokens, name_kernels=True) for tokens in sorted(fitting, reverse=True))
    return next((trial for trial in tried if trial.fits), None)


def check_budget(memory_bytes: int, device: torch.device) -> None:
    """Raises Unsupported where a trial could take the memory that everything else on the machine lives from."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = int(SAFE_SHARE * available())
    if memory_bytes > free:
        raise Unsupported(
            f"frontier.memory_bytes: must be at most the {free} bytes that are free here, got {memory_bytes}"
        )
