"""Which tokens run next: decoding steps first, so that a long prompt stalls nobody.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
https://arxiv.org/abs/2403.02310.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Work(NamedTuple):
    """Positions ``start..start + tokens`` of a sequence, to run in one batch."""

    seq_id: Hashable
    kind: Literal["decode", "prefill"]
    start: int
    tokens: int


@dataclass
class _Sequence:
    prompt: int
    total: int
    done: int = 0


class ChunkedPrefillScheduler:
    """Fills batches of a token budget: decodes (one token each), then prompts that have begun, then new prompts.

    A batch that was handed out counts as run. A sequence leaves after its last token. No more sequences are begun than
    one batch can decode, so every decoding sequence advances in every batch.

    Args:
        chunk_size: most prompt tokens of one sequence in a batch.
        max_batch_tokens: budget of a batch.
        max_batch_sequences: most sequences that run at a time.
    """

    def __init__(
        self, chunk_size: int = 512, max_batch_tokens: int = 8192, max_batch_sequences: int = 32
    ) -> None:
        for name, value in (
            ("chunk_size", chunk_size),
            ("max_batch_tokens", max_batch_tokens),
            ("max_batch_sequences", max_batch_sequences),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.chunk_size, self.max_batch_tokens = chunk_size, max_batch_tokens
        self.max_batch_sequences = max_batch_sequences
        self._waiting: dict[Hashable, _Sequence] = {}
        self._running: dict[Hashable, _Sequence] = {}

    def add_sequence(self, seq_id: Hashable, prompt_tokens: int, new_tokens: int = 0) -> None:
        """Queue a prompt, to be followed by ``new_tokens`` decoding steps (the last prompt token gives the first).

        Raises:
            ValueError: the id is known already, or a count that cannot be.
        """
        if seq_id in self._waiting or seq_id in self._running:
            raise ValueError(f"seq_id must be new; {seq_id!r} has not finished")
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens must be at least 1; got {prompt_tokens}")
        if new_tokens < 0:
            raise ValueError(f"new_tokens must be at least 0; got {new_tokens}")
        self._waiting[seq_id] = _Sequence(prompt_tokens, prompt_tokens + new_tokens)

    def finish(self, seq_id: Hashable) -> None:
        """End a sequence before its last token (it gave a stop token, or nobody waits for it)."""
        if self._running.pop(seq_id, None) is None and self._waiting.pop(seq_id, None) is None:
            raise ValueError(f"seq_id must be a sequence that waits or runs; got {seq_id!r}")

    def has_pending(self) -> bool:
        """Whether any sequence has tokens left."""
        return bool(self._waiting or self._running)

    def get_next_batch(self) -> list[Work]:
        """The next batch, decodes first; empty when nothing is left."""
        batch: list[Work] = []
        budget = self.max_batch_tokens
        decoding = [(name, held) for name, held in self._running.items() if held.done >= held.prompt]
        filling = [(name, held) for name, held in self._running.items() if held.done < held.prompt]
        for seq_id, held in decoding:
            batch.append(Work(seq_id, "decode", held.done, 1))
            budget -= 1
        for seq_id, held in filling:
            budget -= self._fill(batch, seq_id, held, budget)
        # what runs has had a token by now, so there are never more decodes than the budget has tokens
        while budget > 0 and self._waiting and len(self._running) < self.max_batch_sequences:
            seq_id = next(iter(self._waiting))
            held = self._running[seq_id] = self._waiting.pop(seq_id)
            budget -= self._fill(batch, seq_id, held, budget)
        for work in batch:
            held = self._running[work.seq_id]
            held.done += work.tokens
            if held.done >= held.total:
                del self._running[work.seq_id]
        return batch

    def _fill(self, batch: list[Work], seq_id: Hashable, held: _Sequence, budget: int) -> int:
        count = min(self.chunk_size, held.prompt - held.done, budget)
        if count:
            batch.append(Work(seq_id, "prefill", held.done, count))
        return count
