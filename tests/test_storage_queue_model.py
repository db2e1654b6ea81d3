"""The queue against a model in plain Python: any sequence of calls, on both databases, ends in the same states.

The clock is the database's. To let time pass the test moves every time in the table back instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select, update
from traced_fixtures import POINT

from attnlab_storage import queue, results
from attnlab_storage.database import Store, open_store
from attnlab_storage.tables import OUTCOMES, Attempt, Experiment, Run

LEASE = 1000.0  # model seconds; the test itself takes far less real time than any step of the clock
OWNERS = st.sampled_from(["ann", "bob"])


@dataclass
class ModelRun:
    """What the model knows of one run."""

    id: int
    gpus: int
    priority: int
    max_attempts: int
    state: str = "queued"
    attempt: int = 0
    owner: str | None = None
    lease_until: float = 0.0
    run_after: float = 0.0
    cancel: bool = False
    values: dict[int, float] = field(default_factory=dict)  # attempt -> the measurement it stored

    def holds(self, claim: queue.Claim) -> bool:
        return (self.state, self.attempt, self.owner) == ("running", claim.attempt, claim.owner)

    def visible(self) -> list[float]:
        return [self.values[self.attempt]] if self.attempt in self.values else []


class QueueMachine(RuleBasedStateMachine):
    """Every rule does the same to the store and to the model and compares the answers."""

    store: Store
    claims = Bundle("claims")

    @initialize()
    def empty(self) -> None:
        with self.store.write() as session:
            session.execute(delete(Experiment))
        queue.resume(self.store)
        self.now = 0.0
        self.paused = False
        self.runs: dict[int, ModelRun] = {}
        self.submit([0, 1], 1, 3)

    @rule(
        gpus=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3),
        priority=st.integers(0, 2),
        attempts=st.integers(1, 3),
    )
    def submit(self, gpus: list[int], priority: int, attempts: int) -> None:
        points = [POINT | {"gpus": count} for count in gpus]
        submitted = queue.submit(
            self.store,
            name="n",
            spec={},
            spec_hash="h",
            points=points,
            priority=priority,
            max_attempts=attempts,
        )
        for run_id, count in zip(submitted.run_ids, gpus, strict=True):
            self.runs[run_id] = ModelRun(run_id, count, priority, attempts, run_after=self.now)

    @rule(target=claims, owner=OWNERS, free_gpus=st.sampled_from([1, 0]))
    def claim(self, owner: str, free_gpus: int) -> Any:
        fits = [
            run
            for run in self.runs.values()
            if run.state == "queued"
            and run.run_after <= self.now
            and run.gpus <= free_gpus
            and not self.paused
        ]
        expected = min(fits, key=lambda run: (-run.priority, run.id), default=None)
        claimed = queue.claim(self.store, owner, free_gpus=free_gpus)
        assert (claimed and claimed.run_id) == (expected and expected.id)
        return self.started(claimed, expected, owner)

    @rule(target=claims, owner=OWNERS, data=st.data())
    def claim_by_id(self, owner: str, data: st.DataObject) -> Any:
        run = self.any_run(data)
        if run is None:
            return multiple()
        claimed = queue.claim(self.store, owner, run_id=run.id)
        assert (claimed is not None) == (run.state == "queued")
        return self.started(claimed, run, owner)

    def started(self, claimed: queue.Claim | None, run: ModelRun | None, owner: str) -> Any:
        if claimed is None or run is None:
            return multiple()
        run.state, run.owner, run.attempt = "running", owner, run.attempt + 1
        run.lease_until = self.now + LEASE
        assert claimed.attempt == run.attempt
        return claimed

    @rule(owner=OWNERS)
    def beat(self, owner: str) -> None:
        held = [run for run in self.runs.values() if run.state == "running" and run.owner == owner]
        for run in held:
            run.lease_until = self.now + LEASE
        assert queue.beat(self.store, owner) == [queue.Beat(run.id, run.attempt, run.cancel) for run in held]

    @rule(claim=claims, value=st.floats(0, 1))
    def record(self, claim: queue.Claim, value: float) -> None:
        run = self.runs[claim.run_id]
        if run.holds(claim):
            with results.recording(self.store, claim) as session:
                row = results.MeasurementRow("latency", value, "ms")
                if claim.attempt not in run.values:
                    results.record_measurements(session, claim, [row])
            run.values.setdefault(claim.attempt, value)
        else:
            with pytest.raises(queue.LostLease), results.recording(self.store, claim):
                raise AssertionError("a zombie got into the store")

    @rule(claim=claims)
    def progress(self, claim: queue.Claim) -> None:
        if self.runs[claim.run_id].holds(claim):
            queue.progress(self.store, claim, "measuring", 1, 2)
        else:
            with pytest.raises(queue.LostLease):
                queue.progress(self.store, claim, "measuring", 1, 2)

    @rule(claim=claims, outcome=st.sampled_from(OUTCOMES))
    def finish(self, claim: queue.Claim, outcome: str) -> None:
        """The claims include those of zombies: their finish must do nothing."""
        run = self.runs[claim.run_id]
        holds = run.holds(claim)
        assert queue.finish(self.store, claim, outcome) is holds
        if holds:
            run.state, run.owner = outcome, None
            run.values = {run.attempt: run.values[run.attempt]} if run.attempt in run.values else {}

    @rule(claim=claims, extra=st.sampled_from([0, 1]), backoff=st.sampled_from([500.0, 0.0]))
    def give_back(self, claim: queue.Claim, extra: int, backoff: float) -> None:
        run = self.runs[claim.run_id]
        if run.holds(claim):
            run.max_attempts += extra
            self.attempt_over(run, backoff)
            state = queue.give_back(
                self.store,
                claim,
                error_kind="crashed",
                reason="signal 9",
                backoff_seconds=backoff,
                extra_attempts=extra,
            )
            assert state == run.state
        else:
            with pytest.raises(queue.LostLease):
                queue.give_back(self.store, claim, error_kind="crashed", reason="signal 9")

    def attempt_over(self, run: ModelRun, backoff: float) -> None:
        run.owner = None
        run.state = "cancelled" if run.cancel else "failed" if run.attempt >= run.max_attempts else "queued"
        run.run_after = self.now + backoff
        if run.state != "failed":
            run.values = {}

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        some = self.some_runs(data)
        fresh = [run for run in some if run.state in ("queued", "running") and not run.cancel]
        assert queue.cancel(self.store, [run.id for run in some]) == len(fresh)
        for run in fresh:
            run.cancel = True
            run.state = "cancelled" if run.state == "queued" else run.state

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        some = self.some_runs(data)
        ended = [run for run in some if run.state not in ("queued", "running", "succeeded")]
        expected = sorted(run.id for run in ended)
        assert queue.retry(self.store, [run.id for run in some], extra_attempts=2) == expected
        for run in ended:
            run.state, run.cancel, run.values = "queued", False, {}
            run.max_attempts, run.run_after = run.attempt + 2, self.now

    @rule(data=st.data())
    def move_to_front(self, data: st.DataObject) -> None:
        run = self.any_run(data)
        if run is None:
            return
        assert queue.move_to_front(self.store, run.id) is (run.state == "queued")
        if run.state == "queued":
            others = [it.priority for it in self.runs.values() if it.state == "queued" and it is not run]
            run.priority = max(others) + 1 if others else run.priority
            run.run_after = self.now

    @rule(stop=st.booleans())
    def pause_or_resume(self, stop: bool) -> None:
        (queue.pause if stop else queue.resume)(self.store)
        self.paused = stop
        assert queue.paused(self.store) is stop

    # no sum of steps comes near the lease or a backoff, so the real time that passes does not matter
    @rule(step=st.sampled_from([370.0, 610.0, 1500.0]))
    def advance_clock(self, step: float) -> None:
        self.now += step
        with self.store.write() as session:
            moved = {"lease_until": Run.lease_until - step, "run_after": Run.run_after - step}
            session.execute(update(Run).values(moved), execution_options={"synchronize_session": False})

    @rule()
    def reap(self) -> None:
        expired = [run for run in self.runs.values() if run.state == "running" and run.lease_until < self.now]
        assert queue.reap(self.store) == sorted(run.id for run in expired)
        for run in expired:
            self.attempt_over(run, 2.0 * 2 ** (run.attempt - 1))

    @invariant()
    def store_is_as_the_model_says(self) -> None:
        if not hasattr(self, "runs"):
            return
        rows = results.runs_of(self.store, run_ids=list(self.runs))
        found = [(row.id, row.state, row.attempt, row.owner, row.max_attempts, row.priority) for row in rows]
        assert found == [
            (run.id, run.state, run.attempt, run.owner, run.max_attempts, run.priority)
            for run in self.runs.values()
        ]
        assert [row.cancel_requested_at is not None for row in rows] == [
            run.cancel for run in self.runs.values()
        ]
        for row in rows:
            assert row.attempt <= row.max_attempts
            assert (row.finished_at is not None) == row.ended
            assert (row.lease_until is not None) == (row.state == "running")

    @invariant()
    def only_the_attempt_that_counts_is_seen(self) -> None:
        for run in getattr(self, "runs", {}).values():
            seen = [row.value for row in results.measurements(self.store, run.id)]
            assert seen == run.visible()

    @invariant()
    def every_attempt_is_accounted_for(self) -> None:
        if not getattr(self, "runs", None):
            return
        with self.store.read() as session:
            rows = session.execute(select(Attempt.run_id, Attempt.attempt, Attempt.ended_at)).all()
        open_attempts = {(run_id, attempt) for run_id, attempt, ended in rows if ended is None}
        running = {(run.id, run.attempt) for run in self.runs.values() if run.state == "running"}
        assert open_attempts == running
        assert len(rows) == sum(run.attempt for run in self.runs.values())

    def any_run(self, data: st.DataObject) -> ModelRun | None:
        return self.runs[data.draw(st.sampled_from(sorted(self.runs)))] if self.runs else None

    def some_runs(self, data: st.DataObject) -> list[ModelRun]:
        if not self.runs:
            return []
        ids = data.draw(st.lists(st.sampled_from(sorted(self.runs)), max_size=4, unique=True))
        return [self.runs[run_id] for run_id in ids]


@pytest.fixture
def machine(store_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[QueueMachine]]:
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", str(LEASE))
    with open_store(store_url) as store:
        yield type("Machine", (QueueMachine,), {"store": store})


def test_the_queue_does_what_the_model_does(machine: type[QueueMachine]):
    on_sqlite = machine.store.dialect == "sqlite"
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50 if on_sqlite else 20,  # the rules are the same, the server slower
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
