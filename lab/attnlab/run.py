"""One run on this device, from claim to outcome: the one path, with Ray or without.

Nothing is returned but the outcome. Whatever the run learns goes into the store as it happens, fenced by the claim.
"""

import contextlib
import threading
import time
from collections.abc import Sequence

import torch

from attnlab_storage import queue, settings
from attnlab_storage.database import Store
from attnlab_storage.queue import Claim, LostLease

from .outcomes import ending_of
from .probes.memory import give_back_free_heap
from .procedure import Procedure
from .recorder import Recorder
from .spec import ExperimentSpec

RUN_HERE_DELAY = 60.0
"""seconds for which a dispatcher leaves alone what is about to run in this process"""


def execute(store: Store, claim: Claim, *, device: str | None = None) -> str:
    """Do one claimed run and end it; every failure becomes an outcome.

    Args:
        device: "cpu" or "cuda"; None: CUDA if the run asks for GPUs.

    Returns:
        The outcome: succeeded, failed, out_of_memory or unsupported.

    Raises:
        LostLease: the run is no longer ours; nothing more is written.
    """
    recorder = Recorder(store, claim)
    try:
        summary = Procedure(recorder, claim, device).perform()
    except LostLease:
        raise
    except Exception as error:
        ending = ending_of(error)
        _release()
        ended = queue.finish(
            store,
            claim,
            ending.outcome,
            reason=ending.reason,
            error_kind=ending.error_kind,
            error_detail=ending.error_detail,
        )
        outcome = ending.outcome
    else:
        outcome = "succeeded"
        ended = queue.finish(store, claim, outcome, summary=summary)
    if not ended:
        raise LostLease(f"run {claim.run_id} was taken away before it could end")
    return outcome


def run_here(
    store: Store, spec: ExperimentSpec, *, created_by: str | None = None, tags: Sequence[str] = ()
) -> int:
    """Run an experiment in this process, one run after another; returns its id.

    Outcomes are in the store. A run that another process takes meanwhile is left to it.
    """
    points = [point.to_dict() for point in spec.points()]
    submitted = queue.submit(
        store,
        name=spec.name,
        spec=spec.to_dict(),
        spec_hash=spec.hash(),
        points=points,
        created_by=created_by,
        tags=tags,
        delay_seconds=RUN_HERE_DELAY * len(points),
    )
    owner = f"here-{threading.get_ident()}-{time.time_ns()}"
    fault: int | None = None
    for run_id in submitted.run_ids:
        claim = queue.claim(store, owner, run_id=run_id)
        if claim is None:
            continue
        if fault is not None:
            reason = f"not started: run {fault} left this process without its CUDA device; retry this one"
            queue.finish(store, claim, "failed", reason=reason, error_kind="device_lost")
            continue
        with _Beating(store, owner):
            outcome = execute(store, claim)
        if outcome == "failed" and device_is_lost():
            fault = run_id
    return submitted.experiment_id


def device_is_lost() -> bool:
    """Say whether a fault has ended this process's CUDA context: everything that it is asked then fails alike."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _release() -> None:
    """Give back what the failed run held on the device, so that the next one starts with all of it."""
    give_back_free_heap()
    if torch.cuda.is_initialized():
        # a fault may have ended the context: the run still has to be told of, and the process has nothing to give
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


class _Beating:
    """A thread that renews the owner's lease while a run goes on."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attnlab-lease", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(settings.lease_seconds() / 3):
            queue.beat(self._store, self._owner)
