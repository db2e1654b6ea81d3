"""Broken rules beside the fields that they are about, as the line under a field's label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from attnlab.problems import Problem

FIELD_OF = {
    "name": "name",
    "model": "model",
    "module": "module_dim",
    "module.dim": "module_dim",
    "module.num_heads": "module_heads",
    "input": "source",
    "input.text": "text",
    "input.image": "image",
    "input.size": "size",
    "input.audio": "audio",
    "input.target": "target",
    "input.max_tokens": "max_tokens",
    "input.repeat": "text",
    "vary.implementation": "implementations",
    "vary.sequence_length": "sequence_lengths",
    "vary.dtype": "dtypes",
    "vary.batch_size": "batch_sizes",
    "vary.cache": "caches",
    "phase": "phase",
    "record": "record",
    "layers": "layers",
    "repeats": "repeats",
    "seed": "seed",
    "resources.gpus": "gpus",
    "serving.workload.prompt_tokens": "serving.workload.prompt_tokens.distribution",
    "serving.workload.output_tokens": "serving.workload.output_tokens.distribution",
    "serving.workload.arrivals": "serving.workload.arrivals.process",
    "serving.workload": "serving.workload.requests",
    "serving": "serving.workload.arrivals.process",
    "frontier": "frontier.up_to",
}
"""argument of a rule -> the field beside which it stands"""


def beside_fields(problems: Sequence[Problem], fields: Mapping[str, Any]) -> dict[str, str]:
    """Field -> what is wrong with it, as plain text.

    Args:
        fields: those that the form shows: names of `Form`, paths of sections, `mechanism.parameter`.
    """
    found: dict[str, list[str]] = {}
    for problem in problems:
        if (field := _field(problem.argument, fields)) is not None:
            found.setdefault(field, []).append(_words(problem))
    return {field: "; ".join(words) for field, words in found.items()}


def _field(argument: str, fields: Mapping[str, Any]) -> str | None:
    """The field of an argument; of a part of one, `vary.dtype[0]`, that of the whole."""
    parameter = re.fullmatch(r"vary\.mechanism\[\d+\]\.(\w+\.\w+)", argument)
    path = parameter[1] if parameter else re.sub(r"\[\d+\]", "", argument)
    while path:
        for name in (path, FIELD_OF.get(path)):
            if name in fields:
                return name
        path = path.rpartition(".")[0]
    return None


def _words(problem: Problem) -> str:
    value = f", got {problem.value}" if problem.value else ""
    near = f" (did you mean {problem.suggestion}?)" if problem.suggestion else ""
    return f"{problem.rule}{value}{near}"
