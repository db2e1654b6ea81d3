"""What fits where. A run that cannot start now stays in the database: priority and cancelling stay exact.

A node has slots (one for each GPU, one if it has none, or as many as the dispatcher was told) and GPUs. A run
takes one slot and the GPUs it asks for. A timed run shares nothing that it could be slowed down by: with GPUs
it owns them, and without it takes every slot of its node.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from attnlab_workers.backlog import Waiting


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    id: str
    host: str
    slots: int
    gpus: int


@dataclass(frozen=True)
class Share:
    """What one run occupies."""

    node: Node
    slots: int
    gpus: int

    @property
    def of_machine(self) -> float:
        """The part of the node's slots that this is: of its processors, a run may use as much."""
        return self.slots / self.node.slots


class Capacity:
    """The nodes and who occupies them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.held: dict[str, Share] = {}
        self._doubted: dict[str, float] = {}

    def place(self, waiting: Waiting) -> Share | None:
        """Where the run can start now; the node with the fewest GPUs to spare is taken first."""
        fitting = [node for node in self.nodes if self._fits(node, waiting)]
        if not fitting:
            return None
        node = min(fitting, key=lambda node: (self.free_gpus(node) - waiting.gpus, -self.free_slots(node)))
        return Share(node, _slots(node, waiting), waiting.gpus)

    def never_fits(self, waiting: Waiting) -> str | None:
        """Why the run could not start even if nothing else ran; None if it could."""
        usable = [node for node in self.nodes if node.slots > 0]
        if not usable:
            return "waiting for a machine: no node of the cluster takes runs"
        most = max(node.gpus for node in usable)
        if waiting.gpus > most:
            there = (
                f"the best of {len(usable)} nodes has {most}"
                if len(usable) > 1
                else f"this machine has {most}"
            )
            return f"waiting for {waiting.gpus} GPU{'s' if waiting.gpus > 1 else ''}: {there}"
        return None

    def free_slots(self, node: Node) -> int:
        """Slots of the node that nobody occupies."""
        return node.slots - sum(share.slots for share in self.held.values() if share.node.id == node.id)

    def free_gpus(self, node: Node) -> int:
        """GPUs of the node that nobody occupies."""
        return node.gpus - sum(share.gpus for share in self.held.values() if share.node.id == node.id)

    def has_room(self) -> bool:
        """Whether any node has a free slot."""
        return any(self.free_slots(node) > 0 and not self._doubts(node) for node in self.nodes)

    def doubt(self, node: Node, seconds: float) -> None:
        """Start nothing on the node for a while: it may be gone, which the cluster has not noticed yet."""
        self._doubted[node.id] = time.monotonic() + seconds

    def replace_nodes(self, nodes: Sequence[Node]) -> None:
        """Take over what the cluster looks like now; what is held stays held until it ends."""
        self.nodes = list(nodes)

    def _doubts(self, node: Node) -> bool:
        return time.monotonic() < self._doubted.get(node.id, 0.0)

    def _fits(self, node: Node, waiting: Waiting) -> bool:
        if self._doubts(node):
            return False
        slots = _slots(node, waiting)
        return 0 < slots <= self.free_slots(node) and waiting.gpus <= self.free_gpus(node)


def _slots(node: Node, waiting: Waiting) -> int:
    return node.slots if waiting.timed and waiting.gpus == 0 else min(1, node.slots)
