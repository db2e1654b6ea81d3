"""Chunked prefill. Agrawal et al., "SARATHI", https://arxiv.org/abs/2308.16369; Sarathi-Serve: 2403.02310."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from attnlab_kernels.attention_call import announce, chained, composing
from attnlab_kernels.masks import Mask
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.position_bias import PositionBias


class ChunkedPrefill(nn.Module):
    """Runs a causal attention module over a prompt chunk after chunk, through its cache; the numbers stay the same.

    Returns ``(output, cache)`` with ``use_cache=True``, else the output.

    Args:
        chunk_size: prompt tokens of a chunk.
        attention_module: any causal module with the common ``forward`` and a cache.
        max_seq_len: longest sequence, decoded tokens included.
        overlap_chunks: tokens before each chunk that are computed once more; they replace themselves in the cache.
        use_gradient_checkpointing: while training keep no activation of a chunk, compute it again for its gradient.
    """

    def __init__(
        self,
        chunk_size: int = 512,
        attention_module: nn.Module | None = None,
        max_seq_len: int = 131072,
        overlap_chunks: int = 0,
        use_gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1; got {max_seq_len}")
        _check_chunk(chunk_size, overlap_chunks)
        self.chunk_size, self.max_seq_len, self.overlap_chunks = chunk_size, max_seq_len, overlap_chunks
        self.use_gradient_checkpointing = use_gradient_checkpointing
        self.cache: Any = None
        """the cache of the running sequence: set by ``prefill`` and ``forward`` with ``use_cache``"""
        self.attention_module: nn.Module | None = None
        if attention_module is not None:
            self.set_attention_module(attention_module)

    def set_attention_module(self, attention_module: nn.Module) -> None:
        """Wrap this module from now on; the running sequence ends."""
        if getattr(attention_module, "causal", True) is not True:
            raise ValueError(
                "attention_module must be causal: a bidirectional one would attend to chunks that have not come yet"
            )
        self.clear_cache()
        self.attention_module = attention_module

    def forward(
        self,
        hidden_states: Tensor,
        chunk_size: int | None = None,
        attention_mask: Mask | Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        causal: bool | None = True,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_bias: PositionBias | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        return_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Begin a new sequence with a prompt ``[B, n, dim]``.

        Args:
            chunk_size: overrides the module's.
            attention_mask: a ``Mask``, or a tensor of the whole prompt: ``[B, n]``, ``[n, n]``, ``[B, 1 | H, n, n]``.
            position_ids: ``[n]`` or ``[B, n]``, cut into chunks; position_embeddings and a position_bias likewise.
            use_cache: keep the cache for ``decode_step``.
            output_attentions: also give the map ``[B, H, n, n]``, the rows of all chunks.
            options: passed on to the wrapped module.

        Returns:
            ``AttentionOutput`` with ``return_dict=True``; its ``aux["chunks"]`` are the ``(start, stop)`` that ran and
            ``aux["steps"]`` what the wrapped module said of each.

        Raises:
            ValueError: no module, a size that does not fit, ``causal=False``, or what the wrapped module refuses.
        """
        module = self._module()
        if past_key_value is not None:
            raise ValueError(
                "past_key_value must be None: a prompt begins a sequence, decode_step goes on with it"
            )
        if causal is False:
            raise ValueError("causal must be True: a chunk cannot attend to chunks that have not come yet")
        size = self.chunk_size if chunk_size is None else chunk_size
        _check_chunk(size, self.overlap_chunks)
        if hidden_states.dim() != 3 or hidden_states.shape[1] == 0:
            raise ValueError(
                f"hidden_states must be [batch, at least 1 token, dim]; got {list(hidden_states.shape)}"
            )
        batch, count = hidden_states.shape[:2]
        self._check_length(count)
        self.clear_cache()
        new_cache = getattr(module, "new_cache", None)
        cache: Any = new_cache(batch) if new_cache else None
        chunks, results, parts = [], [], []
        try:
            for start in range(0, count, size):
                stop = min(start + size, count)
                first = max(0, start - self.overlap_chunks)
                if first < start:
                    cache.crop(first)
                call = options | {
                    "attention_mask": _cut_mask(attention_mask, first, stop, batch, count),
                    "position_ids": None if position_ids is None else position_ids[..., first:stop],
                    "position_embeddings": _cut_tables(position_embeddings, first, stop),
                    "position_bias": _cut_bias(position_bias, first, stop, count),
                    "output_attentions": output_attentions,
                }
                with composing() as told:
                    result = self._run(module, hidden_states[:, first:stop], cache, call)
                parts.extend(told)
                cache = result.cache
                chunks.append((start, stop))
                results.append(_last_rows(result, stop - start, stop, count))
        except BaseException:
            _release(cache)
            raise
        output = _join(results, chunks, cache if use_cache else None)
        whole = chained(parts) if parts and self.overlap_chunks == 0 else None
        if whole is not None:
            announce(whole.retold("chunked", chunks=[list(chunk) for chunk in chunks]))
        if use_cache:
            self.cache = cache
        else:
            _release(cache)
        if return_dict:
            return output
        return (output.output, output.cache) if use_cache else output.output

    def prefill(self, hidden_states: Tensor, **options: Any) -> Any:
        """``forward`` that keeps the cache: ``(output, cache)``."""
        return self(hidden_states, **(options | {"use_cache": True}))

    def decode_step(self, hidden_states: Tensor, *, return_dict: bool = False, **options: Any) -> Any:
        """One more token ``[B, 1, dim]`` of the running sequence: ``(output, cache)``.

        Raises:
            ValueError: no sequence is running, more than one token, or the sequence is as long as it may be.
        """
        if self.cache is None:
            raise ValueError("decode_step needs a running sequence: call prefill first")
        if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states must be [batch, 1, dim]; got {list(hidden_states.shape)}")
        self._check_length(self.cache.seq_len + 1)
        result = self._module()(
            hidden_states, past_key_value=self.cache, use_cache=True, return_dict=True, **options
        )
        self.cache = result.cache
        return result if return_dict else (result.output, result.cache)

    def clear_cache(self) -> None:
        """End the running sequence; blocks of a pool go back."""
        _release(self.cache)
        self.cache = None

    def get_cache_size(self) -> int:
        """Bytes of the running sequence's cache."""
        return 0 if self.cache is None else self.cache.nbytes()

    def _run(self, module: nn.Module, chunk: Tensor, cache: Any, call: dict[str, Any]) -> AttentionOutput:
        def run(part: Tensor, past: Any) -> AttentionOutput:
            return module(part, past_key_value=past, use_cache=True, return_dict=True, **call)

        if not (self.use_gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return run(chunk, cache)
        if hasattr(cache, "free"):
            raise ValueError(
                "use_gradient_checkpointing must be False with a pool of blocks: it keeps no gradient"
            )

        def again(part: Tensor) -> tuple[Tensor, AttentionOutput]:
            # a cache grows in place, so every run of this chunk gets the past in a copy of its own
            result = run(part, None if cache is None else cache.clone())
            return result.output, result

        pair: Any = checkpoint(again, chunk, use_reentrant=False)
        return pair[1]

    def _module(self) -> nn.Module:
        if self.attention_module is None:
            raise ValueError("attention_module must be set before a prompt can run; see set_attention_module")
        return self.attention_module

    def _check_length(self, count: int) -> None:
        if count > self.max_seq_len:
            raise ValueError(
                f"a sequence must have at most max_seq_len = {self.max_seq_len} tokens; got {count}"
            )


def _check_chunk(chunk_size: int, overlap: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token; got {chunk_size}")
    if not 0 <= overlap < chunk_size:
        raise ValueError(
            f"overlap_chunks must be at least 0 tokens and below chunk_size = {chunk_size}; got {overlap}"
        )


def _cut_mask(
    given: Mask | Tensor | None, start: int, stop: int, batch: int, count: int
) -> Mask | Tensor | None:
    """What a mask of the whole prompt says of queries ``start..stop`` and keys ``..stop``."""
    if not isinstance(given, Tensor):
        return given
    if given.shape[-1] != count:
        raise ValueError(f"attention_mask must end in the prompt's {count} tokens; got {list(given.shape)}")
    if given.dim() == 2 and given.shape[0] in (1, batch):
        return given[:, :stop]
    if given.dim() not in (2, 4) or given.shape[-2] not in (1, count):
        raise ValueError(
            f"attention_mask must be [{batch}, {count}], [{count}, {count}] or 4-dimensional; got {list(given.shape)}"
        )
    # with 4 dimensions nothing can be taken for a mask of keys
    wide = given[None, None] if given.dim() == 2 else given
    rows = wide if wide.shape[-2] == 1 else wide[..., start:stop, :]
    return rows[..., :stop]


def _cut_bias(given: PositionBias | None, start: int, stop: int, count: int) -> PositionBias | None:
    """A tensor's rows and columns of one chunk; a function of positions is asked anew by each."""
    if not isinstance(given, Tensor):
        return given
    if given.shape[-1] != count or (given.dim() > 1 and given.shape[-2] not in (1, count)):
        raise ValueError(f"position_bias must be of the prompt's {count} tokens; got {list(given.shape)}")
    rows = given[..., start:stop, :] if given.dim() > 1 and given.shape[-2] == count else given
    return rows[..., :stop]


def _cut_tables(tables: tuple[Tensor, Tensor] | None, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
    return None if tables is None else (tables[0][..., start:stop, :], tables[1][..., start:stop, :])


def _last_rows(result: AttentionOutput, count: int, stop: int, total: int) -> AttentionOutput:
    """The chunk's own rows; its map widened to every key of the prompt."""
    maps = result.attentions
    if maps is not None:
        # keys before the first column have left a window, keys after the last have not come yet
        maps = functional.pad(maps[..., -count:, :], (stop - maps.shape[-1], total - stop))
    lse = None if result.lse is None else result.lse[..., -count:]
    return AttentionOutput(result.output[:, -count:], maps, result.cache, lse, result.aux)


def _join(results: list[AttentionOutput], chunks: list[tuple[int, int]], cache: Any) -> AttentionOutput:
    maps = [result.attentions for result in results if result.attentions is not None]
    lses = [result.lse for result in results if result.lse is not None]
    return AttentionOutput(
        torch.cat([result.output for result in results], dim=1),
        torch.cat(maps, dim=2) if maps else None,
        cache,
        torch.cat(lses, dim=2) if lses else None,
        {"chunks": chunks, "steps": [result.aux for result in results]},
    )


def _release(cache: Any) -> None:
    free = getattr(cache, "free", None)
    if free is not None:
        free()
