"""What an experiment will cost before it is queued: runs, bytes in the store, memory, and about how long."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnlab.bundled import BUNDLED, describe_model
from attnlab.probes.warming import expected_calls
from attnlab.serving.metrics import REQUEST_FIELDS, STEP_FIELDS
from attnlab.serving.settings import ServingSpec
from attnlab.serving.workload import draw_requests
from attnlab.spec import ExperimentSpec, RunPoint
from attnlab.spec_sections import FrontierSpec
from attnlab.views.labels import format_bytes
from attnlab.views.statistics import STATISTICS
from attnlab_kernels.catalog import MECHANISMS
from attnlab_kernels.masks import Causal, Full, Mask, Window
from attnlab_storage import results
from attnlab_storage.database import Store

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
PROCESS_BYTES = 700_000_000  # a worker that has imported torch and transformers
START_SECONDS = 5.0  # a child takes the run, the model is loaded and checked
CPU_FLOPS, GPU_FLOPS = 5e10, 2e13  # what a forward of a small model reaches; the rough in a rough guess
STATISTICS_ROW_BYTES = 120
HISTORY_POINTS = 64  # with more runs than this no history is looked up
_DENSE = ("eager", "sdpa_math")  # implementations that hold heads x n x n scores


@dataclass(frozen=True)
class Estimate:
    """The cost of an experiment.

    Attributes:
        runs: how many runs its grid has.
        stored_bytes: what all of them will add to the store.
        peak_bytes: what the process of the largest run will hold at most.
        seconds: all runs one after another; None where too little is known of the model.
        basis: where the seconds are from: "history", "rough", "limit" (at most), or "" when there are none.
        notes: what the numbers leave open.
        refusals: why it should not be queued, such as a disk that is too small.
    """

    runs: int
    stored_bytes: int
    peak_bytes: int
    seconds: float | None
    basis: str
    notes: list[str]
    refusals: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Shape:
    """What is known of the network that a run goes through; weights in float32 bytes."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    causal: bool
    weight_bytes: int


def estimate(spec: ExperimentSpec, store: Store | None = None) -> Estimate:
    """The cost of an experiment; with a store also from its history, and against its free disk."""
    points = spec.points()
    if spec.frontier is not None:
        return _search_estimate(len(points), spec.frontier)
    shape = shape_of(spec)
    if shape is None:
        where = f"nothing is known of {spec.model_name} on this machine: only the number of runs is"
        return Estimate(len(points), 0, 0, None, "", [f"{where} certain"], [])
    if spec.serving is not None:
        return _serving_estimate(spec, spec.serving, points, shape)
    notes: list[str] = []
    unknown = [point for point in points if not point.sequence_length]
    if unknown:
        notes.append("the text's length in tokens is not known here: counted as the model's whole context")
        points = [_with_length(point, spec) for point in points]
    stored = sum(stored_bytes(spec, point, shape) for point in points)
    peak = max(peak_bytes(point, shape) for point in points)
    seconds, basis = _seconds(spec, points, shape, store)
    if basis == "rough":
        notes.append("the time is rough (no like run in the history): right within ten times, not closer")
    if any(point.implementation in _DENSE for point in points):
        notes.append("eager and sdpa_math hold a score for every query and key: memory grows with the square")
    return Estimate(len(points), stored, peak, seconds, basis, notes, disk_refusals(stored, store))


def _search_estimate(runs: int, given: FrontierSpec) -> Estimate:
    """A search holds what it was given, and takes at most its limit for every length that it tries."""
    trials = given.trials()
    notes = [
        f"each run tries at most {trials} lengths, each in a process of its own within "
        f"{format_bytes(given.memory_bytes)}; the time is the longest that they may take"
    ]
    seconds = runs * (START_SECONDS + (trials + 1) * given.seconds)  # once more to name the kernels
    return Estimate(runs, 0, PROCESS_BYTES + given.memory_bytes, seconds, "limit", notes, [])


