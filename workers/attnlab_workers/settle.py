"""What becomes of a run when its child has ended: the failure table of the queue.

the child wrote an outcome     nothing more to say
cancelled, timed out           that outcome
out of main memory             out_of_memory: a result, never tried again
died of a signal, or raised    tried again once in a fresh process, then failed
the machine or Ray was lost    tried again until the attempts are used up
taken over by another attempt  nothing: it is not ours any more
"""

import logging

from attnlab_storage import queue, results
from attnlab_storage.database import Store
from attnlab_storage.errors import LostLease
from attnlab_storage.queue import Claim
from attnlab_workers import backlog
from attnlab_workers.exits import Exit

log = logging.getLogger(__name__)

CRASHED, WORKER_LOST, STOPPED = "crashed", "worker_lost", "dispatcher_stopped"
CRASH_RETRIES = 1


def settle(store: Store, claim: Claim, ended: Exit) -> str:
    """Write down the end of a child; returns what became of the run, for the log."""
    match ended.end:
        case "ended" if backlog.standing(store, claim) in ("held", "cancel_requested"):
            return _crashed(store, claim, "the child ended without an outcome", ended.tail)
        case "ended":
            return "ended"
        case "lost":
            return "taken over by another attempt"
        case "crashed":
            return _crashed(store, claim, ended.reason, ended.tail)
        case "cancelled" | "timed_out":
            return _finish(store, claim, ended, error_kind=None)
        case "out_of_memory":
            return _finish(store, claim, ended, error_kind="host_oom")


def worker_lost(store: Store, claim: Claim, error: str) -> str:
    """Write down that what ran the child is gone: Ray's worker, its node, or its supervisor failed."""
    return _give_back(store, claim, WORKER_LOST, f"the worker was lost: {error}", "")


def stopped(store: Store, claim: Claim) -> str:
    """Give a run back because this dispatcher stops; that costs the run no attempt and no wait."""
    return _give_back(
        store,
        claim,
        STOPPED,
        "the dispatcher was stopped while it ran",
        "",
        backoff_seconds=0.0,
        extra_attempts=1,
    )


def _crashed(store: Store, claim: Claim, reason: str, tail: str) -> str:
    crashes = sum(attempt.error_kind == CRASHED for attempt in results.attempts(store, claim.run_id))
    if crashes < CRASH_RETRIES:
        return _give_back(store, claim, CRASHED, reason, tail)
    finished = queue.finish(
        store, claim, "failed", reason=f"{reason}, twice", error_kind=CRASHED, error_detail=tail or None
    )
    return "failed" if finished else "ended"


def _finish(store: Store, claim: Claim, ended: Exit, *, error_kind: str | None) -> str:
    detail = ended.tail or None if error_kind else None
    done = queue.finish(
        store, claim, ended.end, reason=ended.reason, error_kind=error_kind, error_detail=detail
    )
    return ended.end if done else "ended"


def _give_back(
    store: Store,
    claim: Claim,
    error_kind: str,
    reason: str,
    tail: str,
    *,
    backoff_seconds: float | None = None,
    extra_attempts: int = 0,
) -> str:
    try:
        return queue.give_back(
            store,
            claim,
            error_kind=error_kind,
            reason=reason,
            error_detail=tail or None,
            backoff_seconds=backoff_seconds,
            extra_attempts=extra_attempts,
        )
    except LostLease:
        return "ended"
