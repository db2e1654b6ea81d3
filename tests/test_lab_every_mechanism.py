"""Every mechanism of the catalog runs in an experiment, and the map that is kept is the one it computed."""

from typing import Any

import numpy as np
import pytest
import torch

from attnlab.export.arrays import map_arrays, trace_arrays
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.difference import map_distance
from attnlab.views.trace_map import is_signed, map_facts
from attnlab.views.viewport import allowed_pixels, load_map, viewport
from attnlab_kernels.attention_call import AttentionCall, hearing
from attnlab_kernels.catalog import MECHANISMS
from attnlab_kernels.mechanisms.build import build_mechanism
from attnlab_storage import results
from attnlab_storage.database import Store

TOKENS, DIM, HEADS = 30, 24, 4
SPARSE = {"local_window": 6, "stride": 5, "block_size": 4, "global_tokens": 2, "summary_tokens": 2}
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "cross": [{"context_length": 11, "context_dim": 10}],
    "linear": [
        {}, {"feature_map": "softmax_kernel"}, {"feature_map": "identity"}, {"variant": "linformer", "num_slots": 5},
    ],
    "sparse": [
        SPARSE | {"sparsity_pattern": name}
        for name in ("local", "strided", "fixed", "local_global", "longformer", "bigbird")
    ],
    "sliding_window": [{"window_size": 7}],
    "efficient": [{"chunk_size": 7}, {"variant": "linear"}, {"variant": "spatial_reduction", "grid_height": 10,
                                                             "reduction": 1}],
    "multi_head_latent": [
        {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "form": form}
        for form in ("auto", "absorbed")
    ],
    "paged": [{"block_size": 8}],
    "flash_attention_3": [{}, {"use_fp8": True, "fp8_block_size": 8}],
    "ring": [{"ring_size": 3, "layout": layout} for layout in ("contiguous", "striped", "zigzag")],
    "differential": [{"num_kv_heads": 2, "variant": variant} for variant in ("v1", "v2")],
    "neighborhood": [
        {"kernel_size": 5},
        {"kernel_size": 3, "dims": 2, "dilation": 1, "relative_position_bias": True},
    ],
    "switch_head": [{"top_k": 2}],
    "chunked_prefill": [{"chunk_size": 7, "num_kv_heads": 2}],
}  # fmt: skip
CASES = [(name, given) for name in MECHANISMS for given in PARAMETERS.get(name, [{}])]
NAMES = [f"{name}-{index}" for index, (name, _) in enumerate(CASES)]
EXACT = 2e-6


def spec_of(mechanism: str, given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": mechanism,
        "module": {"dim": DIM, "num_heads": HEADS},
        "vary": {"mechanism": [{mechanism: given}], "sequence_length": [TOKENS]},
        "record": ["maps"],
        "repeats": 1,
    } | changes


def ran(store: Store, values: dict[str, Any]) -> results.RunRow:
    (run,) = results.runs_of(store, experiment_id=run_here(store, parse_spec(values)))
    return run


def told(mechanism: str, given: dict[str, Any]) -> tuple[Any, Any]:
    """The module's own dense map of the same weights and inputs, float64 where it has one, and its output."""
    from attnlab.subjects.module_call import ModuleCall, make_context, prompt_is_causal

    parameters = MECHANISMS[mechanism].validate(given)
    causal = prompt_is_causal(mechanism, parameters, True)
    torch.manual_seed(0)
    module = build_mechanism(mechanism, dim=DIM, num_heads=HEADS, causal=causal, **parameters).eval()
    call = ModuleCall(mechanism, module, parameters, "auto", False)
    hidden = torch.randn(1, TOKENS, DIM)
    if mechanism == "cross":
        call.context = make_context(parameters, DIM, 1, TOKENS)
    calls: list[AttentionCall] = []
    inner = module.forward
    module.forward = lambda *a, **k: inner(*a, **k, output_attentions=True)
    with torch.no_grad(), hearing(calls.append):
        made = call.run(hidden)
    (heard,) = calls
    return made.attentions, heard


