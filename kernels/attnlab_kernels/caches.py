"""Keys and values of the tokens so far, for one or many layers.

Keys are kept after position encoding. A cache unpacks as ``key, value`` of its first layer, the tuple that older
code passes around.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor


class CacheError(ValueError):
    """A cache that cannot do what is asked; the text names the argument, the rule and the value."""


class KVView(NamedTuple):
    """What a step attends to: keys ``[B, Hkv, m, D]``, values ``[B, Hkv, m, Dv]``, absolute positions ``[m]``."""

    key: Tensor
    value: Tensor
    positions: Tensor


class Cache(Protocol):
    """What a module needs of a cache. Updating changes it in place."""

    def update(self, layer: int, key: Tensor, value: Tensor, positions: Tensor | None = None) -> KVView:
        """Add tokens ``[B, Hkv, n, D]`` and return everything that they may attend to."""
        ...

    def length(self, layer: int = 0) -> int:
        """Tokens that have passed this layer, kept or not."""
        ...

    @property
    def seq_len(self) -> int:
        """Tokens that have passed the first layer."""
        ...

    def nbytes(self) -> int:
        """Bytes of the numbers that are kept, all layers."""
        ...

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Make batch element i what batch element ``index[i]`` was."""
        ...

    def clone(self) -> Self:
        """An independent copy."""
        ...


@dataclass
class _Layer:
    key: Tensor
    value: Tensor
    positions: Tensor
    length: int
    owned: bool = False
    """the buffers are ours to write into, not the caller's tensors"""


