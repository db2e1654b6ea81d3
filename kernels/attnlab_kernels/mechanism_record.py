"""What the catalog keeps of a mechanism, and the cache formulas that several mechanisms share. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Value = int | float | str | bool
CacheFormula = Callable[..., int]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One knob of a mechanism: its type, its range or choices, and a sentence for the page."""

    name: str
    kind: Literal["int", "float", "choice", "bool"]
    default: Value | None
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def rule(self) -> str:
        """What a value has to be, in words: ``a whole number from 1 to 64``."""
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}"
        if self.kind == "bool":
            return "true or false"
        number = "a whole number" if self.kind == "int" else "a number"
        low = "" if self.minimum is None else f" from {self.minimum:,}"
        high = "" if self.maximum is None else f" {'up ' if not low else ''}to {self.maximum:,}"
        return number + low + high

    def check(self, value: Any) -> Value | None:
        """Returns the value; ValueError with the rule if it breaks it."""
        if (value is None and self.default is None) or self._holds(value):
            return value
        raise ValueError(f"{self.name} must be {self.rule()}; got {value!r}")

    def _holds(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.choices
        if self.kind == "bool":
            return isinstance(value, bool)
        allowed = int if self.kind == "int" else int | float
        if isinstance(value, bool) or not isinstance(value, allowed):
            return False
        return (self.minimum is None or value >= self.minimum) and (
            self.maximum is None or value <= self.maximum
        )


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One attention mechanism: what pages, command line, advice and documents say of it comes from here.

    ``swap`` says what happens when it stands in for the attention of a trained model: the same numbers
    (``exact``), other numbers whose loss is measured (``approximate``), or nothing sensible without training
    (``not_applicable``). ``cache_bytes`` takes heads, kv_heads, head_dim, tokens, layers and
    bytes_per_element, and the mechanism's own parameters, and gives the bytes of one sequence's cache.
    """

    id: str
    title: str
    class_name: str
    summary: str
    formula: str
    complexity: str
    year: int
    paper_title: str
    paper_url: str
    use_cases: tuple[str, ...]
    not_for: str
    swap: Literal["exact", "approximate", "not_applicable"]
    swap_note: str
    snippet: str
    cache_bytes: CacheFormula
    operation: str | None = "softmax"
    parameters: tuple[Parameter, ...] = ()
    built: bool = False


def all_heads_cache(
    *, heads: int, head_dim: int, tokens: int, layers: int, bytes_per_element: int, **_: Any
) -> int:
    """Keys and values of every query head: ``2 L H d b`` a token."""
    return 2 * layers * heads * head_dim * bytes_per_element * tokens


def grouped_cache(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    layers: int,
    bytes_per_element: int,
    num_kv_heads: int | None = None,
    **_: Any,
) -> int:
    """Keys and values of the key-value heads only: ``2 L Hkv d b`` a token."""
    return 2 * layers * (num_kv_heads or kv_heads) * head_dim * bytes_per_element * tokens


def no_cache(**_: Any) -> int:
    """Encoders and vision keep no cache."""
    return 0
