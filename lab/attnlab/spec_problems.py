"""What pydantic found wrong with a spec, as problems: the argument, the rule, the value, the valid choices."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from .problems import Problem, shown
from .serving.settings import Arrivals, Lengths, ServingSpec, Workload
from .spec_sections import DecodeSpec, FrontierSpec, InputSpec, ModuleSpec, NeedleSpec, Resources, VarySpec

SECTIONS: Mapping[tuple[Any, ...], type[BaseModel]] = {
    ("module",): ModuleSpec,
    ("input",): InputSpec,
    ("input", "needle"): NeedleSpec,
    ("vary",): VarySpec,
    ("decode",): DecodeSpec,
    ("frontier",): FrontierSpec,
    ("resources",): Resources,
    ("serving",): ServingSpec,
    ("serving", "workload"): Workload,
    ("serving", "workload", "arrivals"): Arrivals,
    ("serving", "workload", "prompt_tokens"): Lengths,
    ("serving", "workload", "output_tokens"): Lengths,
}


def problem_of(detail: Any, top: type[BaseModel]) -> Problem:
    """One of ``ValidationError.errors()``; ``top`` is the record that holds the sections."""
    argument = _path(detail["loc"])
    context = detail.get("ctx") or {}
    match detail["type"]:
        case "attnlab":
            value = context["shown"] if context["shown"] != "''" else ""
            return Problem(argument, context["rule"], value, tuple(context["choices"]))
        case "extra_forbidden":
            fields = tuple(SECTIONS.get(detail["loc"][:-1], top).model_fields)
            return Problem(argument, "is not a field of a spec", shown(str(detail["loc"][-1])), fields)
        case "missing":
            return Problem(argument, "must be given")
        case _:
            message = detail["msg"].removeprefix("Input should be ")
            return Problem(argument, f"must be {message}", shown(detail["input"]))


def _path(location: tuple[Any, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or "spec"