class _KeyValueCache(ABC):
    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    @property
    def seq_len(self) -> int:
        return self.length(min(self._layers)) if self._layers else 0

    def length(self, layer: int = 0) -> int:
        return self._layers[layer].length if layer in self._layers else 0

    def nbytes(self) -> int:
        return sum(
            tensor[:, :, : self._kept(held.length)].nbytes
            for held in self._layers.values()
            for tensor in (held.key, held.value)
        )

    def reorder(self, index: Tensor) -> None:
        for held in self._layers.values():
            held.key, held.value = held.key.index_select(0, index), held.value.index_select(0, index)

    def clone(self) -> Self:
        other = copy.copy(self)
        other._layers = {
            layer: _Layer(held.key.clone(), held.value.clone(), held.positions.clone(), held.length, True)
            for layer, held in self._layers.items()
        }
        return other

    def __iter__(self) -> Iterator[Tensor]:
        if not self._layers:
            raise CacheError("cache is empty: it has no key and value to unpack")
        view = self._view(self._layers[min(self._layers)])
        return iter((view.key, view.value))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return tuple(self)[index]

    @abstractmethod
    def _view(self, held: _Layer) -> KVView: ...

    @abstractmethod
    def _kept(self, length: int) -> int: ...

    def _checked(self, layer: int, key: Tensor, value: Tensor) -> _Layer | None:
        held = self._layers.get(layer)
        if key.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise CacheError(
                f"key and value must be [B, Hkv, n, D]; got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if held is not None and held.key.shape[:2] != key.shape[:2]:
            raise CacheError(
                f"past_key_value holds batch and heads {tuple(held.key.shape[:2])}; the new keys have "
                f"{tuple(key.shape[:2])}"
            )
        return held

    def _crop_to(self, length: int) -> None:
        for held in self._layers.values():
            if not 0 <= length <= held.length:
                raise CacheError(
                    f"length must be between 0 and the {held.length} tokens in the cache; got {length}"
                )


class ContiguousKV(_KeyValueCache):
    """All tokens, in order. Buffers double when they are full, so a decoding step does not copy the past."""

    @classmethod
    def from_tuple(cls, pair: tuple[Tensor, Tensor], layer: int = 0) -> ContiguousKV:
        """A cache that holds a legacy ``(key, value)`` pair."""
        cache = cls()
        cache.update(layer, *pair)
        return cache

    def update(self, layer: int, key: Tensor, value: Tensor, positions: Tensor | None = None) -> KVView:
        held = self._checked(layer, key, value)
        before = held.length if held else 0
        if positions is None:
            positions = torch.arange(before, before + key.shape[2], device=key.device)
        if held is None:
            held = self._layers[layer] = _Layer(key, value, positions, key.shape[2])
        else:
            held.key = _append(held.key, key, before, held.owned)
            held.value = _append(held.value, value, before, held.owned)
            held.owned = True
            held.positions = torch.cat((held.positions[:before], positions))
            held.length = before + key.shape[2]
        return self._view(held)

    def crop(self, length: int) -> None:
        self._crop_to(length)
        for held in self._layers.values():
            held.length = length
            held.positions = held.positions[:length]

    def _view(self, held: _Layer) -> KVView:
        return KVView(held.key[:, :, : held.length], held.value[:, :, : held.length], held.positions)

    def _kept(self, length: int) -> int:
        return length


class RollingKV(_KeyValueCache):
    """The last ``window`` tokens: position p lives in slot ``p % window``, and positions travel with the keys.

    A step attends to the ``window - 1`` tokens before it and its own, also where a chunk is longer than the window.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise CacheError(f"window must be at least 1 token; got {window}")
        super().__init__()
        self.window = window

    def update(self, layer: int, key: Tensor, value: Tensor, positions: Tensor | None = None) -> KVView:
        held = self._checked(layer, key, value)
        count = key.shape[2]
        if held is None:
            slots = (*key.shape[:2], self.window)
            empty = torch.zeros(self.window, dtype=torch.long, device=key.device)
            held = _Layer(
                key.new_zeros(*slots, key.shape[3]), value.new_zeros(*slots, value.shape[3]), empty, 0
            )
            self._layers[layer] = held
        if positions is None:
            positions = torch.arange(held.length, held.length + count, device=key.device)
        past = self._view(held, self.window - 1)
        view = KVView(
            torch.cat((past.key, key), dim=2),
            torch.cat((past.value, value), dim=2),
            torch.cat((past.positions, positions)),
        )
        kept = min(count, self.window)
        slots = torch.arange(held.length + count - kept, held.length + count, device=key.device) % self.window
        held.key = held.key.index_copy(2, slots, key[:, :, count - kept :])
        held.value = held.value.index_copy(2, slots, value[:, :, count - kept :])
        held.positions = held.positions.index_copy(0, slots, positions[count - kept :])
        held.length += count
        return view

    def crop(self, length: int) -> None:
        self._crop_to(length)
        for held in self._layers.values():
            needed = min(length, self.window - 1)
            if length - needed < held.length - self.window:
                raise CacheError(
                    f"length {length} needs tokens that a window of {self.window} has already dropped; "
                    f"the cache holds the last {self.window} of {held.length}"
                )
        for held in self._layers.values():
            held.length = length

    def _view(self, held: _Layer, limit: int | None = None) -> KVView:
        count = min(held.length, self.window if limit is None else limit)
        slots = torch.arange(held.length - count, held.length, device=held.key.device) % self.window
        return KVView(held.key[:, :, slots], held.value[:, :, slots], held.positions[slots])

    def _kept(self, length: int) -> int:
        return min(length, self.window)


def _append(buffer: Tensor, new: Tensor, length: int, owned: bool) -> Tensor:
    """``buffer[:, :, :length]`` followed by ``new``, in place where the buffer is ours and has room."""
    needed = length + new.shape[2]
    if torch.is_grad_enabled() and (buffer.requires_grad or new.requires_grad):
        return torch.cat((buffer[:, :, :length], new), dim=2)
    if buffer.shape[2] < needed or not owned:
        grown = buffer.new_empty(*buffer.shape[:2], max(needed, 2 * length), buffer.shape[3])
        grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    buffer[:, :, length:needed] = new
    return buffer
