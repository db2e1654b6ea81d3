"""How blocks get from rank to rank: over a process group, or hand to hand between ranks simulated in one process.

A rank is a generator: ``start`` sends a payload on its way to the next rank, and to ``yield`` what it returns is to
wait for the payload of the rank before. The same generators run either way.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attnlab_kernels.operations.ring.layout import RingError

Payload = tuple[Tensor, ...]
Result = TypeVar("Result")
# messages of one kind are told from those of another while both are under way
KEYS, GRADIENTS = 0, 8


@dataclass(frozen=True, eq=False)
class Pending:
    """A payload under way. Keeps what is sent alive, and receives into buffers that nobody reads yet."""

    sent: Payload
    received: Payload = ()
    works: list[Any] = field(default_factory=list)


Program = Generator[Pending, Any, Result]


@dataclass(frozen=True, eq=False)
class Ring:
    """``size`` ranks; this process hosts all of them (no group) or one.

    Args:
        group: a ``torch.distributed`` process group whose ranks make the ring, in their order.
    """

    size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RingError(f"ring_size must be at least 1 rank; got {self.size}")
        if self.group is not None and dist.get_world_size(self.group) != self.size:
            raise RingError(
                f"ring_size must be the size of ring_group, {dist.get_world_size(self.group)}; got {self.size}"
            )

    @property
    def hosted(self) -> tuple[int, ...]:
        """Ranks that run in this process."""
        return tuple(range(self.size)) if self.group is None else (dist.get_rank(self.group),)

    def start(self, payload: Payload, kind: int) -> Pending:
        """Send to the next rank, and get ready to receive as much from the one before, without waiting.

        Raises:
            RuntimeError: from the group's backend; all ranks must send tensors of the same shapes.
        """
        if self.group is None or self.size == 1:
            return Pending(payload)
        sent = tuple(part.contiguous() for part in payload)
        received = tuple(torch.empty_like(part) for part in sent)
        rank = dist.get_rank(self.group)
        after = dist.get_global_rank(self.group, (rank + 1) % self.size)
        before = dist.get_global_rank(self.group, (rank - 1) % self.size)
        operations = []
        for index, (outgoing, incoming) in enumerate(zip(sent, received, strict=True)):
            operations += [
                dist.P2POp(dist.isend, outgoing, after, self.group, kind + index),
                dist.P2POp(dist.irecv, incoming, before, self.group, kind + index),
            ]
        return Pending(sent, received, dist.batch_isend_irecv(operations))

    def run(self, programs: Sequence[Program[Result]]) -> list[Result]:
        """Run the hosted ranks' programs in step with each other; they must wait equally often."""
        arrived: list[Any] = [None] * len(programs)
        while True:
            waiting: list[Pending] = []
            results: list[Result] = []
            for program, payload in zip(programs, arrived, strict=True):
                try:
                    waiting.append(program.send(payload))
                except StopIteration as end:
                    results.append(end.value)
            if results:
                assert not waiting, "ranks of one ring take the same steps"
                return results
            arrived = self._deliver(waiting)

    def _deliver(self, waiting: list[Pending]) -> list[Payload]:
        if self.group is None or self.size == 1:
            return [waiting[rank - 1].sent for rank in range(len(waiting))]
        for pending in waiting:
            for request in pending.works:
                request.wait()
        return [pending.received for pending in waiting]
