"""How fast tensors go into the store and come out: 360 rows of 0.5 MB, as the layers of a 2,048-token run.

    python benchmarks/store_tensors.py [--url URL] [--layers 30] [--dtype float32]

Without a URL it makes an SQLite store in a temporary folder.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np

from attnlab_storage import queue, results, tensors
from attnlab_storage.database import Store, migrate, open_store

HEADS, KV_HEADS, TOKENS, HEAD_DIM = 9, 3, 2048, 64


def claimed(store: Store) -> queue.Claim:
    """A fresh run to write to."""
    point = {
        "mechanism": "multi_head",
        "parameters": {},
        "implementation": "auto",
        "sequence_length": TOKENS,
        "dtype": "float32",
        "batch_size": 1,
        "phase": "prefill",
        "model": None,
        "kind": "bench",
        "gpus": 0,
    }
    submitted = queue.submit(store, name="tensors", spec={}, spec_hash="", points=[point])
    claim = queue.claim(store, "benchmark", run_id=submitted.run_ids[0])
    assert claim is not None
    return claim


def write(store: Store, claim: queue.Claim, layers: int, dtype: str) -> tuple[int, float]:
    """Writes query and key of every layer, one transaction a layer. Returns (bytes, seconds)."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2**16, (heads, TOKENS, HEAD_DIM), np.uint16)
        if dtype == "bfloat16"
        else rng.standard_normal((heads, TOKENS, HEAD_DIM), np.float32)
        for name, heads in (("query", HEADS), ("key", KV_HEADS))
    }
    written = 0
    started = time.perf_counter()
    for layer in range(layers):
        with results.recording(store, claim) as session:
            for name, array in arrays.items():
                written += tensors.write_tensor(session, claim, name, layer, array, dtype=dtype)
    return written, time.perf_counter() - started


def read(store: Store, claim: queue.Claim, layers: int, count: int = 300) -> list[float]:
    """Reads rows at random. Returns milliseconds."""
    rng = np.random.default_rng(1)
    times = []
    for _ in range(count):
        layer, head = int(rng.integers(layers)), int(rng.integers(HEADS))
        started = time.perf_counter()
        tensors.read_tensor(store, claim.run_id, "query", layer, head)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def main() -> None:
    """Prints megabytes a second and milliseconds a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.url or f"sqlite:///{folder}/tensors.db"
        migrate(url)
        with open_store(url) as store:
            claims = [claimed(store) for _ in range(arguments.repeats)]
            for claim in claims:
                written, seconds = write(store, claim, arguments.layers, arguments.dtype)
                rows = arguments.layers * (HEADS + KV_HEADS)
                print(
                    f"wrote {rows} rows, {written / 1e6:.0f} MB in {seconds:.2f} s: {written / 1e6 / seconds:.0f} MB/s"
                )
                times = sorted(read(store, claim, arguments.layers))
                median, late = statistics.median(times), times[int(len(times) * 0.95)]
                print(f"read a row in {median:.2f} ms, p95 {late:.2f} ms, max {times[-1]:.2f} ms")
            started = time.perf_counter()
            queue.give_back(store, claims[0], error_kind="benchmark", reason="dropped")
            print(f"dropped a run's tensors in {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
