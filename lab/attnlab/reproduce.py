"""A run again: the one point of its grid as an experiment, and whether the new figures lie in the old intervals.

Times of a forward and its attention; tokens a second and waits of a server; the longest that fits of a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from attnlab.compare import flatten
from attnlab.describe import find_experiment, run_document
from attnlab.intervals import median_interval
from attnlab.serving.metrics import waits_of
from attnlab.spec import ExperimentSpec, parse_spec
from attnlab.views.errors import ViewError
from attnlab.views.serving import load_timeline
from attnlab.views.viewport import find_run
from attnlab_storage.database import Store

TIMES = {"latency_ms": "forward pass", "attention_latency_ms": "attention alone"}
RATES = {"output_tokens_per_second": "tokens written a second"}
WAITS = {"time_to_first_token": "time to first token", "inter_token_latency": "time between tokens"}
FRONTIER = "longest_fit"
WORDS = TIMES | RATES | WAITS | {FRONTIER: "longest that fits"}
MEASURED_EACH_TIME = ("ceilings.", "clocks.", "temperature.")
"""parts of an environment that are readings, and differ between two runs alike in all else"""


@dataclass(frozen=True)
class Repeated:
    """One figure, then and now."""

    name: str
    old: float
    interval: tuple[float, float]
    new: float
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        """New over old: above 1 a time is slower now."""
        return self.new / self.old if self.old else float(self.new == self.old)

    @property
    def inside(self) -> bool:
        """Whether the new figure lies in the old one's interval."""
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
        """Whether it ended as before and every figure lies in its interval."""
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
    if not _figures(store, run_id):
        raise ViewError(
            f"run must have served, have searched the longest that fits, or have timing in record and at least 3 "
            f"repeats; run {run_id} has no interval"
        )
    spec = dict(find_experiment(store, run.experiment_id).spec)
    parameters = dict(run.parameters)
    vary: dict[str, Any] = {"implementation": [run.implementation], "dtype": [run.dtype]}
    if run.phase == "serving":  # its length and batch follow from the workload
        vary["cache"] = [parameters.pop("cache")]
    else:
        vary["batch_size"] = [run.batch_size]
    vary["mechanism"] = [{run.mechanism: parameters}]
    if spec["vary"].get("sequence_length"):
        vary["sequence_length"] = [run.sequence_length]
    return parse_spec(spec | {"name": f"run {run_id} again", "vary": vary, "phase": run.phase})


def judge(store: Store, old: int, new: int) -> Reproduction:
    """Set a run beside its repetition. Raises NotFound."""
    before, after = run_document(store, old), run_document(store, new)
    then, now = _figures(store, old), _figures(store, new)
    shared = [name for name in WORDS if name in then and name in now]
    figures = tuple(
        Repeated(name, then[name].value, then[name].interval, now[name].value, then[name].unit)
        for name in shared
    )
    changed = _changed(before["environment"] or {}, after["environment"] or {})
    return Reproduction(old, new, after["state"], figures, changed)


class _Figure(NamedTuple):
    value: float
    interval: tuple[float, float]
    unit: str


def _figures(store: Store, run_id: int) -> dict[str, _Figure]:
    """What a run can be held against, each with its interval."""
    document = run_document(store, run_id)
    found: dict[str, _Figure] = {}
    for name in TIMES:
        if document[name] and (interval := median_interval(document[name]["samples"])):
            found[name] = _Figure(document[name]["median"], interval, "ms")
    if document["serving"]:
        found |= _served(store, run_id, document["serving"])
    if frontier := document["frontier"]:
        found[FRONTIER] = _Figure(float(frontier["fits"]), _bracket(frontier), "tokens")
    return found


def _served(store: Store, run_id: int, serving: Mapping[str, Any]) -> dict[str, _Figure]:
    """Rates with a sample for each pass, waits with one for each request (or gap) of the middle pass."""
    found: dict[str, _Figure] = {}
    for name in RATES:
        if interval := median_interval(serving[name]["samples"]):
            found[name] = _Figure(serving[name]["value"], interval, serving[name]["unit"])
    waits = waits_of(load_timeline(store, run_id))
    for name in WAITS:
        if interval := median_interval([1e3 * seconds for seconds in waits[name]]):
            found[name] = _Figure(serving[name]["value"], interval, "ms")
    return found


def _bracket(frontier: Mapping[str, Any]) -> tuple[float, float]:
    """A search ends within ``resolution`` of the truth, so another one may end as far on either side."""
    fits, step = frontier["fits"], frontier["resolution"]
    return float(fits - step), float(fits + step)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    then, now = flatten(before), flatten(after)
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    kept = [name for name in names if not any(part in f"{name}." for part in MEASURED_EACH_TIME)]
    return {name: (then.get(name), now.get(name)) for name in kept}
