"""The cache of latent attention: one latent and one rotary key a token, whatever the number of heads.

DeepSeek-AI, "DeepSeek-V2", https://arxiv.org/abs/2405.04434: L (r + d_rope) b bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from attnlab_kernels.caches import CacheError, ContiguousKV


class LatentKV(ContiguousKV):
    """Latents (after their norm) and rotary keys (after rotation), in order.

    ``update`` takes and gives them as the cache protocol has it, with one head: ``[B, 1, n, r]`` and
    ``[B, 1, n, dr]``. Unpacking gives the pair that older code passes around: ``[B, m, r]`` and ``[B, m, dr]``.
    """

    @classmethod
    def from_tuple(cls, pair: tuple[Tensor, Tensor], layer: int = 0) -> LatentKV:
        """A cache that holds a legacy pair ``[B, m, r]``, ``[B, m, dr]``."""
        for name, tensor in zip(("latent", "rotary key"), pair, strict=True):
            if tensor.dim() != 3:
                raise CacheError(f"{name} must be [batch, tokens, width]; got {list(tensor.shape)}")
        cache = cls()
        cache.update(layer, pair[0][:, None], pair[1][:, None])
        return cache

    def __iter__(self) -> Iterator[Tensor]:
        return iter([tensor[:, 0] for tensor in super().__iter__()])
