"""What a catalog record is, how its parameters are checked, and how many bytes each kind of cache takes. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Swap = Literal["exact", "approximate", "not_applicable"]


class CatalogError(ValueError):
    """An unknown mechanism or a parameter outside its range; the text names it, the rule, the value, the choices."""


@dataclass(frozen=True)
class Parameter:
    """One setting of a mechanism. A default of ``None`` means that it may be left to the mechanism."""

    name: str
    kind: Literal["int", "float", "choice", "bool"]
    default: int | float | str | bool | None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    help: str = ""
    used_with: tuple[str, tuple[str | int | bool, ...]] | None = None
    """another parameter and its values under which this one has an effect; None: always"""

    def check(self, mechanism: str, value: Any) -> int | float | str | bool | None:
        """The value in its own type, or CatalogError."""
        if value is None and self.default is None:
            return None
        if self.kind == "choice":
            if value in self.choices:
                return value
            raise self._refusal(mechanism, f"be one of {', '.join(self.choices)}", value)
        if self.kind == "bool":
            if isinstance(value, bool):
                return value
            raise self._refusal(mechanism, "be true or false", value)
        return self._number(mechanism, value)

    def _number(self, mechanism: str, value: Any) -> int | float:
        whole = self.kind == "int"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refusal(mechanism, "be a whole number" if whole else "be a number", value)
        if whole and value != int(value):
            raise self._refusal(mechanism, "be a whole number", value)
        if self.minimum is not None and value < self.minimum:
            raise self._refusal(mechanism, f"be at least {self.minimum:g}", value)
        if self.maximum is not None and value > self.maximum:
            raise self._refusal(mechanism, f"be at most {self.maximum:g}", value)
        return int(value) if whole else float(value)

    def _refusal(self, mechanism: str, rule: str, value: Any) -> CatalogError:
        return CatalogError(f"{self.name} of {mechanism} must {rule}; got {value!r}")


@dataclass(frozen=True)
class CacheShape:
    """What a cache's size follows from."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    layers: int
    element: int
    """bytes of one number"""


@dataclass(frozen=True)
class Mechanism:
    """One mechanism of the catalog."""

    id: str
    title: str
    class_name: str
    summary: str
    formula: str
    complexity: str
    """time and extra memory of a forward over n queries and keys"""
    year: int
    paper_title: str
    paper_url: str
    use_cases: tuple[str, ...]
    not_for: str
    parameters: tuple[Parameter, ...]
    operation: str | None
    swap: Swap
    swap_note: str
    snippet: str
    cache: Callable[[CacheShape, Mapping[str, Any]], int]
    cache_formula: str
    """``cache`` in words"""

    def cache_bytes(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        layers: int,
        bytes_per_element: int,
        **parameters: Any,
    ) -> int:
        """Bytes of the cache of one sequence of ``tokens``, all layers together."""
        shape = CacheShape(heads, kv_heads, head_dim, tokens, layers, bytes_per_element)
        return self.cache(shape, self.validate(parameters))

    def validate(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, defaults filled in; CatalogError for an unknown one or a value out of range."""
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in parameters:
            if name not in known:
                choices = ", ".join(known) or "none: it has no parameters"
                raise CatalogError(f"{name} is not a parameter of {self.id}; choices are {choices}")
        return {
            name: parameter.check(self.id, parameters.get(name, parameter.default))
            for name, parameter in known.items()
        }

    def in_use(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``parameters``, all of them given, that have an effect under the chosen variant."""
        rules = {parameter.name: parameter.used_with for parameter in self.parameters}

        def is_used(name: str) -> bool:
            rule = rules.get(name)
            return rule is None or (parameters[rule[0]] in rule[1] and is_used(rule[0]))

        return {name: value for name, value in parameters.items() if is_used(name)}


def every_head(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """Keys and values of every head: 2 L H d b for each token."""
    return 2 * shape.layers * shape.heads * shape.head_dim * shape.element * shape.tokens


def key_heads(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """Keys and values of the key heads: 2 L Hkv d b for each token."""
    kv_heads = parameters.get("num_kv_heads") or shape.kv_heads
    return 2 * shape.layers * kv_heads * shape.head_dim * shape.element * shape.tokens


def window(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """As ``key_heads``, for the last ``window_size`` tokens."""
    size = parameters["window_size"]
    return key_heads(shape, parameters) * min(shape.tokens, size) // max(1, shape.tokens)


def local_window(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """Everything, except that a purely local pattern forgets what its window has passed."""
    if parameters["sparsity_pattern"] != "local":
        return key_heads(shape, parameters)
    tokens = min(shape.tokens, parameters["local_window"])
    return key_heads(shape, parameters) * tokens // max(1, shape.tokens)


def latent(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """One latent and one rotary key for each token, whatever the number of heads: L (r + dr) b."""
    width = parameters["kv_lora_rank"] + parameters["qk_rope_head_dim"]
    return shape.layers * width * shape.element * shape.tokens


def pages(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """Whole blocks of ``block_size`` tokens and a table of 4 bytes a block."""
    size = parameters["block_size"]
    blocks = -(-shape.tokens // size)
    kv_heads = parameters.get("num_kv_heads") or shape.kv_heads
    return blocks * size * 2 * shape.layers * kv_heads * shape.head_dim * shape.element + 4 * blocks


def shard(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """What one of ``ring_size`` ranks holds."""
    return -(-key_heads(shape, parameters) // (parameters["ring_size"] or 1))


def pairs(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """Two keys of d and one value of 2 d a head: 4 L H d b for each token; v2 has one of each: 2 L H d b."""
    heads = parameters["num_kv_heads"] or shape.heads
    twice = 2 if parameters["variant"] == "v1" else 1
    return twice * 2 * shape.layers * heads * shape.head_dim * shape.element * shape.tokens


def state(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """One float32 state of f x d and one normaliser of f a head, whatever the number of tokens; Linformer has none."""
    if parameters["variant"] == "linformer":
        return 0
    features = parameters["num_features"] or shape.head_dim
    if parameters["feature_map"] == "softmax_kernel" and not parameters["num_features"]:
        features = int(shape.head_dim * math.log(shape.head_dim))
    return 4 * shape.layers * shape.heads * (features * shape.head_dim + features)


def nothing(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """Not autoregressive: there is no cache."""
    return 0


def exact_only(shape: CacheShape, parameters: Mapping[str, Any]) -> int:
    """As ``every_head`` for the exact variant; the others are not autoregressive."""
    return every_head(shape, parameters) if parameters["variant"] == "memory_efficient" else 0
