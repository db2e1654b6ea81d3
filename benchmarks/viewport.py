"""How long a viewport of 512 x 512 pixels takes anywhere on the maps of a 2,048-token SmolLM2-sized run.

    python benchmarks/viewport.py                 # makes such a store in a temporary folder (190 MB) and measures it
    python benchmarks/viewport.py --long          # one layer, 8 heads: 32,768 tokens causal; 131,072, window 4,096
    python benchmarks/viewport.py --run 3         # measures a run of the store at ATTNLAB_DATABASE_URL or ATTNLAB_HOME

Prints the peak memory of the process, and p50 and p95 in milliseconds, on the wall and of the processor (which a busy
machine does not disturb): of the whole map, of regions at random places and zooms, each on a head that was not looked
at before (read from SQL) and on one that is in memory; of a signed difference; of a strip of thumbnails.
`browser.py` has the same maps in Chromium, beside BertViz and CircuitsVis.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from fastapi import FastAPI
from starlette.testclient import TestClient

from attnlab.views.difference import difference
from attnlab.views.thumbnails import thumbnails
from attnlab.views.viewport import MEMORY, cell, overview_progress, recorded, viewport
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Mask, Window
from attnlab_storage import queue, results, tensors
from attnlab_storage.database import Store, migrate, open_store
from attnlab_webui import api

Place = Callable[[], tuple[int, int]]
Region = Callable[[], tuple[tuple[int, int], tuple[int, int]]]

PIXELS = 512
LONG: list[tuple[int, Mask]] = [(32_768, Causal()), (131_072, Window(4095))]
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
POINT = {
    "mechanism": "multi_head",
    "parameters": {},
    "implementation": "auto",
    "dtype": "float32",
    "batch_size": 1,
    "phase": "prefill",
    "model": "synthetic, the size of smollm2-135m",
    "kind": "inspect",
    "gpus": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=int, help="a run id of the configured store; default: a made-up store")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the made-up run")
    parser.add_argument("--long", action="store_true", help="two long maps, at every zoom by itself")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.run is not None:
        with open_store() as store:
            report(measure(store, options.run, options.repeats), options.json)
        return
    if options.long:
        for length, mask in LONG:
            measured_long(length, mask, options.repeats, options.json)
        return
    with tempfile.TemporaryDirectory(prefix="attnlab-viewport-") as folder:
        url = f"sqlite:///{folder}/attnlab.db"
        write_run(url, options.tokens, Causal(), LAYERS, HEADS, KV_HEADS)
        with open_store(url) as store:
            report(measure(store, 1, options.repeats), options.json)


def measured_long(length: int, mask: Mask, repeats: int, as_json: bool) -> None:
    """The web process alone: a fresh process opens the store that a child process has written."""
    with tempfile.TemporaryDirectory(prefix="attnlab-viewport-") as folder:
        url = f"sqlite:///{folder}/attnlab.db"
        writer = get_context("spawn").Process(target=write_long, args=(url, length, mask))
        writer.start()
        writer.join()
        with open_store(url) as store:
            report(zooms(store, 1, length, repeats), as_json, f"{length:,} tokens, {mask.describe()}")


def zooms(store: Store, run_id: int, length: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Samples of each zoom: regions of that many tokens anywhere along the diagonal and below it."""
    rng = np.random.default_rng(0)
    found = {"first look: the overview is built": samples(lambda: build(store, run_id), 1, warm=False)}
    sizes = [length >> power for power in range(length.bit_length()) if length >> power >= 64]
    for size in [*sizes, 3400, 5000]:
        for reduce in ("max", "mean"):

            def step(size: int = size, reduce: str = reduce) -> None:
                top = int(rng.integers(length - size + 1))
                left = int(rng.integers(top + 1))
                region = (top, top + size), (left, left + size)
                assert overview_progress(store, run_id, 0, 0, *region) == 1
                viewport(store, run_id, 0, 0, *region, PIXELS, PIXELS, reduce)

            found[f"{size} x {size}, {reduce}"] = samples(step, repeats)
    return found


def build(store: Store, run_id: int) -> None:
    viewport(store, run_id, 0, 0, None, None, PIXELS, PIXELS, "max")


