"""The serving engine on bare attention: every request comes out as if it had been alone, and no room is lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.serving.bare import BareRunner
from attnlab.serving.engine import CacheShape, cut_cache, serve
from attnlab.serving.settings import Lengths, ServingSpec, Workload
from attnlab.serving.timeline import Timeline
from attnlab.serving.workload import Request, draw_requests
from attnlab_kernels.operations.softmax.api import Unsupported

LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("multi_head", {}),
    ("grouped_query", {"num_kv_heads": 2}),
    ("multi_head_latent", LATENT),
]
ANY = Workload(requests=1, prompt_tokens=Lengths(tokens=1), output_tokens=Lengths(tokens=1))


def runner_of(mechanism: str, parameters: dict[str, Any], **changed: Any) -> BareRunner:
    given: dict[str, Any] = {
        "dim": 8,
        "num_heads": 4,
        "layers": 2,
        "dtype": torch.float64,
        "keep_outputs": True,
    }
    return BareRunner(mechanism, parameters, **given | changed)


def engine(**changed: Any) -> ServingSpec:
    return ServingSpec.model_validate({"workload": ANY, "num_blocks": 99, "block_size": 4} | changed)


def check_books(requests: list[Request], timeline: Timeline, spec: ServingSpec) -> None:
    ends = [0.0]
    for step in timeline.steps:
        assert 1 <= step.prompt_tokens + step.decode_tokens <= spec.token_budget
        assert step.running <= spec.max_batch
        assert 0 < step.used <= step.reserved <= timeline.total_tokens
        assert 0 <= step.stranded <= timeline.total_tokens - step.reserved
        assert ends[-1] <= step.start <= step.end
        ends.append(step.end)
    computed = sum(step.prompt_tokens + step.decode_tokens for step in timeline.steps)
    assert computed == sum(served.computed for served in timeline.requests)
    assert [served.request for served in timeline.requests] == requests
    for served in timeline.requests:
        assert len(served.tokens_at) == served.request.output_tokens
        assert served.request.arrival <= served.started < served.tokens_at[0]
        assert all(a < b for a, b in itertools.pairwise(served.tokens_at))
        assert set(served.tokens_at) <= set(ends)
        # without preemption every token is computed once, but for those that were shared
        least = served.request.tokens - served.reused
        assert served.computed >= least
        assert served.preemptions or served.computed == least


REQUESTS = st.lists(
    st.tuples(st.floats(0, 0.02), st.integers(1, 13), st.integers(1, 6)), min_size=1, max_size=5
)


@given(
    st.sampled_from(KINDS), st.booleans(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), REQUESTS
)
@settings(max_examples=12, deadline=None)
def test_every_request_comes_out_as_if_it_had_been_alone(kind, contiguous, chunk, budget, batch, rows):
    requests = [Request(i, *row) for i, row in enumerate(rows)]
    longest = max(request.tokens for request in requests)
    spec = engine(
        chunk_size=chunk, token_budget=budget, max_batch=batch, num_blocks=-(-longest // 3) + 2, block_size=3
    )
    runner = runner_of(*kind)
    shape = cut_cache(spec, "contiguous" if contiguous else "paged", longest, runner.token_bytes)
    timeline = serve(requests, runner, shape, spec)
    check_books(requests, timeline, spec)
    for request in requests:
        torch.testing.assert_close(runner.outputs[request.id], runner.alone(request), rtol=1e-9, atol=1e-9)


def test_preempted_requests_come_out_the_same():
    requests = [Request(i, 0.0, 4, 12) for i in range(4)]
    spec = engine(num_blocks=6, block_size=4)
    runner = runner_of("grouped_query", {"num_kv_heads": 2})
    timeline = serve(requests, runner, CacheShape(6, 4, runner.token_bytes), spec)
    check_books(requests, timeline, spec)
    assert sum(step.preempted for step in timeline.steps) == sum(s.preemptions for s in timeline.requests) > 0
    assert any(step.stranded for step in timeline.steps)
    for request in requests:
        torch.testing.assert_close(runner.outputs[request.id], runner.alone(request), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mechanism", "parameters"), KINDS)
def test_a_shared_prefix_is_computed_once_and_changes_no_output(mechanism, parameters):
    requests = [Request(i, 0.0, 14 + i, 3) for i in range(5)]
    spec = engine(prefix_sharing=True, max_batch=2)
    runner = runner_of(mechanism, parameters, shared_prefix=10)
    timeline = serve(requests, runner, CacheShape(99, 4, runner.token_bytes), spec)
    check_books(requests, timeline, spec)
    # two full blocks of the ten tokens, for all but those that began before the first was computed
    assert [served.reused for served in timeline.requests] == [0, 0, 8, 8, 8]
    for request in requests:
        wanted = runner.alone(request)
        kept = runner.outputs[request.id]
        first = timeline.requests[request.id].reused
        assert kept[:first].isnan().all()
        torch.testing.assert_close(kept[first:], wanted[first:], rtol=1e-9, atol=1e-9)


def test_what_lies_in_free_slots_is_never_read(monkeypatch):
    def poisoned(*sizes: int, **options: Any) -> torch.Tensor:
        return torch.full(sizes, torch.nan, **options)

    runner = runner_of("multi_head", {})
    monkeypatch.setattr(torch, "empty", poisoned)
    requests = [Request(i, 0.0, 5 + i, 4) for i in range(3)]
    serve(requests, runner, CacheShape(9, 4, runner.token_bytes), engine())
    for request in requests:
        torch.testing.assert_close(runner.outputs[request.id], runner.alone(request), rtol=1e-9, atol=1e-9)


def test_time_jumps_to_the_next_arrival_and_requests_wait_for_theirs():
    requests = [Request(0, 0.0, 3, 2), Request(1, 1000.0, 3, 2)]
    runner = runner_of("multi_head", {})
    timeline = serve(requests, runner, CacheShape(9, 4, runner.token_bytes), engine())
    first, second = timeline.requests
    assert first.finished < 500
    assert second.started == 1000.0
    assert 1000 < timeline.seconds < 1500


def test_a_contiguous_cache_sets_the_longest_aside_and_pages_what_is_needed():
    spec = engine(cache_bytes=64 * 100, num_blocks=None, max_length=25, block_size=4)
    assert cut_cache(spec, "contiguous", 20, 64) == CacheShape(4, 25, 64)
    assert cut_cache(spec, "paged", 20, 64) == CacheShape(25, 4, 64)
    requests = [Request(i, 0.0, 5, 3) for i in range(8)]
    most = {}
    for kind in ("contiguous", "paged"):
        runner = runner_of("multi_head", {})
        timeline = serve(requests, runner, cut_cache(spec, kind, 7, 64), spec)
        most[kind] = max(step.running for step in timeline.steps)
        assert timeline.total_tokens == 100
    assert most == {"contiguous": 4, "paged": 8}


def test_a_cache_that_cannot_hold_the_longest_request_is_refused():
    spec = engine(num_blocks=3, block_size=4)
    with pytest.raises(Unsupported, match=r"serving\.num_blocks: must hold the longest sequence, 13 tokens"):
        cut_cache(spec, "paged", 13, 64)
    with pytest.raises(Unsupported, match="a contiguous cache holds 0 here"):
        cut_cache(spec, "contiguous", 13, 64)
    runner = runner_of("multi_head", {})
    with pytest.raises(ValueError, match="request 0 must fit the cache of 12 tokens; it has 13"):
        serve([Request(0, 0.0, 10, 4)], runner, CacheShape(3, 4, 64), spec)


def test_the_same_seed_draws_the_same_requests():
    lognormal = Lengths(distribution="lognormal", median=20, sigma=1.0, low=3, high=50)
    workload = Workload.model_validate(
        {
            "requests": 400,
            "arrivals": {"process": "poisson", "rate": 5},
            "prompt_tokens": lognormal,
            "output_tokens": {"distribution": "uniform", "low": 2, "high": 6},
        }
    )
    drawn = draw_requests(workload, 3)
    assert drawn == draw_requests(workload, 3) != draw_requests(workload, 4)
    assert {request.output_tokens for request in drawn} == {2, 3, 4, 5, 6}
    assert min(r.prompt_tokens for r in drawn) >= 3
    assert max(r.prompt_tokens for r in drawn) == 50
    assert drawn[0].arrival == 0
    assert drawn[-1].arrival == pytest.approx(399 / 5, rel=0.2)
    middle = sorted(request.prompt_tokens for request in drawn)[200]
    assert middle == pytest.approx(20, rel=0.15)
