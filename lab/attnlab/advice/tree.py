"""The shape of the decision tree: questions, choices, leaves. What it says is in the modules beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnlab_kernels.catalog import MECHANISMS


class AdviceError(ValueError):
    """An answer that the tree does not know; the text names the question, the rule, the value and the choices."""


@dataclass(frozen=True)
class Source:
    """A paper or model card that a reason rests on."""

    title: str
    url: str


@dataclass(frozen=True)
class Part:
    """One mechanism of a recommendation, and what it is there for."""

    mechanism: str
    role: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    instead_of: str | None = None
    """the mechanism that this one may replace; None: it belongs to the recommendation itself"""

    @property
    def title(self) -> str:
        return MECHANISMS[self.mechanism].title


@dataclass(frozen=True)
class Avoid:
    """A mechanism that looks right here and is not."""

    mechanism: str
    why: str

    @property
    def title(self) -> str:
        return MECHANISMS[self.mechanism].title


@dataclass(frozen=True)
class Trial:
    """The experiment that would test a recommendation.

    Attributes:
        asks: the question that its runs answer.
        mechanisms: entries of ``vary.mechanism``; the baseline comes first.
        phase: prefill, decode or train.
        causal: no query sees a later key.
        lengths: sequence lengths on a CPU; on a GPU the reader's own context takes their place.
        batch_sizes: sequences at once.
        fixed: the lengths mean something (patches, frames), so a GPU keeps them.
    """

    asks: str
    mechanisms: tuple[str | dict[str, dict[str, Any]], ...]
    phase: str = "prefill"
    causal: bool = True
    lengths: tuple[int, ...] = (256, 1024)
    batch_sizes: tuple[int, ...] = (1,)
    fixed: bool = False


@dataclass(frozen=True)
class Leaf:
    """A recommendation.

    Attributes:
        parts: mechanisms in order of weight; those with ``instead_of`` are alternatives.
        reason: why, in plain words.
        sources: what the reason rests on, beside the papers of the parts.
        avoid: what not to use, and why.
        correction: what is often said of this case and is wrong or not general.
        cache: the mechanism whose formula gives the key-value cache; None where nothing is cached.
        trial: the experiment that would test it.
    """

    key: str
    parts: tuple[Part, ...]
    reason: str
    trial: Trial
    sources: tuple[Source, ...] = ()
    avoid: tuple[Avoid, ...] = ()
    correction: str = ""
    cache: str | None = None

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The recommendation itself, without its alternatives."""
        return tuple(part.mechanism for part in self.parts if part.instead_of is None)

    @property
    def alternatives(self) -> tuple[str, ...]:
        return tuple(part.mechanism for part in self.parts if part.instead_of is not None)


@dataclass(frozen=True)
class Choice:
    """One answer; ``up_to`` (inclusive) bounds an answer that is a number of tokens."""

    value: str
    label: str
    why: str
    then: Question | Leaf
    up_to: int | None = None


@dataclass(frozen=True)
class Question:
    """A question; ``key`` names the field of ``Answers`` that answers it."""

    key: str
    text: str
    choices: tuple[Choice, ...]

    @property
    def is_number(self) -> bool:
        return any(choice.up_to is not None for choice in self.choices)

    def choose(self, answer: str | int | None) -> Choice:
        """The choice for an answer. Raises AdviceError."""
        if self.is_number:
            return self._bracket(answer)
        for choice in self.choices:
            if choice.value == answer:
                return choice
        raise self.refusal(answer)

    def refusal(self, answer: str | int | None) -> AdviceError:
        """What is wrong with an answer that this question does not know."""
        given = "nothing" if answer is None else repr(answer)
        if self.is_number:
            return AdviceError(f"{self.key} must be a whole number of tokens, at least 1; got {given}")
        values = ", ".join(choice.value for choice in self.choices)
        return AdviceError(
            f"{self.key} must be one of {values} ({self.text.rstrip('?').lower()}); got {given}"
        )

    def _bracket(self, answer: str | int | None) -> Choice:
        if isinstance(answer, bool) or not isinstance(answer, int) or answer < 1:
            raise self.refusal(answer)
        return next(choice for choice in self.choices if choice.up_to is None or answer <= choice.up_to)
