"""Advice: from a few answers to a recommendation, its reason, its cache bytes and the experiment that tests it.

The tree is walked one question at a time, so that whoever asks can show each step. No torch.

    advise(Answers(goal="serving", scarce="memory"), ModelShape(context=32_768)).mechanisms
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnlab.advice.beyond_text import MULTIMODAL, RESEARCH, VISION
from attnlab.advice.experiments import SCALES, machine_scale, trial_spec
from attnlab.advice.lengths import LENGTHS, LengthRow, length_row
from attnlab.advice.model_shapes import KNOWN_SHAPES, CacheLine, ModelShape, cache_lines
from attnlab.advice.serving import EDGE, SERVING
from attnlab.advice.training import TRAINING
from attnlab.advice.tree import AdviceError, Avoid, Choice, Leaf, Part, Question, Source
from attnlab_kernels.catalog import MECHANISMS

__all__ = [
    "KNOWN_SHAPES",
    "LENGTHS",
    "SCALES",
    "TREE",
    "Advice",
    "AdviceError",
    "Answers",
    "ModelShape",
    "advise",
    "leaves",
    "machine_scale",
    "parse_tokens",
    "walk",
]

TREE = Question(
    "goal",
    "What is it for?",
    (
        Choice("training", "training a large language model", "the length of a sequence decides", TRAINING),
        Choice("serving", "serving, inference", "what is scarce decides", SERVING),
        Choice("vision", "computer vision", "pixels have neighbours on two axes", VISION),
        Choice("multimodal", "text with images or sound", "two sequences meet", MULTIMODAL),
        Choice("research", "research on attention itself", "the question decides", RESEARCH),
        Choice("edge", "a phone or a small device", "whatever grows has to be bounded", EDGE),
    ),
)


@dataclass(frozen=True)
class Answers:
    """Answers to the questions, by ``Question.key``; None: not asked yet."""

    goal: str | None = None
    context: int | None = None
    """tokens of a sequence"""
    scarce: str | None = None
    task: str | None = None
    aim: str | None = None


@dataclass(frozen=True)
class Step:
    """One question on the way, with the answer given and why it decides."""

    question: Question
    choice: Choice


@dataclass(frozen=True)
class Advice:
    """A recommendation for a shape on a machine."""

    steps: tuple[Step, ...]
    leaf: Leaf
    shape: ModelShape
    lines: tuple[CacheLine, ...]
    row: LengthRow
    scale: str
    experiment: dict[str, Any]

    @property
    def mechanisms(self) -> tuple[str, ...]:
        return self.leaf.mechanisms

    @property
    def sources(self) -> tuple[Source, ...]:
        """The papers of the parts, then what else the reason rests on."""
        papers = [MECHANISMS[part.mechanism] for part in self.leaf.parts]
        own = [Source(record.paper_title, record.paper_url) for record in papers]
        return tuple({source.url: source for source in [*own, *self.leaf.sources]}.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `attnlab advise --json` prints them."""
        leaf = self.leaf
        return {
            "key": leaf.key,
            "steps": [
                {"question": step.question.text, "answer": step.choice.label, "because": step.choice.why}
                for step in self.steps
            ],
            "mechanisms": list(leaf.mechanisms),
            "alternatives": list(leaf.alternatives),
            "parts": [_part(part) for part in leaf.parts],
            "reason": leaf.reason,
            "correction": leaf.correction,
            "avoid": [_avoid(avoid) for avoid in leaf.avoid],
            "sources": [asdict(source) for source in self.sources],
            "shape": self.shape.to_dict(),
            "cache": [asdict(line) for line in self.lines],
            "cached_by": leaf.cache,
            "lengths": [asdict(row) | {"yours": row is self.row} for row in LENGTHS],
            "scale": self.scale,
            "asks": leaf.trial.asks,
            "experiment": self.experiment,
        }


def walk(answers: Answers) -> tuple[tuple[Step, ...], Question | Leaf]:
    """Follow the answers as far as they go: the steps taken, and the next question or the leaf.

    Raises AdviceError: an answer that its question does not know.
    """
    steps: list[Step] = []
    here: Question | Leaf = TREE
    while isinstance(here, Question):
        answer = getattr(answers, here.key)
        if answer is None:
            break
        choice = here.choose(answer)
        steps.append(Step(here, choice))
        here = choice.then
    return tuple(steps), here


def advise(answers: Answers, shape: ModelShape | None = None, scale: str = "cpu") -> Advice:
    """The recommendation.

    Args:
        answers: one for each question on the way; ``context`` also sets the tokens of the cache.
        shape: the reader's model; a Llama 3 8B where none is given.
        scale: cpu or gpu, what the experiment shall fit.

    Raises:
        AdviceError: an answer is missing or unknown; the text has the question and its choices.
    """
    shape = shape or ModelShape()
    if answers.context is not None:
        shape = replace(shape, context=answers.context)
    steps, leaf = walk(answers)
    if isinstance(leaf, Question):
        raise leaf.refusal(None)
    lines = tuple(cache_lines(shape, leaf.cache)) if leaf.cache else ()
    experiment = trial_spec(leaf, shape, scale)
    return Advice(steps, leaf, shape, lines, length_row(shape.context), scale, experiment)


def leaves(start: Question = TREE) -> list[Leaf]:
    """Every recommendation that the tree can give, in its order."""
    found: list[Leaf] = []
    for choice in start.choices:
        found += leaves(choice.then) if isinstance(choice.then, Question) else [choice.then]
    return found


def parse_tokens(text: str) -> int:
    """``8192``, ``8k`` (8 x 1024) or ``1m`` as a number of tokens. Raises AdviceError."""
    match = re.fullmatch(r"([0-9]{1,9})\s*([kKmM]?)", text.strip())
    number = 0 if match is None else int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]
    if number < 1:
        raise AdviceError(f"context must be a number of tokens, such as 8192, 32k or 1m; got {text[:40]!r}")
    return number


def _part(part: Part) -> dict[str, Any]:
    return {
        "mechanism": part.mechanism,
        "title": part.title,
        "role": part.role,
        "parameters": dict(part.parameters),
        "instead_of": part.instead_of,
    }


def _avoid(avoid: Avoid) -> dict[str, str]:
    return {"mechanism": avoid.mechanism, "title": avoid.title, "why": avoid.why}
