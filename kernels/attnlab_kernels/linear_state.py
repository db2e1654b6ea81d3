"""The cache of linear attention: sums over the tokens so far, of a size that does not grow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from attnlab_kernels.caches import CacheError
from attnlab_kernels.operations.linear.reference import LinearSums


@dataclass(frozen=True, eq=False)
class _Held:
    sums: LinearSums
    length: int
    seen: tuple[tuple[Tensor, Tensor], ...] | None = None
    """features and values of all tokens, a piece a step; None where some were not kept"""


class LinearState:
    """For each layer the state ``[B, H, f, Dv]`` and the normaliser ``[B, H, f]``, float32 (float64 for float64).

    Unpacks as ``state, normaliser`` of its first layer. A sum cannot forget, so it cannot be cropped.

    Args:
        keep_keys: also keep every key's features and value, which attention never reads and a map needs; they are not
            part of ``nbytes``.
    """

    def __init__(self, *, keep_keys: bool = False) -> None:
        self.keep_keys = keep_keys
        self._layers: dict[int, _Held] = {}

    @classmethod
    def from_tuple(cls, pair: tuple[Tensor, Tensor], layer: int = 0) -> LinearState:
        """A cache that holds a legacy ``(state, normaliser)`` pair; the number of its tokens is not known (0)."""
        state, normaliser = pair
        if state.dim() != 4 or normaliser.shape != state.shape[:3]:
            raise CacheError(
                "past_key_value must be a state [B, H, f, Dv] and a normaliser [B, H, f]; "
                f"got {tuple(state.shape)} and {tuple(normaliser.shape)}"
            )
        cache = cls()
        cache.replace(layer, LinearSums(state, normaliser), 0)
        return cache

    def sums(self, layer: int = 0) -> LinearSums | None:
        """The sums of a layer, or None before its first token."""
        return self._layers[layer].sums if layer in self._layers else None

    def replace(
        self, layer: int, sums: LinearSums, tokens: int, *, seen: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Put the sums that now include ``tokens`` more; ``seen``: their features and values, see ``keep_keys``."""
        before = self._layers[layer].seen if layer in self._layers else ()
        pieces = None
        if self.keep_keys and seen is not None and before is not None:
            pieces = (*before, seen)
        self._layers[layer] = _Held(sums, self.length(layer) + tokens, pieces)

    def seen(self, layer: int = 0) -> tuple[Tensor, Tensor] | None:
        """Features ``[B, H, m, f]`` and values ``[B, H, m, Dv]`` of all tokens, or None where not all were kept."""
        held = self._layers.get(layer)
        if held is None or held.seen is None:
            return None
        keys, values = zip(*held.seen, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def length(self, layer: int = 0) -> int:
        """Tokens that have passed this layer."""
        return self._layers[layer].length if layer in self._layers else 0

    @property
    def seq_len(self) -> int:
        """Tokens that have passed the first layer."""
        return self.length(min(self._layers)) if self._layers else 0

    def nbytes(self) -> int:
        """Bytes of the numbers that are kept, all layers: ``4 L H (f Dv + f)`` for each sequence in float32."""
        return sum(tensor.nbytes for held in self._layers.values() for tensor in held.sums)

    def crop(self, length: int) -> None:
        """Only to the length that it has."""
        for layer, held in self._layers.items():
            if length != held.length:
                raise CacheError(
                    f"length must stay {held.length} in layer {layer}: sums over tokens cannot forget; got {length}"
                )

    def reorder(self, index: Tensor) -> None:
        """Make batch element i what batch element ``index[i]`` was."""
        for layer, held in self._layers.items():
            sums = LinearSums(*(tensor.index_select(0, index) for tensor in held.sums))
            seen = held.seen and tuple(
                (key.index_select(0, index), value.index_select(0, index)) for key, value in held.seen
            )
            self._layers[layer] = _Held(sums, held.length, seen)

    def clone(self) -> Self:
        """An independent copy (sums are replaced, never written into)."""
        other = copy.copy(self)
        other._layers = dict(self._layers)
        return other

    def __iter__(self) -> Iterator[Tensor]:
        if not self._layers:
            raise CacheError("cache is empty: it has no state to unpack")
        return iter(self._layers[min(self._layers)].sums)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return tuple(self)[index]
