"""How a command line names what it works on: `3` or `run:3` is a run, `experiment:3` all runs of an experiment."""

import re
from dataclasses import dataclass
from typing import Literal

from attnlab_storage.database import Store
from attnlab_storage.listing import RunRow, get_experiment, get_run, runs_of

Kind = Literal["run", "experiment"]


class BadTarget(ValueError):
    """A target, region or map on the command line that cannot be read, or does not exist."""


@dataclass(frozen=True)
class Target:
    kind: Kind
    id: int

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


def parse_target(text: str, bare: Kind = "run") -> Target:
    """`3`, `run:3` or `experiment:3`; a number alone is a `bare`."""
    match = re.fullmatch(r"(?:(run|experiment):)?([0-9]{1,18})", text.strip())
    if match is None:
        raise BadTarget(f"TARGET must be a run's number, run:NUMBER or experiment:NUMBER, got {text!r}")
    named: dict[str | None, Kind] = {"run": "run", "experiment": "experiment", None: bare}
    return Target(named[match[1]], int(match[2]))


def find_runs(store: Store, target: Target) -> list[RunRow]:
    """The run itself, or the runs of the experiment in grid order; BadTarget when there is none."""
    if target.kind == "run":
        run = get_run(store, target.id)
        if run is None:
            raise BadTarget(f"run {target.id} does not exist; `attnlab list` shows the runs that do")
        return [run]
    if get_experiment(store, target.id) is None:
        raise BadTarget(
            f"experiment {target.id} does not exist; `attnlab list --experiments` shows those that do"
        )
    return runs_of(store, experiment_id=target.id)


def find_run_ids(store: Store, texts: list[str]) -> list[int]:
    """Every run that the targets name, in order and once."""
    found: dict[int, None] = {}
    for text in texts:
        found.update((run.id, None) for run in find_runs(store, parse_target(text)))
    return list(found)


def parse_map(text: str) -> tuple[int, int | None]:
    """`5:2` is layer 5, head 2; `5` is all of layer 5."""
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text.strip())
    if match is None:
        raise BadTarget(f"--map must be LAYER:HEAD or LAYER, numbers from 0 (for example 5:2), got {text!r}")
    return int(match[1]), None if match[2] is None else int(match[2])


def parse_region(option: str, text: str | None) -> slice | None:
    """`A:B`, from position A up to but without B; either end may be left out, and None is everything."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{0,9}):([0-9]{0,9})", text.strip())
    if match is None:
        raise BadTarget(f"{option} must be A:B, from position A up to but without B, got {text!r}")
    start, stop = (int(end) if end else None for end in match.groups())
    return slice(start, stop)
