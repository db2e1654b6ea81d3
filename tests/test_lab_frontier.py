"""The longest that fits: found by bisection, in processes that cannot take more than they are given."""

import math
from typing import Any

import pytest

from attnlab import frontier_search
from attnlab.describe import run_document
from attnlab.estimate import estimate
from attnlab.probes.frontier import Trial, find_frontier, frontier_detail
from attnlab.problems import SpecError
from attnlab.run import run_here
from attnlab.spec import RunPoint, parse_spec
from attnlab.spec_sections import FrontierSpec
from attnlab.trials import Trials
from attnlab_storage import results

BUDGET = 100_000_000
NO_BUILD = {"launches": [], "package": None, "inductor": None}
SPEC: dict[str, Any] = {
    "name": "frontier",
    "module": {"dim": 64, "num_heads": 4},
    "vary": {"mechanism": ["multi_head"], "implementation": ["eager", "sdpa_flash", "flash_attn_2"]},
    "frontier": {"up_to": 4096, "memory_bytes": BUDGET, "first": 512, "resolution": 128},
    "record": ["memory"],
}


@pytest.mark.parametrize("resolution", [1, 7, 64])
@pytest.mark.parametrize("first", [2, 100, 1000])
def test_the_frontier_is_found_whatever_it_is(first: int, resolution: int) -> None:
    most = FrontierSpec(up_to=1000, memory_bytes=1 << 20, first=first, resolution=resolution).trials()
    for truth in (*range(2, 1000, 13), 999, 1000):
        trials = find_frontier(
            lambda tokens, truth=truth: Trial(
                tokens, "fits" if tokens <= truth else "out_of_memory", "", None, 0.0
            ),
            first=first,
            up_to=1000,
            resolution=resolution,
        )
        detail = frontier_detail(trials, 5, resolution)
        tried = [trial.tokens for trial in trials]
        assert len(set(tried)) == len(tried) <= most
        assert 2 <= min(tried) <= max(tried) <= 1000
        if truth == 1000:
            assert (detail["fits"], detail["fails"]) == (1000, None)
        else:
            fails = detail["fails"]["tokens"]
            assert detail["fits"] <= truth < fails
            assert fails - max(detail["fits"], 1) <= max(1, resolution)


def test_what_ends_it_is_the_reason_of_the_shortest_that_does_not_fit() -> None:
    trials = [
        Trial(8, "fits", "", 5, 0.1),
        Trial(32, "timed_out", "slow", None, 9),
        Trial(16, "out_of_memory", "b", None, 1),
    ]
    detail = frontier_detail(trials, 5, 8)
    assert detail["fails"] == {"tokens": 16, "outcome": "out_of_memory", "reason": "b"}
    assert [trial["tokens"] for trial in detail["trials"]] == [8, 16, 32]
    assert frontier_detail([], 5, 8)["fits"] == 0


def test_each_mechanism_has_a_frontier_with_the_bytes_that_were_asked_for(sqlite_store: Any) -> None:
    spec = parse_spec(SPEC)
    runs = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, spec))
    assert [run.state for run in runs] == ["succeeded", "succeeded", "unsupported"]
    eager, flash, _ = (run_document(sqlite_store, run.id)["frontier"] for run in runs)
    fails = eager["fails"]
    assert 512 <= eager["fits"] < fails["tokens"] <= eager["fits"] + 128
    assert fails["outcome"] == "out_of_memory"
    # it is the scores or their softmax, one number for each query, key and head, that do not fit
    assert f"({4 * 4 * fails['tokens'] ** 2} bytes)" in fails["reason"]
    assert all(trial["peak_bytes"] < 1.3 * BUDGET for trial in eager["trials"] if trial["outcome"] == "fits")
    assert (flash["fits"], flash["fails"]) == (4096, None)
    assert "tokens: out of memory: asked for" in results.log_tail(sqlite_store, runs[0].id)
    assert run_document(sqlite_store, runs[0].id)["environment"]["versions"]
    named = [run_document(sqlite_store, run.id)["kernels"] for run in runs[:2]]
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [fused in names for names in named] == [False, True]
    assert "aten::bmm" in named[0]
    assert [run_document(sqlite_store, run.id)["chosen"] for run in runs[:2]] == ["eager", "sdpa_flash"]
    assert [run_document(sqlite_store, run.id)["provenance"] for run in runs[:2]] == [NO_BUILD, NO_BUILD]


def test_a_trial_that_names_its_kernels_keeps_what_launched_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    changed = {"vary": {"mechanism": ["multi_head"], "implementation": ["triton"]}}
    spec = parse_spec(SPEC | changed)
    with Trials(spec, spec.points()[0], "cpu", memory_bytes=BUDGET, seconds=60) as trials:
        named = trials.attempt(32, name_kernels=True)
    assert (named.outcome, named.implementations) == ("fits", ["triton"])
    launch = named.provenance["launches"][0]
    assert launch["block_m"] > 0
    assert "kernel" in launch


def test_a_trial_that_is_too_slow_or_cannot_even_begin_ends_alone() -> None:
    spec = parse_spec(SPEC)
    point: RunPoint = spec.points()[0]
    with Trials(spec, point, "cpu", memory_bytes=1 << 20, seconds=60) as trials:
        assert trials.attempt(2048).outcome == "out_of_memory"
        assert trials.attempt(2048).outcome == "out_of_memory"
        trials._order["memory_bytes"] = BUDGET
        assert trials.attempt(64).fits
        trials._order["seconds"] = 0.0
        slow = trials.attempt(64)
        assert (slow.outcome, slow.reason) == ("timed_out", "it took longer than 0 s")


def test_no_budget_takes_what_the_machine_lives_from(
    sqlite_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier_search, "available", lambda: BUDGET)
    (run, *_) = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, parse_spec(SPEC)))
    assert run.state == "unsupported"
    assert run.reason is not None
    assert f"must be at most the {int(0.9 * BUDGET)} bytes that are free here, got {BUDGET}" in run.reason


def test_a_search_says_what_it_may_cost() -> None:
    spec = parse_spec(SPEC)
    cost = estimate(spec)
    assert spec.frontier is not None
    assert spec.frontier.trials() == math.log2(4096 / 512) + 1 + math.log2(2048 / 128)
    assert (cost.runs, cost.basis) == (3, "limit")
    assert cost.peak_bytes > BUDGET
    assert f"at most {spec.frontier.trials()} lengths" in cost.notes[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"record": ["memory", "timing"]}, "record: must be memory with frontier"),
        ({"vary": SPEC["vary"] | {"sequence_length": [64]}}, "vary.sequence_length: must not be given with frontier"),
        ({"frontier": {"up_to": 100, "memory_bytes": 10**8}}, r"frontier.first: must be at most up_to \(100\)"),
        ({"frontier": {"up_to": 4096}}, "frontier.memory_bytes: must be given"),
        ({"module": None, "model": "smollm2-135m", "input": {"text": "a"}}, "input: must be synthetic with frontier"),
    ],
)  # fmt: skip
def test_a_search_that_means_nothing_is_refused(changes: dict[str, Any], problem: str) -> None:
    values = {name: value for name, value in (SPEC | changes).items() if value is not None}
    with pytest.raises(SpecError, match=problem):
        parse_spec(values)
