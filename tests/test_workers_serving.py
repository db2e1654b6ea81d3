"""A served run in a real child, cancelled half way: the worker is free at once, what was served stays known."""

import threading
import time

from attnlab.spec import parse_spec
from attnlab_storage import queue, results
from attnlab_storage.database import Store
from attnlab_storage.listing import get_run
from attnlab_workers.child_process import Spare
from attnlab_workers.order import Order
from attnlab_workers.settle import settle
from attnlab_workers.supervisor import supervise

SECONDS = 5.0
"""from the request to a free worker; an hour of passes is what it would take otherwise"""
SPEC = {
    "name": "served until somebody had enough",
    "module": {"dim": 16, "num_heads": 2},
    "vary": {"mechanism": ["multi_head"]},
    "phase": "serving",
    "serving": {
        "workload": {"requests": 8, "prompt_tokens": 9, "output_tokens": 5},
        "num_blocks": 64,
    },
    "repeats": 1000,
}


def cancel_after_first_pass(store: Store, run_id: int, asked: list[float]) -> None:
    deadline = time.monotonic() + 60
    while "pass 1: " not in results.log_tail(store, run_id) and time.monotonic() < deadline:
        time.sleep(0.02)
    asked.append(time.monotonic())
    queue.cancel(store, [run_id])


def test_a_cancelled_server_frees_its_worker_and_keeps_what_it_had_served(
    sqlite_store: Store, spare: Spare
) -> None:
    spec = parse_spec(SPEC)
    points = [point.to_dict() for point in spec.points()]
    (run_id,) = queue.submit(
        sqlite_store, name=spec.name, spec=spec.to_dict(), spec_hash=spec.hash(), points=points
    ).run_ids
    claim = queue.claim(sqlite_store, "tests", run_id=run_id)
    assert claim is not None
    asked: list[float] = []
    canceller = threading.Thread(target=cancel_after_first_pass, args=(sqlite_store, run_id, asked))
    canceller.start()
    end = supervise(Order(claim, sqlite_store.url, "cpu", machine_share=0.5), spare)
    freed = time.monotonic()
    canceller.join()
    assert (end.end, end.reason) == ("cancelled", "cancelled while it ran")
    assert freed - asked[0] < SECONDS
    assert settle(sqlite_store, claim, end) == "cancelled"
    run = get_run(sqlite_store, run_id)
    assert run is not None
    assert run.state == "cancelled"
    assert run.phase_name is not None
    assert run.phase_name.endswith("of 1000")
    assert "output tokens/s" in results.log_tail(sqlite_store, run_id)
