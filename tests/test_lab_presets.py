"""Presets: every one a spec at both scales, and verdicts from made-up runs."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from attnlab.presets import PRESETS, Claim, PresetError, Which, find_preset, judge
from attnlab.presets.outcome import preset_state, submit_preset
from attnlab.presets.verdict import device_of, matching
from attnlab.views.claims import claim_figure, claim_infos
from attnlab_kernels.catalog import MECHANISMS

CPU = {"device": "cpu", "cpu": {"model": "a CPU"}, "gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
H100 = CPU | {"device": "cuda"}
BASE, RUN = Which("multi_head"), Which("grouped_query", {"num_kv_heads": 2})
FASTER = Claim("fast", "twice as fast", "latency_ms", 2, 2, RUN, BASE, "how", "source", note="because")
SMALLER = Claim("small", "a quarter", "cache_bytes", 0.25, 0.25, RUN, BASE, "how", "source")
REACHES = Claim("far", "reaches 4096", "reaches", 4096, 4096, Which("flash"), None, "how", "source")
RUNS_OUT = replace(REACHES, id="out", quantity="runs_out")


def made(run, mechanism="multi_head", milliseconds=None, **changed):
    """A run document; times are (p10, median, p90)."""
    low, median, high = milliseconds or (0, 0, 0)
    return {
        "id": run,
        "experiment": 1,
        "mechanism": mechanism,
        "parameters": {"num_kv_heads": 2} if mechanism == "grouped_query" else {},
        "implementation": "auto",
        "sequence_length": 512,
        "batch_size": 1,
        "state": "succeeded",
        "reason": None,
        "environment": CPU,
        "latency_ms": {"p10": low, "median": median, "p90": high} if milliseconds else None,
    } | changed


def pair(base, run, **changed):
    return [made(1, milliseconds=base, **changed), made(2, "grouped_query", run, **changed)]


@pytest.mark.parametrize(
    ("run", "kind"),
    [((4.9, 5, 5.1), "holds"), ((7, 7.5, 8), "does_not_hold"), ((2.4, 2.5, 2.6), "does_not_hold")],
)
def test_a_speed_is_the_ratio_of_two_medians_with_its_interval(run, kind):
    verdict = judge(FASTER, pair((9.8, 10, 10.2), run))
    assert verdict.kind == kind
    assert verdict.measured == pytest.approx(10 / run[1])
    assert (verdict.low, verdict.high) == pytest.approx((9.8 / run[2], 10.2 / run[0]))
    assert verdict.runs == (1, 2)
    assert ("because" in verdict.reason) == (kind == "does_not_hold")


def test_times_that_scatter_confirm_nothing():
    verdict = judge(FASTER, pair((1, 10, 100), (1, 5, 60)))
    assert verdict.kind == "not_measurable"
    assert "scatter" in verdict.reason


def test_a_claim_of_a_gpu_is_not_judged_on_another_device():
    claim = replace(FASTER, device="H100")
    times = ((9.8, 10, 10.2), (4.9, 5, 5.1))
    here = judge(claim, pair(*times))
    assert here.kind == "not_measurable"
    assert here.measured == pytest.approx(2)  # shown beside the claim all the same
    assert "said of an H100; on a CPU it is 2.00 times" in here.reason
    assert judge(claim, pair(*times, environment=H100)).kind == "holds"


def test_bytes_are_compared_as_a_share():
    runs = [made(1, cache_bytes=1000), made(2, "grouped_query", cache_bytes=250)]
    assert judge(SMALLER, runs).kind == "holds"
    runs[1] = made(2, "grouped_query", cache_bytes=300)
    assert judge(SMALLER, runs).kind == "does_not_hold"
    assert "more than claimed" in judge(SMALLER, runs).reason


@pytest.mark.parametrize("state", ["out_of_memory", "unsupported", "failed", "timed_out"])
def test_a_run_that_gave_no_number_says_why_in_the_verdict(state):
    runs = [made(1, cache_bytes=1000), made(2, "grouped_query", state=state, reason="so")]
    verdict = judge(SMALLER, runs)
    assert verdict.kind == "not_measurable"
    assert verdict.reason.endswith(": so")
    assert verdict.runs == (1, 2)


def test_a_measurement_that_was_not_recorded_is_no_number():
    assert judge(SMALLER, [made(1), made(2, "grouped_query")]).kind == "not_measurable"


@pytest.mark.parametrize("runs", [[], [made(1)], [made(1), made(2, "grouped_query", state="running")]])
def test_without_both_runs_a_claim_is_not_run_yet(runs):
    assert judge(SMALLER, runs).kind == "not_run"


def test_only_runs_of_one_experiment_and_one_size_are_compared():
    other = made(2, "grouped_query", cache_bytes=250)
    assert judge(SMALLER, [made(1, cache_bytes=1000), other | {"experiment": 2}]).kind == "not_run"
    assert judge(SMALLER, [made(1, cache_bytes=1000), other | {"batch_size": 8}]).kind == "not_run"
    assert (
        judge(SMALLER, [made(1, cache_bytes=1000), other | {"parameters": {"num_kv_heads": 4}}]).kind
        == "not_run"
    )


def test_the_newest_experiment_is_judged():
    old = [made(1, cache_bytes=1000), made(2, "grouped_query", cache_bytes=900)]
    new = [made(3, cache_bytes=1000, experiment=2), made(4, "grouped_query", cache_bytes=250, experiment=2)]
    assert judge(SMALLER, [*old, *new]).runs == (3, 4)


@pytest.mark.parametrize(
    ("tokens", "state", "reaches", "runs_out"),
    [
        (4096, "succeeded", "holds", "does_not_hold"),
        (8192, "succeeded", "holds", "does_not_hold"),
        (4096, "out_of_memory", "does_not_hold", "holds"),
        (2048, "out_of_memory", "does_not_hold", "holds"),
        (2048, "succeeded", "not_measurable", "not_measurable"),
        (8192, "out_of_memory", "not_measurable", "not_measurable"),
        (4096, "running", "not_run", "not_run"),
    ],
)
def test_a_length_is_reached_or_runs_out(tokens, state, reaches, runs_out):
    runs = [made(1, "flash", sequence_length=tokens, state=state)]
    assert judge(REACHES, runs).kind == reaches
    assert judge(RUNS_OUT, runs).kind == runs_out


def test_a_length_on_another_device_than_the_claims_is_not_judged():
    runs = [made(1, "flash", sequence_length=4096)]
    assert judge(replace(REACHES, device="A100"), runs).kind == "not_measurable"


def test_lengths_and_batches_are_chosen_by_rank():
    runs = [
        made(n, sequence_length=length, batch_size=batch)
        for n, (length, batch) in enumerate([(256, 1), (256, 8), (1024, 1), (1024, 8)])
    ]
    assert [run["id"] for run in matching(Which("multi_head", length=0, batch=-1), runs)] == [1]
    assert [run["id"] for run in matching(Which("multi_head", length=-1), runs)] == [2, 3]
    assert matching(Which("multi_head", length=5), runs) == []


def test_the_device_is_the_gpu_that_ran_and_not_one_that_was_there():
    assert device_of(made(1)) == "a CPU"
    assert device_of(made(1, environment=H100)) == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_group_of_specs(name, scale):
    for spec in PRESETS[name].specs(scale):
        assert spec.points()
        assert spec.resources.gpus == int(scale == "gpu")
        for point in spec.points():
            assert point.mechanism in MECHANISMS


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_claim_finds_its_run_and_its_baseline_in_the_grid(name, scale):
    documents = []
    for number, spec in enumerate(PRESETS[name].specs(scale)):
        for point in spec.points():
            environment = H100 | {"gpus": [{"name": "A100 and H100"}]}
            numbers = {"cache_bytes": 1, "attention_peak_memory_bytes": 1, "environment": environment}
            values = point.to_dict() | numbers | {"experiment": number, "state": "succeeded", "reason": None}
            times = {"p10": 1.0, "median": 1.0, "p90": 1.0}
            written = {"output_tokens_per_second": {"p10": 1.0, "value": 1.0, "p90": 1.0}}
            documents.append(values | {"id": len(documents), "latency_ms": times, "serving": written})
    for claim in PRESETS[name].claims:
        verdict = judge(claim, documents)
        short = scale == "cpu" and claim.id == "standard-16k"  # a CPU's grid ends before
        assert verdict.kind != "not_run", claim.id
        assert claim.open or short or verdict.kind in ("holds", "does_not_hold"), (claim.id, verdict)


def test_every_number_of_the_guide_is_a_claim():
    counts = {name: len(preset.claims) for name, preset in PRESETS.items() if preset.claims}
    assert counts == {
        "memory-relative": 6,
        "cache-sizes": 6,
        "context-scaling": 5,
        "training-speed": 5,
        "batch-serving": 4,
        "tokens-per-second": 21,
    }
    assert [name for name, preset in PRESETS.items() if preset.kind == "stack"] == [
        *("stack-modern-llm", "stack-serving", "stack-research", "stack-vision")
    ]


def test_claims_have_names_of_their_own():
    for preset in PRESETS.values():
        assert len({claim.id for claim in preset.claims}) == len(preset.claims)
        assert all(claim.low <= claim.high for claim in preset.claims)


def test_a_chart_draws_what_is_claimed_beside_what_was_measured():
    verdicts = {"fast": judge(FASTER, pair((9.8, 10, 10.2), (4.9, 5, 5.1))), "small": judge(SMALLER, [])}
    speed, size = claim_infos("title", [FASTER, SMALLER], verdicts)
    assert [bar.measured for bar in speed.bars] == pytest.approx([2])
    assert speed.unit == "times as fast as the baseline"
    assert size.bars[0].measured is None
    figure = claim_figure(speed)
    assert list(figure.data[0].x) == [2]  # type: ignore[attr-defined]
    assert list(figure.data[1].x) == pytest.approx([2])  # type: ignore[attr-defined]
    assert len(claim_figure(size).data) == 1  # type: ignore[arg-type]


def test_a_preset_is_queued_under_its_own_mark(sqlite_store):
    preset = find_preset("batch-serving")
    assert preset_state(sqlite_store, preset).experiments == []
    submitted = submit_preset(sqlite_store, preset, "cpu", "tests")
    state = preset_state(sqlite_store, preset)
    assert state.experiments == [one.experiment_id for one in submitted]
    assert {verdict.kind for verdict in state.verdicts.values()} == {"not_run"}
    assert preset_state(sqlite_store, find_preset("cache-sizes")).documents == []


def test_a_served_ratio_is_that_of_tokens_a_second_with_the_interval_of_the_passes():
    claim = Claim("more", "thrice as many", "tokens_per_second", 3, 3, RUN, BASE, "how", "source")

    def written(number: int, mechanism: str, *rates: float) -> dict[str, Any]:
        names = ("p10", "value", "p90")
        rate = {"output_tokens_per_second": dict(zip(names, rates, strict=True))}
        return made(number, mechanism) | {"serving": rate}

    base = written(1, "multi_head", 9, 10, 11)
    verdict = judge(claim, [base, written(2, "grouped_query", 29, 30, 31)])
    assert (verdict.kind, verdict.measured) == ("holds", 3)
    assert (verdict.low, verdict.high) == pytest.approx((29 / 11, 31 / 9))
    assert "3.00 times the tokens a second" in verdict.reason
    assert judge(claim, [base, written(2, "grouped_query", 19, 20, 21)]).kind == "does_not_hold"
    assert judge(claim, [base, made(2, "grouped_query")]).kind == "not_measurable"


def test_a_fall_with_the_length_is_that_of_tokens_a_second():
    which, before = Which("linear", length=-1), Which("linear", length=0)
    claim = replace(FASTER, low=0.5, high=0.5, which=which, against=before)
    documents = [
        made(1, "linear", (10, 10, 10), sequence_length=100),
        made(2, "linear", (80, 80, 80), sequence_length=400),
    ]
    verdict = judge(claim, documents)
    assert (verdict.kind, verdict.measured, verdict.runs) == ("holds", 0.5, (1, 2))
    assert "0.50 times the tokens a second of the shorter" in verdict.reason


def test_where_the_standard_ran_out_the_quoted_fall_from_4k_is_compared():
    claims = {claim.id: claim for claim in PRESETS["tokens-per-second"].claims}
    flash = claims["flash-2-16K-tokens"]
    assert flash.low == flash.high == 1100 / 1800
    assert flash.quoted == "1,100 against 1,800 at 4K tokens, as the standard ran out of memory"
    assert claims["gqa-batch-8"].low == 11000 / 8500
    assert not [claim.id for claim in claims.values() if claim.open]


def test_quoted_training_speeds_are_all_of_the_standard():
    claims = {claim.id: claim for claim in PRESETS["training-speed"].claims}
    found = {name: round(claim.low, 4) for name, claim in claims.items()}
    assert found == {"flash-2": 1.6, "flash-3": 1.25, "linear": 1.4375, "gqa": 1.25, "mla": 1.25}
    assert claims["linear"].quoted == "2.3 times the standard, of which FlashAttention-2 has 1.6"


def test_an_unknown_preset_or_scale_names_the_choices():
    with pytest.raises(PresetError, match=r"memory-relative.*got 'x'"):
        find_preset("x")
    with pytest.raises(PresetError, match="cpu, gpu; got 'tpu'"):
        find_preset("cache-sizes").specs("tpu")


def test_presets_load_no_torch():
    code = (
        "import sys; from attnlab.presets import PRESETS; [preset.specs('cpu') for preset in PRESETS.values()];"
        "import attnlab.views.claims; assert not {'torch', 'triton', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