def _serving_estimate(
    spec: ExperimentSpec, serving: ServingSpec, points: list[RunPoint], shape: Shape
) -> Estimate:
    """Every token goes through the weights once a pass; what is stored is the timeline."""
    requests = draw_requests(serving.workload, spec.seed)
    tokens = sum(request.tokens for request in requests)
    stored = len(points) * 8 * (tokens * (1 + len(STEP_FIELDS)) + len(requests) * len(REQUEST_FIELDS))
    size = max(BYTES[point.dtype] for point in points)
    row = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    cache = serving.cache_bytes or (serving.num_blocks or 0) * serving.block_size * row
    layers = serving.layers if spec.module is not None else 1
    peak = PROCESS_BYTES + layers * shape.weight_bytes * size // 4 + cache
    flops = 2 * layers * shape.weight_bytes / 4 * tokens * (spec.repeats + 1)
    # the rest of a step is as long whatever its size: about a millisecond a layer and sequence
    overhead = 1e-3 * layers * shape.layers * tokens * (spec.repeats + 1)
    speed = GPU_FLOPS if spec.resources.gpus else CPU_FLOPS
    seconds = len(points) * (START_SECONDS + flops / speed + overhead)
    note = "the time is rough: it depends on how many requests run at once"
    return Estimate(len(points), stored, peak, seconds, "rough", [note], [])


