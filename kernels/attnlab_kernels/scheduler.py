"""Which tokens run next: decoding steps first, so that a long prompt stalls nobody.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
https://arxiv.org/abs/2403.02310.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol


class Work(NamedTuple):
    """Positions ``start..start + tokens`` of a sequence, to run in one batch."""

    seq_id: Hashable
    kind: Literal["decode", "prefill"]
    start: int
    tokens: int


class Room(Protocol):
    """Where the tokens of running sequences are kept; the scheduler asks before it hands work out."""

    def admit(self, seq_id: Hashable, tokens: int) -> int | None:
        """Hold room for a prompt of so many tokens; how many of them are held already, None where there is no room."""
        ...

    def grow(self, seq_id: Hashable, tokens: int) -> bool:
        """Hold room for so many tokens in all; False, and no change, where there is none."""
        ...

    def release(self, seq_id: Hashable) -> None:
        """Give back all that a sequence holds."""
        ...


@dataclass
class _Sequence:
    prompt: int
    total: int
    done: int = 0


class ChunkedPrefillScheduler:
    """Fills batches of a token budget: decodes (one token each), then prompts that have begun, then new prompts.

    A batch that was handed out counts as run. A sequence leaves after its last token. No more sequences are begun than
    one batch can decode, so every decoding sequence advances in every batch.

    With a ``room`` prompts begin in the order they came, each once all of it fits. Where a decoding sequence needs more
    and nothing is left, the one that began last gives its room back and waits, first in the queue, to be computed
    again with what it has written (recomputation; Kwon et al. 2023, section 4.5).

    Args:
        chunk_size: most prompt tokens of one sequence in a batch.
        max_batch_tokens: budget of a batch.
        max_batch_sequences: most sequences that run at a time.
        room: where tokens are kept; None: there is always room. Whoever runs the batch releases what has ended.
    """

    def __init__(
        self,
        chunk_size: int = 512,
        max_batch_tokens: int = 8192,
        max_batch_sequences: int = 32,
        *,
        room: Room | None = None,
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
        self.room = room
        self.preempted: list[Hashable] = []
        """sequences that the last batch sent back to the queue"""
        self.starved = False
        """whether a prompt could not join the last batch for want of room"""
        self._waiting: dict[Hashable, _Sequence] = {}
        self._running: dict[Hashable, _Sequence] = {}

    @property
    def waiting(self) -> tuple[Hashable, ...]:
        """Sequences that hold no room, the next to begin first."""
        return tuple(self._waiting)

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
        self.preempted, self.starved = [], False
        batch = [Work(seq_id, "decode", self._running[seq_id].done, 1) for seq_id in self._decoding()]
        budget = self.max_batch_tokens - len(batch)
        for seq_id, held in self._running.items():
            if held.done < held.prompt:
                budget -= self._fill(batch, seq_id, held, budget)
        # what runs has had a token by now, so there are never more decodes than the budget has tokens
        while budget > 0 and self._waiting and len(self._running) < self.max_batch_sequences:
            seq_id = next(iter(self._waiting))
            self.starved = not self._begin(seq_id)
            if self.starved:
                break
            budget -= self._fill(batch, seq_id, self._running[seq_id], budget)
        for work in batch:
            held = self._running[work.seq_id]
            held.done += work.tokens
            if held.done >= held.total:
                del self._running[work.seq_id]
        return batch

    def _decoding(self) -> list[Hashable]:
        """The sequences that decode in this batch, each with room for one more token."""
        decoding: list[Hashable] = []
        for seq_id, held in list(self._running.items()):
            if held.done < held.prompt:
                continue
            while seq_id in self._running and not self._grow(seq_id, held.done + 1):
                self._preempt(next(reversed(self._running)))
            if seq_id in self._running:
                decoding.append(seq_id)
        return decoding

    def _grow(self, seq_id: Hashable, tokens: int) -> bool:
        return self.room is None or self.room.grow(seq_id, tokens)

    def _begin(self, seq_id: Hashable) -> bool:
        held = self._waiting[seq_id]
        reused = 0 if self.room is None else self.room.admit(seq_id, held.prompt)
        if reused is None:
            return False
        held.done = reused
        self._running[seq_id] = self._waiting.pop(seq_id)
        return True

    def _preempt(self, seq_id: Hashable) -> None:
        assert self.room is not None
        held = self._running.pop(seq_id)
        if held.done >= held.prompt:
            # the token at ``done`` is known, it was about to be decoded
            held.prompt = held.done + 1
        held.done = 0
        self.room.release(seq_id)
        self._waiting = {seq_id: held, **self._waiting}
        self.preempted.append(seq_id)

    def _fill(self, batch: list[Work], seq_id: Hashable, held: _Sequence, budget: int) -> int:
        count = min(self.chunk_size, held.prompt - held.done, budget)
        if count:
            batch.append(Work(seq_id, "prefill", held.done, count))
        return count
