"""The rules of phase serving: a workload that can be drawn, an engine that can hold it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..bundled import describe_model
from ..problems import Problem, shown
from .settings import MAX_WORKLOAD_TOKENS, MECHANISMS, Lengths, ServingSpec, Workload
from .workload import draw_requests

if TYPE_CHECKING:
    from ..spec import ExperimentSpec

IMPLEMENTATIONS = ("auto", "eager", "triton")
RECORDS = ("timing", "accuracy")
NEEDED = {"fixed": ("tokens",), "uniform": ("high",), "lognormal": ("median", "sigma")}
ALLOWED = {"fixed": ("tokens",), "uniform": ("low", "high"), "lognormal": ("median", "sigma", "low", "high")}


def serving_rules(spec: ExperimentSpec) -> Iterator[Problem]:
    """Return every rule of phase serving that the spec breaks."""
    if spec.phase != "serving":
        if spec.serving is not None:
            yield Problem("phase", "must be serving with a serving section", shown(spec.phase), ("serving",))
        if spec.vary.cache is not None:
            yield Problem("vary.cache", "is for phase serving", shown(list(spec.vary.cache)))
        return
    if spec.serving is None:
        yield Problem("serving", "must be given with phase serving: a workload and the memory of the cache")
        return
    yield from _grid(spec)
    if spec.input.repeat:
        rule = (
            "has no effect in phase serving, where a prompt that is longer than the text says it again anyway"
        )
        yield Problem("input.repeat", rule, "true", ("false",))
    yield from _engine(spec, spec.serving)
    # a workload that is broken has no requests to hold against the rest
    broken = list(_workload(spec.serving.workload))
    yield from broken or _requests(spec, spec.serving)


def _grid(spec: ExperimentSpec) -> Iterator[Problem]:
    if spec.frontier is not None:
        yield Problem("frontier", "must not be given in phase serving, whose lengths are of the workload")
    for index, mechanism in enumerate(spec.vary.mechanism):
        if mechanism.name not in MECHANISMS:
            rule = "must be one that the engine serves (pages are vary.cache)"
            yield Problem(f"vary.mechanism[{index}]", rule, shown(mechanism.name), MECHANISMS)
    for name in spec.vary.implementation:
        if name not in IMPLEMENTATIONS:
            yield Problem("vary.implementation", "must read a paged cache", shown(name), IMPLEMENTATIONS)
    if spec.vary.sequence_length is not None:
        rule = "must not be given in phase serving: lengths are of serving.workload"
        yield Problem("vary.sequence_length", rule, shown(list(spec.vary.sequence_length)))
    if spec.vary.batch_size != (1,):
        rule = "must not be given in phase serving: the most sequences at a time are serving.max_batch"
        yield Problem("vary.batch_size", rule, shown(list(spec.vary.batch_size)))
    for name in spec.record:
        if name not in RECORDS:
            yield Problem("record", "is not recorded in phase serving", shown(name), RECORDS)


def _engine(spec: ExperimentSpec, serving: ServingSpec) -> Iterator[Problem]:
    if (serving.cache_bytes is None) == (serving.num_blocks is None):
        given = "neither" if serving.cache_bytes is None else "both"
        yield Problem("serving.cache_bytes", "exactly one of cache_bytes and num_blocks must be given", given)
    if spec.module is None and serving.layers != 1:
        yield Problem("serving.layers", "is for bare modules: a model has its own", str(serving.layers))
    if serving.prefix_sharing and spec.vary.cache == ("contiguous",):
        yield Problem("serving.prefix_sharing", "needs vary.cache paged", "true", ("paged",))


def _workload(workload: Workload) -> Iterator[Problem]:
    drawn = ("prompt_tokens", "output_tokens")
    if workload.trace is not None:
        for name in drawn:
            if getattr(workload, name) is not None:
                yield Problem(f"serving.workload.{name}", "must not be given with a trace, which has lengths")
        return
    for name in ("requests", *drawn):
        if getattr(workload, name) is None:
            yield Problem(f"serving.workload.{name}", "must be given, or a trace")
    arrivals = workload.arrivals
    if (arrivals.rate is None) == (arrivals.process == "poisson"):
        rule = "must be given for poisson" if arrivals.rate is None else "is for poisson"
        yield Problem(
            "serving.workload.arrivals.rate", rule, "" if arrivals.rate is None else str(arrivals.rate)
        )
    for name in drawn:
        if (lengths := getattr(workload, name)) is not None:
            yield from _lengths(f"serving.workload.{name}", lengths)


def _lengths(argument: str, lengths: Lengths) -> Iterator[Problem]:
    kind = lengths.distribution
    for name in NEEDED[kind]:
        if getattr(lengths, name) is None:
            yield Problem(f"{argument}.{name}", f"must be given for {kind}")
    for name in ("tokens", "median", "sigma", "low", "high"):
        if name not in ALLOWED[kind] and (value := getattr(lengths, name)) is not None:
            yield Problem(f"{argument}.{name}", f"is not of {kind}", shown(value), ALLOWED[kind])
    if lengths.low and lengths.high and lengths.high < lengths.low:
        yield Problem(f"{argument}.high", f"must be at least low ({lengths.low})", str(lengths.high))


def _requests(spec: ExperimentSpec, serving: ServingSpec) -> Iterator[Problem]:
    requests = draw_requests(serving.workload, spec.seed)
    tokens = sum(request.tokens for request in requests)
    if tokens > MAX_WORKLOAD_TOKENS:
        rule = f"all requests together may have at most {MAX_WORKLOAD_TOKENS} tokens"
        yield Problem("serving.workload", rule, str(tokens))
    longest = max(requests, key=lambda request: request.tokens)
    limits = {
        "serving.max_length": serving.max_length,
        "serving.num_blocks": serving.num_blocks and serving.num_blocks * serving.block_size,
    }
    facts = describe_model(spec.model) if spec.model is not None else None
    if facts is not None:
        limits["serving.workload"] = facts.context
        if facts.reads != "text" or facts.causal is False:
            yield Problem("model", "must be a decoder of text to be served", shown(spec.model))
    for argument, limit in limits.items():
        if limit and longest.tokens > limit:
            rule = f"must be at most {limit} tokens a request here, and request {longest.id} takes"
            yield Problem(argument, rule, str(longest.tokens))