def shape_of(spec: ExperimentSpec) -> Shape | None:
    """The network's shape, or None where nothing on this machine says."""
    if spec.module is not None:
        dim, heads = spec.module.dim, spec.module.num_heads
        kv_heads = spec.module.num_kv_heads or heads
        return Shape(1, heads, kv_heads, dim // heads, dim, True, 4 * 4 * dim * dim)
    facts = describe_model(spec.model or "")
    if facts is None or not (facts.layers and facts.heads and facts.head_dim and facts.hidden):
        return None
    known = BUNDLED.get(spec.model or "")
    weights = known.disk_bytes if known else 4 * 12 * facts.layers * facts.hidden**2
    kv_heads = facts.kv_heads or facts.heads
    return Shape(
        facts.layers, facts.heads, kv_heads, facts.head_dim, facts.hidden, facts.causal is not False, weights
    )


def stored_bytes(spec: ExperimentSpec, point: RunPoint, shape: Shape) -> int:
    """Q, K, log-sum-exp and value norms of the layers kept (of batch element 0), and the rows of statistics."""
    layers = shape.layers if spec.layers == "all" else len([x for x in spec.layers if int(x) < shape.layers])
    kv_heads = min(shape.kv_heads, int(point.parameters.get("num_kv_heads") or shape.kv_heads))
    keys = point.sequence_length
    queries = spec.decoded or keys
    size = min(BYTES[point.dtype], 4)  # float64 is kept as float32
    maps = (shape.heads * queries + kv_heads * keys) * shape.head_dim * size
    maps += shape.heads * queries * 8 + kv_heads * keys * 4
    rows = shape.layers * shape.heads * len(STATISTICS) * STATISTICS_ROW_BYTES
    return layers * maps * ("maps" in spec.record) + rows * ("statistics" in spec.record)


def peak_bytes(point: RunPoint, shape: Shape) -> int:
    """Weights, activations of one layer, scores where the implementation holds them, and the process itself."""
    size = BYTES[point.dtype]
    tokens = point.batch_size * point.sequence_length
    weights = shape.weight_bytes * size // 4
    # residual, Q, K, V, output and a feed-forward of four times the width with its gate
    activations = 14 * tokens * shape.hidden * size
    if point.phase == "train":
        activations *= shape.layers
        weights *= 2
    queries = 1 if point.phase == "decode" else point.sequence_length
    scores = 0
    if point.implementation in _DENSE:
        scores = 2 * point.batch_size * shape.heads * queries * point.sequence_length * size
        scores *= shape.layers if point.phase == "train" else 1
    return PROCESS_BYTES + weights + activations + scores


def cache_formula(spec: ExperimentSpec, point: RunPoint, tokens: int) -> dict[str, Any]:
    """What the catalog says that a cache of so many tokens takes, the whole batch together; empty if unknown.

    ``formula_bytes`` and ``formula`` in words, in the mechanism's own parameters.
    """
    shape = shape_of(spec)
    if shape is None:
        return {}
    record = MECHANISMS[point.mechanism]
    heads = shape.heads if spec.model is None else shape.kv_heads  # a model's heads come in its own groups
    one = record.cache_bytes(
        heads,
        shape.kv_heads,
        shape.head_dim,
        tokens,
        shape.layers,
        BYTES[point.dtype],
        **point.parameters,
    )
    return {"formula_bytes": one * point.batch_size, "formula": record.cache_formula}


def forward_flops(point: RunPoint, shape: Shape) -> float:
    """Operations of one forward pass: two for each weight and token, four for each allowed pair and head entry."""
    weights = 2 * (shape.weight_bytes / 4) * _queries(point) * point.batch_size
    return weights + shape.layers * attention_flops(point, shape, _mask(point, shape))


def attention_flops(point: RunPoint, shape: Shape, mask: Mask) -> float:
    """Operations of the attention of one layer."""
    queries, keys = _queries(point), point.sequence_length
    pairs = queries * keys if point.implementation in _DENSE else mask.count(queries, keys)
    return 4 * point.batch_size * pairs * shape.head_dim * shape.heads


def _queries(point: RunPoint) -> int:
    return 1 if point.phase == "decode" else point.sequence_length


def disk_refusals(needed: int, store: Store | None) -> list[str]:
    """A sentence where the results would not fit on the disk of an embedded store."""
    if store is None or store.path is None:
        return []
    free = shutil.disk_usage(store.path.parent).free
    if needed <= free:
        return []
    sizes = f"the results need {format_bytes(needed)}, the disk of {store.path} has {format_bytes(free)} free"
    return [f"{sizes}: record fewer layers, shorter sequences or a smaller dtype, or make room"]


def _seconds(
    spec: ExperimentSpec, points: list[RunPoint], shape: Shape, store: Store | None
) -> tuple[float, str]:
    told: list[float | None] = [None] * len(points)
    if store is not None and len(points) <= HISTORY_POINTS:
        told = [_from_history(store, spec, point) for point in points]
    rough = [_rough_seconds(spec, point, shape) for point in points]
    total = sum(guess if known is None else known for known, guess in zip(told, rough, strict=True))
    return total, "rough" if None in told else "history"


def _rough_seconds(spec: ExperimentSpec, point: RunPoint, shape: Shape) -> float:
    record = set(spec.record)
    speed = (GPU_FLOPS if point.gpus else CPU_FLOPS) / (3 if point.phase == "train" else 1)
    whole = forward_flops(point, shape) / speed
    passes = ("maps" in record) + 2 * ("memory" in record) + 2 * bool(record & {"accuracy", "statistics"})
    seconds = START_SECONDS + (passes + 1) * whole  # one to find the attention whose kernels are named
    if "timing" not in record:
        return seconds
    attention = attention_flops(point, shape, _mask(point, shape)) / speed
    timed = [whole, attention]
    if spec.reference is not None:
        plain = replace(point, implementation="auto")
        timed += [attention, attention_flops(plain, shape, Causal()) / speed]
    if spec.module is None:  # on the model's own inputs and on random ones in turn
        timed += [attention, attention]
    return seconds + sum((spec.repeats + expected_calls(one)) * one for one in timed)


def _from_history(store: Store, spec: ExperimentSpec, point: RunPoint) -> float | None:
    """The median time of finished runs that did the same work; None if there are none."""
    keys = ("model", "mechanism", "implementation", "sequence_length", "dtype", "batch_size", "phase")
    filters = {key: getattr(point, key) for key in keys} | {"state": "succeeded"}
    took = []
    for run in results.list_runs(store, filters=filters, limit=20).rows:
        same = run.parameters == point.parameters and run.gpus == point.gpus
        if same and run.started_at is not None and run.finished_at is not None:
            before = results.get_experiment(store, run.experiment_id)
            if before is not None and _same_work(before.spec, spec):
                took.append(run.finished_at - run.started_at)
    return statistics.median(took) if took else None


def _same_work(before: dict[str, Any], spec: ExperimentSpec) -> bool:
    now = spec.to_dict()
    same = all(before.get(key) == now.get(key) for key in ("repeats", "layers"))
    return same and set(before.get("record") or ()) == set(spec.record)


def _mask(point: RunPoint, shape: Shape) -> Mask:
    window = point.parameters.get("window_size")
    if window:
        return Window(int(window) - 1, 0 if shape.causal else int(window) - 1)
    return Causal() if shape.causal else Full()


def _with_length(point: RunPoint, spec: ExperimentSpec) -> RunPoint:
    if point.sequence_length:
        return point
    facts = describe_model(spec.model or "")
    longest = (facts and facts.context) or 2048
    return replace(point, sequence_length=min(longest, spec.input.max_tokens or longest))
