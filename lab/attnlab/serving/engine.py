"""A continuous-batching engine: every step decodes all running sequences and fills up with chunks of prompts.

Scheduling without stalls is of Agrawal et al., "Sarathi-Serve", https://arxiv.org/abs/2403.02310; admission by free
blocks and preemption by recomputation of Kwon et al., https://arxiv.org/abs/2309.06180.

The clock is virtual: the duration of each step is measured, and time goes on by it; while nothing runs it jumps to the
next arrival. So a pass takes no longer than its work, and a machine that pauses between steps changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from attnlab_kernels.block_tables import BlockTables
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.scheduler import ChunkedPrefillScheduler, Work

from .settings import ServingSpec
from .timeline import Served, Step, Timeline
from .workload import Request


class CacheShape(NamedTuple):
    """How the cache's memory is cut."""

    num_blocks: int
    block_size: int
    """tokens; of a contiguous cache the longest sequence"""
    token_bytes: int
    """of all layers"""

    @property
    def tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        return self.tokens * self.token_bytes


class Runner(Protocol):
    """What computes a step."""

    token_bytes: int
    """bytes that one token takes in the cache, all layers"""

    def open(self, requests: Sequence[Request], shape: CacheShape) -> None:
        """Make the cache and the prompts; what an earlier pass left is forgotten."""
        ...

    def prompts(self) -> dict[int, Sequence[int]]:
        """Token ids of each prompt, to find those that begin alike."""
        ...

    def step(self, batch: Sequence[Work], tables: BlockTables) -> None:
        """Compute the batch: its keys and values into the cache, the next token of each sequence that has one."""
        ...

    def end(self, request_id: int) -> None:
        """A request has its last token."""
        ...


def cut_cache(settings: ServingSpec, kind: str, longest: int, token_bytes: int) -> CacheShape:
    """The cache of an engine. ``longest``: tokens of the longest sequence that it has to hold.

    Raises:
        Unsupported: it cannot hold the longest sequence.
    """
    tokens = (settings.num_blocks or 0) * settings.block_size
    if settings.cache_bytes is not None:
        tokens = settings.cache_bytes // token_bytes
    size = settings.block_size if kind == "paged" else (settings.max_length or longest)
    shape = CacheShape(tokens // size, size, token_bytes)
    if shape.tokens < longest:
        argument = "num_blocks" if settings.cache_bytes is None else "cache_bytes"
        raise Unsupported(
            f"serving.{argument}: must hold the longest sequence, {longest:,} tokens of {token_bytes:,} bytes; "
            f"a {kind} cache holds {shape.tokens:,} here"
        )
    return shape


def serve(
    requests: Sequence[Request],
    runner: Runner,
    shape: CacheShape,
    settings: ServingSpec,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Timeline:
    """Serve all requests once. ``progress`` hears after each step how many tokens of how many are answered.

    Raises:
        ValueError: a request does not fit the cache.
    """
    for request in requests:
        if request.tokens > shape.tokens:
            raise ValueError(
                f"request {request.id} must fit the cache of {shape.tokens:,} tokens; "
                f"it has {request.tokens:,}"
            )
    return _Pass(requests, runner, shape, settings, progress or (lambda done, total: None)).run()


class _Pass:
    def __init__(
        self,
        requests: Sequence[Request],
        runner: Runner,
        shape: CacheShape,
        settings: ServingSpec,
        progress: Callable[[int, int], None],
    ) -> None:
        runner.open(requests, shape)
        shares = settings.prefix_sharing and shape.block_size == settings.block_size
        self._tables = BlockTables(shape.num_blocks, shape.block_size, runner.prompts() if shares else None)
        self._scheduler = ChunkedPrefillScheduler(
            settings.chunk_size, settings.token_budget, settings.max_batch, room=self._tables
        )
        self._runner, self._progress = runner, progress
        self._coming = sorted(requests, key=lambda request: (request.arrival, request.id), reverse=True)
        self._served = {request.id: Served(request) for request in requests}
        self._length: dict[int, int] = {}
        """tokens in the cache of each running sequence"""
        self._timeline = Timeline(self._tables.total_tokens, list(self._served.values()))
        self._expected = sum(request.output_tokens for request in requests)
        self._answered = 0

    def run(self) -> Timeline:
        now = 0.0
        while self._coming or self._scheduler.has_pending():
            if not self._scheduler.has_pending():
                now = max(now, self._coming[-1].arrival)
            while self._coming and self._coming[-1].arrival <= now:
                request = self._coming.pop()
                self._scheduler.add_sequence(request.id, request.prompt_tokens, request.output_tokens - 1)
            now = self._step(now)
            self._progress(self._answered, self._expected)
        return self._timeline

    def _step(self, start: float) -> float:
        began = time.perf_counter()
        batch = self._scheduler.get_next_batch()
        assert batch, "every request fits the cache, so one can always run"
        self._runner.step(batch, self._tables)
        end = start + time.perf_counter() - began
        self._preempt()
        answered = [self._account(work, start, end) for work in batch]
        self._timeline.steps.append(self._counted(batch, start, end))
        for request_id in answered:
            if request_id is not None and self._ended(request_id):
                self._tables.release(request_id)
                self._runner.end(request_id)
                del self._length[request_id]
        return end

    def _preempt(self) -> None:
        for request_id in self._scheduler.preempted:
            assert isinstance(request_id, int)
            self._served[request_id].preemptions += 1
            del self._length[request_id]

    def _account(self, work: Work, start: float, end: float) -> int | None:
        """Note what a step did for one sequence; its id where that gave a token of the answer."""
        request_id = work.seq_id
        assert isinstance(request_id, int)
        served = self._served[request_id]
        if not served.computed:
            served.started, served.reused = start, work.start
        served.computed += work.tokens
        self._length[request_id] = work.start + work.tokens
        self._tables.computed(request_id, self._length[request_id])
        known = served.request.prompt_tokens + len(served.tokens_at)
        if self._length[request_id] < known:
            return None
        served.tokens_at.append(end)
        self._answered += 1
        return request_id

    def _ended(self, request_id: int) -> bool:
        served = self._served[request_id]
        return len(served.tokens_at) == served.request.output_tokens

    def _counted(self, batch: Sequence[Work], start: float, end: float) -> Step:
        decodes = sum(work.kind == "decode" for work in batch)
        waiting, free = len(self._scheduler.waiting), self._tables.free_tokens
        return Step(
            start=start,
            end=end,
            prompt_tokens=sum(work.tokens for work in batch) - decodes,
            decode_tokens=decodes,
            running=len(batch),
            waiting=waiting,
            used=sum(self._length.values()) - self._tables.twice_tokens,
            reserved=self._tables.reserved_tokens,
            stranded=free if waiting and self._scheduler.starved else 0,
            preempted=len(self._scheduler.preempted),
        )
