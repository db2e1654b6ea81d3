"""Putting a mechanism into trained weights: what changes in each attention, and what kind of swap that is.

Exact swaps compute the same numbers another way. Approximate ones compute something else with the same
weights, so their loss has to be measured. Everything else is no swap and is refused with the reason.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnlab_kernels.catalog import MECHANISMS
from attnlab_kernels.masks import Mask, Window
from attnlab_kernels.operations.softmax.api import Unsupported, supports

UNFUSED = ("eager", "sdpa_math")
"""implementations that form the n x n matrix"""
FUSED = ("sdpa_flash", "triton", "sdpa_cudnn", "sdpa_efficient")
"""what flash may be on auto, best first"""


@dataclass(frozen=True)
class Swap:
    """One mechanism as a change of the keys, the values and the mask of softmax attention."""

    mechanism: str = "multi_head"
    implementation: str = "auto"
    window_size: int | None = None
    """a query sees this many keys, its own included (in a model that looks ahead: as many after it)"""
    num_kv_heads: int | None = None
    """mean-pool the model's key and value heads to this many"""

    def mask(self, mask: Mask) -> Mask:
        """Return the model's own mask narrowed to the window."""
        if self.window_size is None:
            return mask
        before = self.window_size - 1
        ahead = 0 if mask.band().right == 0 else before
        return mask & Window(before, ahead)

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hkv, S, D] with neighbouring heads averaged (Ainslie et al. 2023, GQA).

        Raises:
            Unsupported: the model's heads cannot be pooled to that number.
        """
        heads = key.shape[1]
        if self.num_kv_heads in (None, heads):
            return key, value
        assert self.num_kv_heads is not None
        if heads % self.num_kv_heads:
            raise Unsupported(
                f"num_kv_heads: must divide the model's {heads} key and value heads, got {self.num_kv_heads}"
            )
        return _pooled(key, self.num_kv_heads), _pooled(value, self.num_kv_heads)

    def chosen(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> str:
        """Return the implementation to ask for: flash on auto takes the first fused one that runs the call.

        Raises:
            Unsupported: no fused implementation runs it.
        """
        if self.mechanism != "flash" or self.implementation != "auto":
            return self.implementation
        refused = []
        for name in FUSED:
            support = supports(name, query, key, value, mask=mask)
            if support:
                return name
            refused.append(f"{name}: {support.reason}")
        raise Unsupported(f"flash: no fused implementation runs this call ({'; '.join(refused)})")

    def kind(self, tokens: int, kv_heads: int) -> str:
        """Return ``exact`` or ``approximate`` for a model with that many key heads on that many tokens."""
        narrowed = self.window_size is not None and self.window_size < tokens
        pooled = self.num_kv_heads is not None and self.num_kv_heads < kv_heads
        return "approximate" if narrowed or pooled else "exact"

    @property
    def exact(self) -> "Swap":
        """The same implementation without the approximation: what the loss is measured against."""
        return Swap("multi_head", self.implementation)


def plan_swap(mechanism: str, parameters: dict[str, Any], implementation: str) -> Swap:
    """Return what a mechanism means inside a model.

    Raises:
        Unsupported: the mechanism cannot go into trained weights, or the implementation contradicts it.
    """
    known = MECHANISMS[mechanism]
    if known.swap == "not_applicable":
        raise Unsupported(f"{mechanism}: cannot be put into trained weights: {known.swap_note}")
    if mechanism == "flash" and implementation in UNFUSED:
        raise Unsupported(f"flash: is fused, and {implementation} forms the n x n matrix")
    match mechanism:
        case "sliding_window" | "grouped_query":
            window, kv_heads = parameters.get("window_size"), parameters.get("num_kv_heads")
            return Swap(mechanism, implementation, window, kv_heads)
        case "multi_head" | "flash":
            return Swap(mechanism, implementation)
    raise Unsupported(f"{mechanism}: cannot be put into a model yet")


def _pooled(tensor: Tensor, heads: int) -> Tensor:
    batch, present, tokens, size = tensor.shape
    return tensor.reshape(batch, heads, present // heads, tokens, size).mean(dim=2)
