"""How long the store takes to list, search and count many runs.

    python benchmarks/store_listing.py [--url URL] [--runs 50000] [--repeats 7]

Without a URL it makes an SQLite store in a temporary folder. With one it fills that store: give it an empty one.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import insert, select, text

from attnlab_storage import results
from attnlab_storage.columns import db_now
from attnlab_storage.database import Store, migrate, open_store
from attnlab_storage.listing import SORTS
from attnlab_storage.tables import Experiment, Run

MECHANISMS = ("multi_head", "grouped_query", "sliding_window", "flash", "linear", "sparse", "differential")
OUTCOMES = ("succeeded",) * 16 + ("failed", "out_of_memory", "unsupported", "queued")
RUNS_AN_EXPERIMENT = 12


def fill(store: Store, count: int, seed: int = 0) -> None:
    """Writes ``count`` made-up runs, twelve an experiment, straight into the tables."""
    rng = random.Random(seed)
    with store.write() as session:
        now = session.scalars(select(db_now())).one()
        experiments = [_experiment(index, now) for index in range(-(-count // RUNS_AN_EXPERIMENT))]
        session.execute(insert(Experiment), experiments)
        for start in range(0, count, 5000):
            runs = [_run(index, now, rng) for index in range(start, min(count, start + 5000))]
            session.execute(insert(Run), runs)
    if store.dialect == "postgresql":  # what its autovacuum does within a minute
        with store.write() as session:
            session.execute(text("ANALYZE"))


def _experiment(index: int, now: float) -> dict[str, Any]:
    return {
        "id": index + 1,
        "name": f"window against full {index}",
        "spec": {"model": "smollm2-135m", "input": {"text": "some text " * 40}},
        "spec_hash": f"{index:064x}",
        "note": "",
        "tags": ["paper"] if index % 100 == 0 else [],
        "pinned": False,
        "created_at": now + index,
    }


def _run(index: int, now: float, rng: random.Random) -> dict[str, Any]:
    state = rng.choice(OUTCOMES)
    ended = None if state == "queued" else now + index + 1
    latency = rng.expovariate(0.1) if state == "succeeded" else None
    memory = rng.randrange(10**9) if state == "succeeded" else None
    return {
        "experiment_id": index // RUNS_AN_EXPERIMENT + 1,
        "position": index % RUNS_AN_EXPERIMENT,
        "mechanism": rng.choice(MECHANISMS),
        "parameters": {"window_size": 256},
        "implementation": rng.choice(("auto", "eager", "sdpa_flash", "flex", "triton")),
        "sequence_length": rng.choice((512, 1024, 2048, 4096, 8192)),
        "dtype": rng.choice(("float32", "bfloat16")),
        "batch_size": 1,
        "phase": "prefill",
        "model": rng.choice(("smollm2-135m", "minilm-l6", "rxnmapper")),
        "kind": "bench",
        "gpus": 0,
        "state": state,
        "priority": 0,
        "run_after": now,
        "attempt": 0 if state == "queued" else 1,
        "max_attempts": 3,
        "timeout_seconds": 3600.0,
        "created_at": now + index,
        "started_at": ended,
        "finished_at": ended,
        "latency_ms": latency,
        "peak_memory_bytes": memory,
        "reason": None if state == "succeeded" else "made up",
        "summary": {"latency_ms": latency, "peak_memory_bytes": memory, "kernels": ["sdpa_flash"]},
    }


def questions(store: Store) -> dict[str, Callable[[], Any]]:
    """What the pages ask."""

    def page(**kwargs: Any) -> Callable[[], Any]:
        return lambda: results.list_runs(store, limit=50, **kwargs)

    def deep_page() -> Any:
        middle = results.list_runs(store, sort="latency_ms", limit=1000).next
        return lambda: results.list_runs(store, sort="latency_ms", limit=50, after=middle)

    asked: dict[str, Callable[[], Any]] = {f"sort {name}": page(sort=name) for name in SORTS}
    asked |= {f"sort -{name}": page(sort=f"-{name}") for name in SORTS}
    return asked | {
        "latency_ms, page 21": deep_page(),
        "failed, slowest": page(filters={"state": "failed"}, sort="-latency_ms"),
        "succeeded, slowest": page(filters={"state": "succeeded"}, sort="-latency_ms"),
        "three filters": page(
            filters={"mechanism": ["flash", "linear"], "model": "rxnmapper", "sequence_length": 2048},
            sort="latency_ms",
        ),
        "tag": page(filters={"tag": "paper"}),
        "search, found": page(search="window against"),
        "search, one experiment": page(search="full 4017"),
        "search, nothing": page(search="no such thing"),
        "count, search": lambda: results.count_runs(store, search="full 40"),
        "counts by state": lambda: results.counts_by_state(store),
        "all ids": lambda: results.run_ids(store),
        "menu of models": lambda: results.run_values(store, "model"),
        "experiments": lambda: results.list_experiments(store),
        "revision": lambda: results.revision(store),
    }


def main() -> None:
    """Prints the median and the worst of each question, in milliseconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url")
    parser.add_argument("--runs", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.url or f"sqlite:///{folder}/listing.db"
        migrate(url)
        with open_store(url) as store:
            started = time.perf_counter()
            fill(store, arguments.runs)
            took = time.perf_counter() - started
            print(f"{store.label}: {arguments.runs:,} runs written in {took:.1f} s")
            print(f"{'question':26} {'median ms':>10} {'max ms':>8}")
            for name, ask in questions(store).items():
                times = [_milliseconds(ask) for _ in range(arguments.repeats)]
                print(f"{name:26} {statistics.median(times):10.2f} {max(times):8.2f}")


def _milliseconds(ask: Callable[[], Any]) -> float:
    started = time.perf_counter()
    ask()
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    main()
