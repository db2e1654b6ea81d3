"""Runs work on a Ray cluster. The dispatcher's process is the cluster's only driver.

Import this module only after `ray_cluster.prepare`: Ray reads its settings from the environment when
imported.
"""

import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from attnlab_workers.capacity import Node, Share
from attnlab_workers.executor import Ended
from attnlab_workers.task import supervised

log = logging.getLogger(__name__)


class RayExecutor:
    """Places each piece of work on the node the dispatcher chose."""

    def __init__(self, slots: int | None) -> None:
        self._slots = slots
        self._running: dict[str, ray.ObjectRef[Any]] = {}

    def nodes(self) -> list[Node]:
        """The live nodes, sorted by id; one without a processor for Ray has no slot."""
        alive = [_node(facts, self._slots) for facts in ray.nodes() if facts["Alive"]]
        return sorted(alive, key=lambda node: node.id)

    def start(self, key: str, work: str, document: dict[str, Any], share: Share) -> None:
        """Submit the work to the share's node."""
        self._running[key] = supervised.options(
            name=key,
            num_cpus=share.slots,
            num_gpus=share.gpus,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(share.node.id, soft=False),
        ).remote(work, document)

    def wait(self, seconds: float) -> list[Ended]:
        """What has ended; returns at once if something has, else after `seconds`."""
        if not self._running:
            time.sleep(seconds)
            return []
        keys = {ref: key for key, ref in self._running.items()}
        done, _ = ray.wait(list(keys), num_returns=1, timeout=seconds)
        return [self._collect(keys[ref]) for ref in done]

    def kill(self, key: str) -> None:
        """End the Ray worker; its child dies with it."""
        if key in self._running:
            ray.cancel(self._running[key], force=True)

    def close(self) -> None:
        """Leave the cluster, or end it if this process started it."""
        for key in list(self._running):
            self.kill(key)
        ray.shutdown()

    def _collect(self, key: str) -> Ended:
        ref = self._running.pop(key)
        try:
            return Ended(key, answer=ray.get(ref))
        except RayError as error:
            return Ended(key, error=f"{type(error).__name__}: {_first_line(error)}")


def _node(facts: dict[str, Any], slots: int | None) -> Node:
    resources = facts["Resources"]
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    return Node(facts["NodeID"], facts["NodeManagerHostname"], min(cpus, slots or max(1, gpus)), gpus)


def _first_line(error: RayError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # an exception of the task itself comes as a traceback: its last line says what it was
    return (lines[-1] if type(error).__name__ == "RayTaskError" else lines[0])[:300] if lines else "no text"
