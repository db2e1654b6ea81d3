"""Keys and values of a context: computed once, read by every decoding step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from attnlab_kernels.caches import CacheError, ContiguousKV, KVView


class CrossKV(ContiguousKV):
    """A cache that is filled once a layer and then only read.

    Its length is that of the context and does not grow with the tokens that are decoded.
    """

    @classmethod
    def from_tuple(cls, pair: tuple[Tensor, Tensor], layer: int = 0) -> CrossKV:
        """A cache that holds a legacy ``(key, value)`` pair."""
        cache = cls()
        cache.update(layer, *pair)
        return cache

    def update(self, layer: int, key: Tensor, value: Tensor, positions: Tensor | None = None) -> KVView:
        if self.holds(layer):
            raise CacheError(
                f"layer {layer} of a cross-attention cache is filled once; it holds {self.length(layer)} context tokens"
            )
        return super().update(layer, key, value, positions)

    def crop(self, length: int) -> None:
        raise CacheError(f"the context of a cross-attention cache cannot be cut; got length {length}")

    def holds(self, layer: int) -> bool:
        """Whether this layer's context is in the cache (it may have no tokens)."""
        return layer in self._layers

    def view(self, layer: int) -> KVView:
        """Keys ``[B, Hkv, m, D]``, values and positions of this layer's context."""
        if not self.holds(layer):
            held = ", ".join(map(str, self.layers())) or "none"
            raise CacheError(f"layer must be one that holds a context ({held}); got {layer}")
        return self._view(self._layers[layer])

    def layers(self) -> Iterator[int]:
        """Layers that hold their context."""
        return iter(sorted(self._layers))
