"""How each mechanism's module is called on synthetic hidden states: most alike, some with what only they need."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnlab_kernels.catalog_rules import image_sides
from attnlab_kernels.linear_state import LinearState
from attnlab_kernels.mechanisms.chunked_prefill import ChunkedPrefill
from attnlab_kernels.mechanisms.linear_attention import LinearAttention
from attnlab_kernels.mechanisms.paged import PagedAttention
from attnlab_kernels.mechanisms.sparse_attention import SparseAttention
from attnlab_kernels.operations.neighborhood import api as neighborhood
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.sparse import api as sparse
from attnlab_kernels.output import AttentionOutput

from ..swaps.softmax import only_auto


@dataclass
class ModuleCall:
    """One module and how it is run. Hidden states are ``[B, n, dim]``."""

    mechanism: str
    module: Any
    parameters: dict[str, Any]
    implementation: str
    training: bool
    context: Tensor | None = None
    """the other sequence, of cross-attention"""
    _open: Any = field(default=None, init=False)
    """pages that the last call filled"""

    def run(self, hidden: Tensor) -> AttentionOutput:
        """Attend over the whole sequence, as in a prompt."""
        self.close()
        keywords = _extra(self, hidden.shape[1])
        if isinstance(self.module, PagedAttention):
            if self.training:
                keywords["use_cache"] = False
            else:
                self._open = keywords["past_key_value"] = self.module.new_cache(hidden.shape[0])
        if isinstance(self.module, ChunkedPrefill):
            keywords["use_cache"] = False
        return self.module(hidden, return_dict=True, **keywords)

    def fill(self, hidden: Tensor, *, mapped: bool = False) -> Any:
        """Run a prompt and keep its cache, to be cloned before every step.

        Args:
            mapped: the map of a step is wanted, so that sums over keys also keep the keys.

        Raises:
            Unsupported: the mechanism keeps none.
        """
        reason = no_cache(self.mechanism, self.parameters)
        if reason:
            raise Unsupported(f"phase: {self.mechanism} cannot decode: {reason}")
        if isinstance(self.module, SparseAttention):
            _check_sparse(self.module, hidden.shape[1])
        keywords = _extra(self, hidden.shape[1])
        if isinstance(self.module, PagedAttention):
            keywords["past_key_value"] = self.module.new_cache(hidden.shape[0])
        if isinstance(self.module, LinearAttention):
            keywords["past_key_value"] = LinearState(keep_keys=mapped)
        return self.module(hidden, use_cache=True, return_dict=True, **keywords).cache

    def decode(self, token: Tensor, cache: Any) -> AttentionOutput:
        """Attend from one more token ``[B, 1, dim]``; the cache grows."""
        keywords = _extra(self, 1)
        if isinstance(self.module, ChunkedPrefill):
            self.module.cache = cache
            made = self.module.decode_step(token, return_dict=True, **keywords)
            self.module.cache = None
            return made
        return self.module(token, past_key_value=cache, use_cache=True, return_dict=True, **keywords)

    def close(self) -> None:
        """Give back the pages of the last call."""
        if self._open is not None:
            self._open.free()
            self._open = None


def release(cache: Any) -> None:
    """Give back what a cache holds outside of itself."""
    free = getattr(cache, "free", None)
    if free is not None:
        free()


def no_cache(mechanism: str, parameters: dict[str, Any]) -> str:
    """Why a mechanism has no cache to decode from, or nothing."""
    variant = parameters.get("variant")
    reasons = {
        "neighborhood": "it has no cache, as an image has no next token",
    }
    if mechanism == "ring" and parameters["ring_size"] > 1:
        return "one new token cannot be spread over the ranks"
    if mechanism == "linear" and variant == "linformer":
        return "a new token changes every slot"
    if mechanism == "efficient" and variant != "memory_efficient":
        return "a new token changes every key"
    return reasons.get(mechanism, "")


def _check_sparse(module: SparseAttention, prompt: int) -> None:
    """Raises Unsupported where a cached row would have to change with a later token."""
    if not module.causal:
        raise Unsupported(
            "phase: sparse cannot decode without a causal order: cached tokens would attend to later ones"
        )
    if module.sparsity_pattern == "longformer" and prompt < module.global_tokens:
        raise Unsupported(
            f"phase: sparse decodes after a prompt that holds all {module.global_tokens} global tokens, got {prompt}"
        )


def prompt_is_causal(mechanism: str, parameters: dict[str, Any], causal: bool) -> bool:
    """Whether no query sees a later key; some mechanisms have no such form, and for some there is no other.

    Raises:
        Unsupported: it exists only causally, and that was not asked for.
    """
    if mechanism in ("paged", "chunked_prefill") and not causal:
        raise Unsupported(f"module.causal: {mechanism} exists only for causal attention; got false")
    if mechanism == "efficient":
        return causal and parameters["variant"] == "memory_efficient"
    if mechanism == "linear":
        return causal and parameters["variant"] != "linformer"
    return causal and mechanism != "cross"


def grid(tokens: int, parameters: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the image that so many tokens form.

    Raises:
        Unsupported: none of that height, or none whose sides are multiples of ``reduction``.
    """
    multiple, wanted = parameters.get("reduction", 1), parameters["grid_height"]
    sides = image_sides(tokens, wanted, multiple)
    if sides is not None:
        return sides
    asked = "height x width" if wanted is None else f"{wanted} x width"
    raise Unsupported(
        f"sequence_length: must be {asked} of an image whose sides are multiples of {multiple}; got {tokens}"
    )


def make_context(parameters: dict[str, Any], dim: int, batch: int, tokens: int) -> Tensor:
    """The synthetic second sequence that cross-attention reads."""
    length = parameters["context_length"] or tokens
    return torch.randn(batch, length, parameters["context_dim"] or dim)


def _extra(call: ModuleCall, tokens: int) -> dict[str, Any]:
    """What this mechanism's forward takes besides hidden states and a cache."""
    made = _EXTRAS.get(call.mechanism)
    implementation = {"implementation": call.implementation}
    return implementation if made is None else made(call, tokens)


def _cross(call: ModuleCall, tokens: int) -> dict[str, Any]:
    return {"context": call.context, "implementation": call.implementation}


def _efficient(call: ModuleCall, tokens: int) -> dict[str, Any]:
    keywords: dict[str, Any] = {"implementation": call.implementation}
    if call.parameters["variant"] == "spatial_reduction":
        keywords["spatial_shape"] = grid(tokens, call.parameters)
    return keywords


def _neighborhood(call: ModuleCall, tokens: int) -> dict[str, Any]:
    only_auto("neighborhood", call.implementation, *neighborhood.IMPLEMENTATIONS)
    shape = grid(tokens, call.parameters) if call.parameters["dims"] == 2 else (tokens,)
    return {"implementation": call.implementation, "spatial_shape": shape}


def _ring(call: ModuleCall, tokens: int) -> dict[str, Any]:
    only_auto("ring", call.implementation, "ring")
    return {}


def _sparse(call: ModuleCall, tokens: int) -> dict[str, Any]:
    only_auto("sparse", call.implementation, *sparse.IMPLEMENTATIONS)
    return {"implementation": call.implementation}


_EXTRAS: dict[str, Callable[[ModuleCall, int], dict[str, Any]]] = {
    "cross": _cross,
    "efficient": _efficient,
    "neighborhood": _neighborhood,
    "ring": _ring,
    "sparse": _sparse,
}


def count_parameters(module: nn.Module) -> int:
    """Numbers that the module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
