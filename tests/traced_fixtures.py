"""A made-up experiment: runs, traces and numbers that a test knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from attnlab_kernels.masks import Causal, Mask, Window
from attnlab_storage import queue, results, tensors
from attnlab_storage.database import Store

POINT: dict[str, Any] = {
    "mechanism": "multi_head",
    "parameters": {},
    "implementation": "auto",
    "sequence_length": 7,
    "dtype": "float32",
    "batch_size": 1,
    "phase": "prefill",
    "model": "made-up",
    "kind": "inspect",
    "gpus": 0,
}
"""of a grid"""


@pytest.fixture
def point() -> Callable[..., dict[str, Any]]:
    """Makes a point of a grid: ``point(mechanism="flash")``."""
    return lambda **changed: POINT | changed


@dataclass
class Traced:
    """A recorded experiment and the numbers it was made of: arrays by (run id, layer) and name."""

    store: Store
    experiment_id: int
    run_ids: list[int]
    tokens: list[str]
    arrays: dict[tuple[int, int], dict[str, np.ndarray]]

    def reference(self, run_id: int, layer: int, head: int) -> np.ndarray:
        """The map as plain softmax in float64."""
        part = self.arrays[run_id, layer]
        scores = _scores(part, head)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture(scope="session")
def make_traced() -> Callable[..., Traced]:
    """Writes a made-up experiment through the real storage API: random Q and K, their LSE, and measurements.

    The first run is causal ``multi_head``, the second a causal ``sliding_window``; every name in ``outcomes``
    adds a run that ended so. ``words``: the tokens, ``tokens`` of them, where not the usual ones.
        ``model``: what the runs say they are of.
    """

    def make(
        store: Store,
        *,
        tokens: int = 77,
        layers: int = 2,
        outcomes: Sequence[str] = (),
        seed: int = 0,
        words: Sequence[str] = (),
        model: str = "made-up",
    ) -> Traced:
        points = [
            _point("multi_head", {}, tokens),
            _point("sliding_window", {"window_size": 16}, tokens),
            *(_point("flash", {}, tokens) for _ in outcomes),
        ]
        points = [point | {"model": model} for point in points]
        spec = {"name": "made up <b>&", "model": "made-up", "vary": {"mechanism": ["multi_head"]}}
        queued = queue.submit(store, name=spec["name"], spec=spec, spec_hash="0" * 64, points=points)
        usual = [f"Ġtoken{i}" for i in range(tokens - 2)] + ["<script>alert(1)</script>", "Ċ"]
        traced = Traced(store, queued.experiment_id, queued.run_ids, list(words) or usual, {})
        rng = np.random.default_rng(seed)
        masks = [Causal(), Window(15)]
        for run_id, mask in zip(queued.run_ids, masks, strict=False):
            claim = queue.claim(store, "tests", run_id=run_id)
            assert claim is not None
            _write_run(traced, claim, mask, layers, rng)
            queue.finish(store, claim, "succeeded", summary=_summary(claim, layers))
        for run_id, outcome in zip(queued.run_ids[2:], outcomes, strict=True):
            claim = queue.claim(store, "tests", run_id=run_id)
            assert claim is not None
            queue.finish(store, claim, outcome, reason=f"made to be {outcome}", error_kind="made")
        return traced

    return make


@pytest.fixture
def traced(sqlite_store: Store, make_traced: Callable[..., Traced]) -> Traced:
    """Two succeeded runs of 77 tokens, 2 layers, 4 heads over 2 key heads, in a fresh SQLite store."""
    return make_traced(sqlite_store)


def _point(mechanism: str, parameters: dict[str, Any], tokens: int) -> dict[str, Any]:
    changed = {"mechanism": mechanism, "parameters": parameters, "sequence_length": tokens}
    return POINT | changed | {"kind": "bench"}


def _summary(claim: queue.Claim, layers: int) -> dict[str, Any]:
    swap = "exact" if claim.point["mechanism"] == "multi_head" else "approximate"
    chosen = "sdpa_flash" if swap == "exact" else "banded"
    facts = {"layers": layers, "heads": 4, "kernels": ["aten::bmm"], "swap": swap, "latency_ms": 2.0}
    return facts | {"implementation": chosen}


def _write_run(traced: Traced, claim: queue.Claim, mask: Mask, layers: int, rng: np.random.Generator) -> None:
    length = len(traced.tokens)
    with results.recording(traced.store, claim) as session:
        results.record_environment(session, claim, {"device": "cpu", "torch": "2.13.0", "threads": 1})
        results.record_input(session, claim, results.InputRow("a text", traced.tokens, traced.tokens))
        results.record_measurements(session, claim, _measured(layers, rng))
        for layer in range(layers):
            part = {
                "query": rng.standard_normal((4, length, 8), dtype=np.float32) * 2,
                "key": rng.standard_normal((2, length, 8), dtype=np.float32) * 2,
                "allowed": mask.allowed(
                    np.arange(length), np.arange(length), num_queries=length, num_keys=length
                ),
            }
            traced.arrays[claim.run_id, layer] = part
            scores = np.stack([_scores(part, head) for head in range(4)])
            peak = scores.max(axis=2, keepdims=True)
            lse = peak[..., 0] + np.log(np.exp(scores - peak).sum(axis=2))
            results.record_trace(session, claim, _trace(layer, mask, length))
            for name, array in (("query", part["query"]), ("key", part["key"]), ("lse", lse)):
                tensors.write_tensor(session, claim, name, layer, array.astype(np.float32), chunk_tokens=32)


def _trace(layer: int, mask: Mask, length: int) -> results.TraceRow:
    return results.TraceRow(
        layer=layer,
        name=f"layers.{layer}",
        kind="softmax",
        scale=8**-0.5,
        mask=mask.to_json(),
        heads=4,
        kv_heads=2,
        num_queries=length,
        num_keys=length,
        head_dim=8,
        dtype="float32",
        row_sum_defect=1e-7 * (layer + 1),
        output_defect=2e-7 * (layer + 1),
    )


def _measured(layers: int, rng: np.random.Generator) -> list[results.MeasurementRow]:
    samples = (2.0 + rng.random(5)).tolist()
    rows = [
        results.MeasurementRow("latency", float(np.median(samples)), "ms", samples=samples),
        results.MeasurementRow("attention_latency", 0.25, "ms", samples=[0.2, 0.25, 0.3]),
        results.MeasurementRow("peak_memory", 3_000_000.0, "bytes", detail={"method": "made up"}),
        results.MeasurementRow("attention_peak_memory", 2e6, "bytes", detail={"floor_bytes": 1_000_000}),
        results.MeasurementRow("kl", 0.01, "nats"),
        results.MeasurementRow("logit_error", 1e-5, "1"),
    ]
    for layer in range(layers):
        rows += [results.MeasurementRow("entropy", rng.random(), "nats", layer, head) for head in range(4)]
    return rows


def _scores(part: dict[str, np.ndarray], head: int) -> np.ndarray:
    query, key = part["query"][head].astype(np.float64), part["key"][head // 2].astype(np.float64)
    return np.where(part["allowed"], query @ key.T * 8**-0.5, -np.inf)
