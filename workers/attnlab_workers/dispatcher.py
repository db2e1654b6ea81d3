"""The dispatcher: takes runs from the database, has Ray do them, keeps their leases, settles how they ended.

`python -m attnlab_workers.dispatcher`. Every state is in the database. A dispatcher that dies takes its tasks
with it, their leases run out, and the next one (any number may run) takes the runs up again; whatever the
dead one's child still tries to write is fenced off.
"""

import argparse
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from attnlab_storage import queue, settings
from attnlab_storage.database import Store, open_store
from attnlab_storage.errors import StoreError
from attnlab_storage.queue import Claim
from attnlab_workers import backlog, ray_cluster, settle
from attnlab_workers.arguments import SLOTS
from attnlab_workers.capacity import Capacity, Node, Share
from attnlab_workers.executor import Ended, Executor
from attnlab_workers.exits import exit_from_dict
from attnlab_workers.order import EXECUTE, Order

log = logging.getLogger(__name__)

SURVEY = "attnlab.environment:describe_environment"
WAIT_SECONDS = 0.2
NODES_SECONDS = 5.0
HEARTBEAT_SECONDS = 2.0
FORCE_SECONDS = 5.0
"""how long a supervisor may take to end a run that was cancelled, lost or is overdue, before Ray ends both"""
STOP_SECONDS = 3.0
DOUBT_SECONDS = 20.0
"""how long nothing starts on another machine that lost a run: Ray takes some ten seconds to miss a dead node"""


@dataclass
class Held:
    """A run this dispatcher has claimed, and where it runs."""

    claim: Claim
    share: Share
    started: float
    unwanted_since: float | None = None
    forced: bool = False


@dataclass
class Every:
    """Something that is due every so many seconds."""

    seconds: float
    next: float = 0.0

    def due(self, now: float) -> bool:
        """True once each period."""
        if now < self.next:
            return False
        self.next = now + self.seconds
        return True


