"""What is wrong with a spec: all of it at once, in the same words for page, API and command line."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

SHOWN_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One broken rule: which argument, what the rule is, what was given, and what would have been right."""

    argument: str
    rule: str
    value: str = ""
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.argument}: {self.rule}"
        if self.value:
            text += f", got {self.value}"
        if near := self.suggestion:
            text += f" (did you mean {near!r}?)"
        if self.choices:
            text += f"; choices: {', '.join(self.choices)}"
        return text

    @property
    def suggestion(self) -> str | None:
        """The choice that the value was probably meant to be, if one is near."""
        near = difflib.get_close_matches(self.value.strip("'\"").lower(), self.choices, n=1, cutoff=0.6)
        return near[0] if near else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "argument": self.argument,
            "rule": self.rule,
            "value": self.value,
            "choices": list(self.choices),
            "suggestion": self.suggestion,
        }


class SpecError(ValueError):
    """A spec that cannot be run; ``problems`` holds everything that is wrong with it."""

    def __init__(self, problems: Collection[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def shown(value: Any) -> str:
    """Return a value as text short enough for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[: SHOWN_VALUE - 1]}…"
