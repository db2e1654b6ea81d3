"""What an experiment is: spec, models, probes, views, comparison and export.

    import attnlab
    lab = attnlab.open_lab()
    experiment = lab.run("name: first ...")

Names are loaded when they are first used, so ``import attnlab`` loads neither torch nor the database.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lab import open_lab
    from .problems import Problem, SpecError
    from .spec import ExperimentSpec, RunPoint, parse_spec

__all__ = ["ExperimentSpec", "Problem", "RunPoint", "SpecError", "open_lab", "parse_spec"]

_HOMES = {
    "ExperimentSpec": "spec",
    "Problem": "problems",
    "RunPoint": "spec",
    "SpecError": "problems",
    "open_lab": "lab",
    "parse_spec": "spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attnlab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