def measure(store: Store, run_id: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor milliseconds of every sample, by what was asked for."""
    rng = np.random.default_rng(0)
    traces = recorded(store, run_id)[1]
    length = traces[0].num_queries

    def place() -> tuple[int, int]:
        trace = traces[rng.integers(len(traces))]
        return trace.layer, int(rng.integers(trace.heads))

    def region() -> tuple[tuple[int, int], tuple[int, int]]:
        spans = []
        for _ in range(2):
            size = int(np.exp(rng.uniform(np.log(min(16, length)), np.log(length))))
            start = int(rng.integers(length - size + 1))
            spans.append((start, start + size))
        return spans[0], spans[1]

    def whole() -> None:
        viewport(store, run_id, *place(), None, None, PIXELS, PIXELS, "max")

    def mean() -> None:
        viewport(store, run_id, *place(), None, None, PIXELS, PIXELS, "mean")

    def anywhere() -> None:
        viewport(store, run_id, *place(), *region(), PIXELS, PIXELS, "max")

    def hover() -> None:
        cell(store, run_id, *place(), int(rng.integers(length)), int(rng.integers(length)))

    def signed() -> None:
        (layer, head), (layer_b, head_b) = place(), place()
        difference(store, run_id, run_id, layer, head, layer_b=layer_b, head_b=head_b)

    def strip() -> None:
        thumbnails(store, run_id, place()[0])

    few = max(5, repeats // 10)
    return {
        "whole map, max, from SQL": samples(whole, repeats, cold=True),
        "whole map, max, in memory": samples(whole, repeats),
        "whole map, mean, in memory": samples(mean, repeats),
        "anywhere, from SQL": samples(anywhere, repeats, cold=True),
        "anywhere, in memory": samples(anywhere, repeats),
        "one cell, from SQL": samples(hover, repeats, cold=True),
        "signed difference, whole map": samples(signed, few),
        "thumbnails of a layer": samples(strip, few),
        "anywhere, over HTTP": samples(over_http(store, run_id, place, region), repeats),
    }


def over_http(store: Store, run_id: int, place: Place, region: Region) -> Callable[[], None]:
    """The same as the page asks for it: the route, its checks and the bytes, without the socket."""
    app = FastAPI()
    api.install(app, store)
    client = TestClient(app)

    def step() -> None:
        (layer, head), (rows, cols) = place(), region()
        asked = {"layer": layer, "head": head, "height": PIXELS, "width": PIXELS}
        spans = {"rows": f"{rows[0]}:{rows[1]}", "cols": f"{cols[0]}:{cols[1]}"}
        assert client.get(f"/api/v1/runs/{run_id}/viewport", params=asked | spans).status_code == 200

    return step


def samples(
    step: Callable[[], None], repeats: int, *, cold: bool = False, warm: bool = True
) -> list[tuple[float, float]]:
    """(wall, processor) milliseconds of each repeat; ``cold`` forgets all arrays before each, ``warm`` tries once."""
    if warm:
        step()
    taken = []
    for _ in range(repeats):
        if cold:
            MEMORY.clear()
        start = time.perf_counter(), time.process_time()
        step()
        taken.append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])))
    return taken


def report(found: dict[str, list[tuple[float, float]]], as_json: bool, title: str = "") -> None:
    table = {}
    for name, taken in found.items():
        (wall, cpu), last = np.percentile(taken, 50, axis=0), np.percentile(taken, 95, axis=0)
        table[name] = {
            "p50_ms": float(wall),
            "p95_ms": float(last[0]),
            "cpu_p50_ms": float(cpu),
            "cpu_p95_ms": float(last[1]),
            "samples": len(taken),
        }
    if as_json:
        print(json.dumps({"title": title, "peak_bytes": peak_bytes(), "samples": table}, indent=1))
        return
    print(f"{title or 'SmolLM2-135M sized'}; peak memory of this process {peak_bytes() / 1e6:.0f} MB")
    threads, load = os.environ["OMP_NUM_THREADS"], os.getloadavg()[0]
    print(f"{PIXELS} x {PIXELS} pixels, {threads} thread(s), load {load:.1f} on {os.cpu_count()} processors")
    for name, row in table.items():
        wall = f"p50 {row['p50_ms']:6.1f} p95 {row['p95_ms']:6.1f}"
        cpu = f"p50 {row['cpu_p50_ms']:6.1f} p95 {row['cpu_p95_ms']:6.1f}"
        print(f"{name:30} wall ms {wall}   cpu ms {cpu}   n={row['samples']}")


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_long(url: str, length: int, mask: Mask) -> None:
    """One layer of 8 heads over 2 key heads."""
    write_run(url, length, mask, 1, 8, 2)


def write_run(url: str, length: int, mask: Mask, layers: int, heads: int, kv_heads: int) -> None:
    """A new store with one run, from random queries and keys, with their true log-sum-exp."""
    migrate(url)
    with open_store(url) as store:
        points = [POINT | {"sequence_length": length}]
        queued = queue.submit(store, name="made up", spec={}, spec_hash="0", points=points)
        claim = queue.claim(store, "benchmark", run_id=queued.run_ids[0])
        assert claim is not None
        rng, zero, group = np.random.default_rng(0), np.zeros(length), heads // kv_heads
        for layer in range(layers):
            query = rng.standard_normal((heads, length, HEAD_DIM), dtype=np.float32)
            key = rng.standard_normal((kv_heads, length, HEAD_DIM), dtype=np.float32)
            maps = [SoftmaxMap(query[h], key[h // group], zero, HEAD_DIM**-0.5, mask) for h in range(heads)]
            with np.errstate(divide="ignore"):
                lse = np.log(np.stack([each.row_sums() for each in maps]))
            with results.recording(store, claim) as session:
                row = trace_row(layer, length, mask, heads, kv_heads)
                results.record_trace(session, claim, row)
                tensors.write_tensor(session, claim, "query", layer, query)
                tensors.write_tensor(session, claim, "key", layer, key)
                tensors.write_tensor(session, claim, "lse", layer, lse, dtype="float64")
        queue.finish(store, claim, "succeeded", summary={"layers": layers, "heads": heads})


def trace_row(layer: int, length: int, mask: Mask, heads: int, kv_heads: int) -> results.TraceRow:
    return results.TraceRow(
        layer=layer,
        name=f"layers.{layer}",
        kind="softmax",
        scale=HEAD_DIM**-0.5,
        mask=mask.to_json(),
        heads=heads,
        kv_heads=kv_heads,
        num_queries=length,
        num_keys=length,
        head_dim=HEAD_DIM,
        dtype="float32",
        row_sum_defect=0.0,
        output_defect=0.0,
    )


if __name__ == "__main__":
    main()
