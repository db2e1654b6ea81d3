"""Real runs in real children held to a memory: what one of them cannot have costs the others nothing."""

from attnlab.spec import parse_spec
from attnlab_storage import queue, results
from attnlab_storage.database import Store
from attnlab_workers.child_process import Spare
from attnlab_workers.order import EXECUTE, Order
from attnlab_workers.supervisor import supervise

LIMIT = 2 << 30
TOKENS = 16_384
SPEC = {
    "name": "the third is too large",
    "module": {"dim": 32, "num_heads": 4},
    "vary": {
        "mechanism": ["multi_head"],
        "implementation": ["eager"],
        "sequence_length": [16, 32, TOKENS, 64],
    },
    "record": ["memory"],
}


def test_the_run_that_exceeds_memory_ends_so_and_the_others_succeed(
    sqlite_store: Store, spare: Spare
) -> None:
    spec = parse_spec(SPEC)
    points = [point.to_dict() for point in spec.points()]
    made = queue.submit(
        sqlite_store, name=spec.name, spec=spec.to_dict(), spec_hash=spec.hash(), points=points
    )
    for run_id in made.run_ids:
        claim = queue.claim(sqlite_store, "tests", run_id=run_id)
        assert claim is not None
        order = Order(claim, sqlite_store.url, "cpu", job=EXECUTE, memory_limit=LIMIT, machine_share=0.5)
        assert supervise(order, spare).end == "ended"
    runs = results.runs_of(sqlite_store, experiment_id=made.experiment_id)
    assert [run.state for run in runs] == ["succeeded", "succeeded", "out_of_memory", "succeeded"]
    assert runs[2].reason is not None
    assert f"({4 * 4 * TOKENS**2} bytes)" in runs[2].reason
    assert [run.peak_memory_bytes is None for run in runs] == [False, False, True, False]