@dataclass
class Dispatcher:
    """One dispatcher; `tick` does everything that is due. Used from one thread."""

    store: Store
    executor: Executor
    job: str = EXECUTE
    survey: str | None = SURVEY
    facts: dict[str, Any] = field(default_factory=dict)
    owner: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}")

    def __post_init__(self) -> None:
        lease = settings.lease_seconds()
        self.capacity = Capacity()
        self.held: dict[str, Held] = {}
        self.surveys: dict[str, dict[str, Any]] = {}
        self.waiting_for: dict[str, str] = {}
        self._beat = Every(min(1.0, lease / 5))
        self._reap = Every(min(5.0, lease / 3))
        self._nodes = Every(NODES_SECONDS)
        self._heartbeat = Every(HEARTBEAT_SECONDS)
        self._shown = ""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then give running runs back to the queue."""
        log.info("dispatcher %s works on %s", self.owner, self.store.label)
        while not stop.is_set():
            try:
                self.tick(WAIT_SECONDS)
            except StoreError as error:
                # leases decide what is still ours when the database is back
                log.warning("%s", error)
                stop.wait(1.0)
        self.stop()

    def tick(self, seconds: float) -> None:
        """One round; waits up to `seconds` for something to end."""
        now = time.monotonic()
        if self._nodes.due(now):
            self._look_at_nodes()
        if self._beat.due(now):
            self._renew_leases(now)
        if self._reap.due(now):
            for run_id in queue.reap(self.store):
                log.warning("run %s: its lease ran out", run_id)
        self._show(now)
        if self.capacity.has_room() and not queue.paused(self.store):
            self._fill(now)
        for ended in self.executor.wait(seconds):
            self._collect(ended)

    def stop(self) -> None:
        """End what runs and give it back to the queue."""
        log.info("dispatcher %s stops, %d running", self.owner, len(self.held))
        for key in self.held:
            self.executor.kill(key)
        deadline = time.monotonic() + STOP_SECONDS
        still = set(self.held)
        while still and time.monotonic() < deadline:
            still -= {ended.key for ended in self.executor.wait(WAIT_SECONDS)}
        for held in self.held.values():
            log.info("run %s: %s", held.claim.run_id, settle.stopped(self.store, held.claim))
        self.held.clear()
        queue.forget_dispatcher(self.store, self.owner)

    def _renew_leases(self, now: float) -> None:
        beats = {(beat.run_id, beat.attempt): beat for beat in queue.beat(self.store, self.owner)}
        for key, held in self.held.items():
            beat = beats.get((held.claim.run_id, held.claim.attempt))
            overdue = now - held.started > held.claim.timeout_seconds
            if beat is not None and not beat.cancel_requested and not overdue:
                continue
            # its supervisor has seen that too and ends the child; force is for one that cannot
            held.unwanted_since = held.unwanted_since or now
            if now - held.unwanted_since > FORCE_SECONDS and not held.forced:
                log.warning("run %s: its worker does not answer, Ray ends it", held.claim.run_id)
                held.forced = True
                self.executor.kill(key)

    def _fill(self, now: float) -> None:
        """Start runs in their order while they fit; one that waits for room holds those behind it back."""
        waiting_for: dict[str, str] = {}
        for waiting in backlog.next_runs(self.store):
            reason = self.capacity.never_fits(waiting)
            if reason is not None:
                waiting_for[str(waiting.run_id)] = reason
                continue
            share = self.capacity.place(waiting)
            if share is None:
                break
            claim = queue.claim(self.store, self.owner, run_id=waiting.run_id)
            if claim is not None:
                self._start(claim, share, now)
        self.waiting_for = waiting_for

    def _start(self, claim: Claim, share: Share, now: float) -> None:
        key = f"run-{claim.run_id}:{claim.attempt}"
        order = Order(
            claim,
            self.store.url,
            device="cuda" if share.gpus else "cpu",
            job=self.job,
            machine_share=share.of_machine,
        )
        self.held[key] = Held(claim, share, now)
        self.capacity.held[key] = share
        log.info("run %s: attempt %s starts on %s", claim.run_id, claim.attempt, share.node.host)
        self.executor.start(key, "run", order.to_dict(), share)

    def _collect(self, ended: Ended) -> None:
        self.capacity.held.pop(ended.key, None)
        held = self.held.pop(ended.key, None)
        if held is None:
            self._surveyed(ended)
        else:
            log.info("run %s: %s", held.claim.run_id, self._settled(held, ended))

    def _settled(self, held: Held, ended: Ended) -> str:
        if ended.answer is not None:
            return settle.settle(self.store, held.claim, exit_from_dict(ended.answer))
        node = held.share.node
        if not held.forced and node.host != socket.gethostname():
            self.capacity.doubt(node, DOUBT_SECONDS)
        return settle.worker_lost(self.store, held.claim, ended.error or "no answer")

    def _look_at_nodes(self) -> None:
        nodes = self.executor.nodes()
        self.capacity.replace_nodes(nodes)
        for node in nodes if self.survey else ():
            key = f"survey-{node.id}"
            idle = self.capacity.free_slots(node) == node.slots > 0
            if node.id not in self.surveys and key not in self.capacity.held and idle:
                # alone on its node, as an import beside a timed run would disturb it
                self.capacity.held[key] = Share(node, node.slots, 0)
                document = {"ask": self.survey, "job": self.job}
                self.executor.start(key, "survey", document, self.capacity.held[key])

    def _surveyed(self, ended: Ended) -> None:
        node_id = ended.key.removeprefix("survey-")
        if ended.error:
            log.warning("survey of node %s: %s", node_id, ended.error)
        self.surveys[node_id] = {"environment": ended.answer, "survey_error": ended.error}

    def _show(self, now: float) -> None:
        """Tell the store that this dispatcher lives and what its cluster is; at once when that changes."""
        cluster = self._cluster()
        shown = json.dumps(cluster, sort_keys=True)
        if shown != self._shown or self._heartbeat.due(now):
            self._shown = shown
            queue.dispatcher_beat(self.store, self.owner, cluster)

    def _cluster(self) -> dict[str, Any]:
        nodes = self.capacity.nodes
        return {
            **self.facts,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slots": sum(node.slots for node in nodes),
            "gpus": sum(node.gpus for node in nodes),
            "free_slots": sum(self.capacity.free_slots(node) for node in nodes),
            "free_gpus": sum(self.capacity.free_gpus(node) for node in nodes),
            "nodes": [self._node(node) for node in nodes],
            "running": sorted(held.claim.run_id for held in self.held.values()),
            "waiting_for": self.waiting_for,
        }

    def _node(self, node: Node) -> dict[str, Any]:
        facts = {"id": node.id, "host": node.host, "slots": node.slots, "gpus": node.gpus}
        return {**facts, **self.surveys.get(node.id, {"environment": None, "survey_error": None})}


def main(arguments: list[str] | None = None) -> int:
    """Run a dispatcher until SIGTERM or SIGINT; the exit status is 2 when it cannot start."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    address = None if options.address == "local" else options.address
    try:
        with open_store() as store:
            return _serve(store, address, options.slots, options.job)
    except (StoreError, ValueError, ray_cluster.ClusterRefused) as error:
        print(f"attnlab dispatch: {error}", file=sys.stderr)
        return 2


def _serve(store: Store, address: str | None, slots: int | None, job: str) -> int:
    stop = threading.Event()
    ray_cluster.prepare(local=address is None)
    folder = ray_cluster.start(slots) if address is None else ray_cluster.join(address)
    from attnlab_workers.ray_executor import RayExecutor  # imports ray: not before it is prepared

    executor = RayExecutor(slots)
    try:
        hosts = [node.host for node in executor.nodes()]
        ray_cluster.refuse_shared_sqlite(store, hosts, socket.gethostname())
        for signum in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
            signal.signal(signum, lambda *_: stop.set())
        facts = ray_cluster.facts(address)
        Dispatcher(store, executor, job, SURVEY if job == EXECUTE else None, facts).run(stop)
    finally:
        executor.close()
        if folder is not None:
            ray_cluster.remove(folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnlab dispatch", description="Take runs from the queue and have Ray do them."
    )
    parser.add_argument(
        "--slots", type=SLOTS, help="runs at once on a node; default one for each GPU, or one"
    )
    parser.add_argument(
        "--address", default="local", help="local (default), auto, or HOST:PORT of a Ray cluster"
    )
    parser.add_argument("--job", default=EXECUTE, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
