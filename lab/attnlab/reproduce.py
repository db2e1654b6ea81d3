"""A run again: the one point of its grid as an experiment, and whether the new times lie in the old intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from attnlab.compare import flatten
from attnlab.describe import find_experiment, run_document
from attnlab.intervals import median_interval
from attnlab.spec import ExperimentSpec, parse_spec
from attnlab.views.errors import ViewError
from attnlab.views.viewport import find_run
from attnlab_storage.database import Store

TIMES = {"latency_ms": "forward pass", "attention_latency_ms": "attention alone"}
MEASURED_EACH_TIME = ("ceilings.", "clocks.", "temperature.")
"""parts of an environment that are readings, and differ between two runs alike in all else"""


@dataclass(frozen=True)
class Repeated:
    """One time, then and now; milliseconds."""

    name: str
    old: float
    interval: tuple[float, float]
    new: float

    @property
    def ratio(self) -> float:
        """New over old: above 1 it is slower now."""
        return self.new / self.old

    @property
    def inside(self) -> bool:
        """Whether the new median lies in the old median's interval."""
        return self.interval[0] <= self.new <= self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "inside": self.inside}


@dataclass(frozen=True)
class Reproduction:
    """What became of a run that was run again."""

    old: int
    new: int
    outcome: str
    times: tuple[Repeated, ...]
    changed: dict[str, tuple[Any, Any]]
    """what differs in the environments: name, then and now"""

    @property
    def holds(self) -> bool:
        """Whether it ended as before and every time lies in its interval."""
        return self.outcome == "succeeded" and bool(self.times) and all(one.inside for one in self.times)

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"times": [one.to_dict() for one in self.times]}
        return found | {"reproduced": self.holds}


def reproduction_spec(store: Store, run_id: int) -> ExperimentSpec:
    """The run's own point of its experiment as a spec of one run, seed and input the same.

    Raises NotFound when there is no such run, ViewError where it has no times to compare, SpecError where its spec no
    longer says anything that can be run.
    """
    run = find_run(store, run_id)
    if run.state != "succeeded":
        raise ViewError(f"run must have succeeded to be compared with; run {run_id} is {run.state}")
    if not _times(run_document(store, run_id)):
        raise ViewError(
            f"run must have timing in record and at least 3 repeats; run {run_id} has no interval"
        )
    spec = dict(find_experiment(store, run.experiment_id).spec)
    vary: dict[str, Any] = {
        "mechanism": [{run.mechanism: dict(run.parameters)}],
        "implementation": [run.implementation],
        "dtype": [run.dtype],
        "batch_size": [run.batch_size],
    }
    if spec["vary"].get("sequence_length"):
        vary["sequence_length"] = [run.sequence_length]
    return parse_spec(spec | {"name": f"run {run_id} again", "vary": vary, "phase": run.phase})


def judge(store: Store, old: int, new: int) -> Reproduction:
    """Set a run beside its repetition. Raises NotFound."""
    before, after = run_document(store, old), run_document(store, new)
    then, now = _times(before), _times(after)
    times = tuple(Repeated(name, *then[name], now[name][0]) for name in TIMES if name in then and name in now)
    changed = _changed(before["environment"] or {}, after["environment"] or {})
    return Reproduction(old, new, after["state"], times, changed)


def _times(document: Mapping[str, Any]) -> dict[str, tuple[float, tuple[float, float]]]:
    found = {}
    for name in TIMES:
        if document[name] and (interval := median_interval(document[name]["samples"])):
            found[name] = (document[name]["median"], interval)
    return found


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    then, now = flatten(before), flatten(after)
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    kept = [name for name in names if not any(part in f"{name}." for part in MEASURED_EACH_TIME)]
    return {name: (then.get(name), now.get(name)) for name in kept}