@pytest.mark.parametrize(("mechanism", "given"), CASES, ids=NAMES)
def test_the_stored_map_is_the_modules_own(
    sqlite_store: Store, mechanism: str, given: dict[str, Any]
) -> None:
    run = ran(sqlite_store, spec_of(mechanism, given))
    assert (run.state, run.reason) == ("succeeded", None)
    (trace,) = results.traces(sqlite_store, run.id)
    assert (run.summary or {})["kernels"]
    assert trace.row_sum_defect < 1e-6
    assert trace.output_defect < (0.05 if given.get("use_fp8") else 1e-5)
    dense, heard = told(mechanism, given)
    for head in range(HEADS):
        kept = load_map(sqlite_store, run.id, 0, head)
        tile = kept.tile(slice(None), slice(None))
        assert tile.shape == kept.shape == (trace.num_queries, trace.num_keys)
        np.testing.assert_allclose(kept.row_sums(), tile.sum(1, dtype=np.float64), atol=1e-5)
        assert not tile[~allowed_pixels(kept, (0, len(tile)), (0, tile.shape[1]), *tile.shape)].any()
        if mechanism == "neighborhood" and dense is not None:
            numbers, exists = kept.neighborhood.windows(np.arange(TOKENS))  # pyright: ignore[reportAttributeAccessIssue]
            windows = np.where(exists, np.take_along_axis(tile, numbers, 1), 0)
            np.testing.assert_allclose(windows, dense[0, head], atol=EXACT)
        elif dense is not None:
            np.testing.assert_allclose(tile, dense[0, head], atol=EXACT * max(1, np.abs(tile).max()))
        if not given.get("use_fp8") and given.get("sparsity_pattern") != "longformer":
            value = heard.value[0, head * heard.value.shape[1] // HEADS].double().numpy()
            output = heard.output[0, head].numpy()
            np.testing.assert_allclose(tile @ value, output, atol=1e-5 * max(1, np.abs(tile).max()))


@pytest.mark.parametrize(("mechanism", "given"), CASES, ids=NAMES)
def test_pooled_pixels_and_exports_follow_from_the_map(
    sqlite_store: Store, mechanism: str, given: dict[str, Any]
) -> None:
    run = ran(sqlite_store, spec_of(mechanism, given))
    kept = load_map(sqlite_store, run.id, 0, 1)
    tile = kept.tile(slice(None), slice(None))
    queries, keys = kept.shape
    mean = viewport(sqlite_store, run.id, 0, 1, height=5, width=5, reduce="mean").values
    rows, cols = (np.arange(6) * size // 5 for size in (queries, keys))
    for y in range(5):
        for x in range(5):
            part = tile[rows[y] : rows[y + 1], cols[x] : cols[x + 1]]
            assert mean[y, x] == pytest.approx(part.mean(), abs=1e-6)
    largest = viewport(sqlite_store, run.id, 0, 1, height=5, width=5).values
    assert np.abs(largest).max() == pytest.approx(np.abs(tile).max(), rel=1e-5)
    exported = map_arrays(sqlite_store, run.id, 0, 1, (3, 9), (0, 4))
    np.testing.assert_array_equal(exported["map"], tile[3:9, :4])
    (trace,) = results.traces(sqlite_store, run.id)
    assert {"query", "key", *map_facts(trace).get("tensors", ())} <= set(
        trace_arrays(sqlite_store, run.id, 0)
    )
    apart = map_distance(sqlite_store, run.id, run.id)
    assert apart.total_variation.max() == 0
    assert np.isnan(apart.jensen_shannon).all() == is_signed(trace) == ("distribution" in apart.note)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_probe_works_in_every_phase_or_says_why_not(
    sqlite_store: Store, mechanism: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each is far faster than what is known, so each has to prove itself
    monkeypatch.setattr("attnlab.recorder.Recorder.best_known", lambda *given: results.Measured(1, 1e9))
    given = PARAMETERS.get(mechanism, [{}])[0]
    # the memory probe collects garbage for a second, so one mechanism stands for all
    record = [
        "maps",
        "accuracy",
        "statistics",
        "timing",
        *(["memory"] if mechanism == "differential" else []),
    ]
    run = ran(sqlite_store, spec_of(mechanism, given, phase=phase, record=record))
    without = {
        "ring": "one new token cannot be spread",
        "neighborhood": "it has no cache",
    }
    if phase == "decode" and mechanism in without:
        assert run.state == "unsupported"
        assert without[mechanism] in (run.reason or "")
        return
    assert (run.state, run.reason) == ("succeeded", None)
    assert (run.summary or {})["kernels"]
    found = {row.name: row for row in results.measurements(sqlite_store, run.id)}
    assert {"check_error", "attention_error", "entropy", "attention_latency"} <= set(found)
    assert "and proved on" in (found["attention_latency"].detail or {})["proof"]
    error = found["attention_error"]
    assert error.value <= max(2 * (error.detail or {})["plain_error"], 1e-5)


def test_a_mechanism_that_is_only_causal_says_so(sqlite_store: Store) -> None:
    run = ran(sqlite_store, spec_of("paged", {}, module={"dim": 24, "num_heads": 4, "causal": False}))
    assert run.state == "unsupported"
    assert "paged exists only for causal" in (run.reason or "")


def test_an_implementation_of_another_operation_is_refused(sqlite_store: Store) -> None:
    values = spec_of("sparse", {})
    values["vary"]["implementation"] = ["sdpa_flash"]
    run = ran(sqlite_store, values)
    assert run.state == "unsupported"
    assert "sparse: is an operation of its own, tiled, fused, triton; " in (run.reason or "")


def test_an_expert_that_computes_something_else_is_found(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnlab_kernels.operations.expert_projection import api

    right = api.project_out
    monkeypatch.setattr(
        api, "project_out", lambda heads, weight, routing, **how: right(heads, weight * 1.01, routing, **how)
    )
    run = ran(sqlite_store, spec_of("switch_head", {"num_experts": 3, "top_k": 2}))
    assert run.state == "failed"
    assert "off its plain reference" in (run.reason or "")


def test_the_map_of_a_decoded_token_is_the_last_row_of_linear_attention(sqlite_store: Store) -> None:
    record = ["maps", "timing"]
    whole = load_map(sqlite_store, ran(sqlite_store, spec_of("linear", {}, record=record)).id, 0, 1)
    step = ran(sqlite_store, spec_of("linear", {}, record=record, phase="decode"))
    row = load_map(sqlite_store, step.id, 0, 1)
    assert row.shape == (1, TOKENS)
    np.testing.assert_allclose(
        row.tile(slice(None), slice(None))[0],
        whole.tile(slice(TOKENS - 1, TOKENS), slice(None))[0],
        atol=1e-6,
    )
    kept = {found.name: found for found in results.measurements(sqlite_store, step.id)}
    assert {"latency", "attention_latency"} <= set(kept)
