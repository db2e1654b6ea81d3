"""One run from claim to outcome: what is stored, what is said on the way, and how it ends."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_fixtures import HEADS, KV_HEADS, LAYERS, SIZE
from transformers import LlamaForCausalLM

from attnlab import models, procedure
from attnlab.bundled import BUNDLED, is_fetched
from attnlab.environment import describe_environment
from attnlab.procedure import choose_device
from attnlab.recorder import Recorder
from attnlab.run import execute, run_here
from attnlab.spec import parse_spec
from attnlab.views.statistics import STATISTICS
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Window, mask_from_json
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage import queue, results, tensors
from attnlab_storage.database import Store
from attnlab_storage.queue import Claim, LostLease

pytestmark = pytest.mark.usefixtures("forget_models")


def spec_of(tiny: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "tiny",
        "model": tiny,
        "input": {"synthetic": "random"},
        "vary": {"mechanism": ["multi_head"], "sequence_length": [13]},
        "repeats": 3,
    }
    vary = changes.pop("vary", {})
    return values | changes | {"vary": values["vary"] | vary}


def ran(store: Store, values: dict[str, Any]) -> list[results.RunRow]:
    experiment = run_here(store, parse_spec(values))
    return results.runs_of(store, experiment_id=experiment)


def row_of(store: Store, run_id: int) -> results.RunRow:
    row = results.get_run(store, run_id)
    assert row is not None
    return row


def claimed(store: Store, values: dict[str, Any]) -> Claim:
    spec = parse_spec(values)
    points = [point.to_dict() for point in spec.points()]
    queue.submit(store, name=spec.name, spec=spec.to_dict(), spec_hash=spec.hash(), points=points)
    claim = queue.claim(store, "tester")
    assert claim is not None
    return claim


def stored_map(store: Store, run_id: int, layer: int, head: int) -> SoftmaxMap:
    trace = results.traces(store, run_id)[layer]
    group = trace.heads // trace.kv_heads
    return SoftmaxMap(
        tensors.read_tensor(store, run_id, "query", layer, head),
        tensors.read_tensor(store, run_id, "key", layer, head // group),
        tensors.read_tensor(store, run_id, "lse", layer, head),
        trace.scale,
        mask_from_json(trace.mask),
    )


def test_a_run_stores_all_that_was_asked_for(store: Store, tiny: str) -> None:
    (run,) = ran(store, spec_of(tiny))
    assert (run.state, run.reason) == ("succeeded", None)
    traces = results.traces(store, run.id)
    assert [(trace.layer, trace.name, trace.heads, trace.kv_heads) for trace in traces] == [
        (0, "model.layers.0.self_attn", HEADS, KV_HEADS),
        (1, "model.layers.1.self_attn", HEADS, KV_HEADS),
    ]
    assert all(trace.row_sum_defect < 5e-6 and trace.output_defect < 1e-5 for trace in traces)
    found = {row.name for row in results.measurements(store, run.id)}
    assert found == {
        "check_error", "logit_error", "perplexity", "attention_error", "lse_error", "latency", "attention_latency",
        "capture_overhead", "peak_memory", "attention_peak_memory", "memory_timeline", "attention_memory_timeline",
        "roofline", "inputs_ratio",
    } | {name for name, one in STATISTICS.items() if "needle" not in one.needs}  # fmt: skip
    assert len(results.measurements(store, run.id, "entropy")) == LAYERS * HEADS
    given = results.run_input(store, run.id)
    assert given is not None
    assert len(given.query_tokens) == len(given.key_tokens) == 13
    assert [row.latency_ms for row in [run]] == [(run.summary or {})["latency_ms"]]
    assert "captured 2 layers" in results.log_tail(store, run.id)


def test_the_summary_says_what_lists_show(store: Store, tiny: str) -> None:
    (run,) = ran(store, spec_of(tiny, vary={"mechanism": [{"sliding_window": {"window_size": 4}}]}))
    summary = run.summary or {}
    assert {key: summary[key] for key in ("swap", "layers", "heads", "tokens", "implementation", "device")} == {
        "swap": "approximate", "layers": LAYERS, "heads": HEADS, "tokens": 13, "implementation": "banded",
        "device": "cpu",
    }  # fmt: skip
    assert summary["row_sum_defect"] < 5e-6
    assert summary["peak_memory_bytes"] > 0
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in summary["kernels"]


def test_the_stored_map_is_the_models_own(store: Store, tiny: str) -> None:
    (run,) = ran(store, spec_of(tiny, record=["maps"]))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in (run.summary or {})["kernels"]
    model = LlamaForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    ids = torch.randint(97, (13,), generator=torch.Generator().manual_seed(0))
    attentions = model(ids[None], output_attentions=True).attentions
    for layer in range(LAYERS):
        for head in range(HEADS):
            made = stored_map(store, run.id, layer, head)
            tile = made.tile(slice(None), slice(None))
            assert np.abs(tile - attentions[layer][0, head].detach().numpy()).max() < 1e-5
            scores = made.query.astype(float) @ made.key.astype(float).T * made.scale
            exact = np.exp(scores) * np.tri(13)
            assert np.abs(tile - exact / exact.sum(1, keepdims=True)).max() < 1e-6


def test_nothing_of_size_n_by_n_is_kept(store: Store, tiny: str) -> None:
    (run,) = ran(store, spec_of(tiny, record=["maps"], vary={"sequence_length": [64]}))
    per_token = 4 * (HEADS * SIZE + KV_HEADS * SIZE + KV_HEADS) + 8 * HEADS
    assert tensors.stored_bytes(store, run.id) == LAYERS * 64 * per_token
    assert {info.dtype for info in tensors.tensor_info(store, run.id) if info.name == "lse"} == {"float64"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_bit_for_bit(sqlite_store: Store, tiny: str, dtype: str) -> None:
    (run,) = ran(sqlite_store, spec_of(tiny, vary={"dtype": [dtype]}))
    assert run.state == "succeeded", run.reason
    info = {row.name: row for row in tensors.tensor_info(sqlite_store, run.id) if row.layer == 1}
    assert info["query"].dtype == info["key"].dtype == dtype
    kept = torch.from_numpy(tensors.read_tensor(sqlite_store, run.id, "query", 1, 0).copy())
    assert torch.equal(kept.to(getattr(torch, dtype)).float(), kept)
    assert results.traces(sqlite_store, run.id)[1].row_sum_defect < 5e-6


def test_exact_mechanisms_lose_nothing_and_approximate_ones_say_how_much(
    sqlite_store: Store, tiny: str
) -> None:
    mechanisms = [
        "multi_head", "flash", "grouped_query", {"sliding_window": {"window_size": 13}},
        {"sliding_window": {"window_size": 4}}, {"grouped_query": {"num_kv_heads": 1}},
    ]  # fmt: skip
    runs = ran(sqlite_store, spec_of(tiny, record=["accuracy"], vary={"mechanism": mechanisms}))
    assert [(run.summary or {}).get("swap") for run in runs] == ["exact"] * 4 + ["approximate"] * 2
    exact = results.measurements(sqlite_store, runs[0].id, "perplexity")[0].value
    for run in runs[:4]:
        found = {row.name: row for row in results.measurements(sqlite_store, run.id)}
        assert found["logit_error"].value < 2e-4
        assert (found["logit_error"].detail or {})["against"] == "the model's own eager attention"
        assert found["perplexity"].value == pytest.approx(exact, rel=1e-4)
        assert "kl" not in found
    for run in runs[4:]:
        found = {row.name: row for row in results.measurements(sqlite_store, run.id)}
        assert found["logit_error"].value > 1e-2
        assert found["kl"].value > 1e-4
        assert (found["kl"].detail or {})["against"] == "multi_head on the same input"
        assert (found["perplexity"].detail or {})["reference_perplexity"] == pytest.approx(exact, rel=1e-4)
        assert found["check_error"].value < 2e-4


def test_decoding_keeps_the_row_of_the_newest_token(sqlite_store: Store, tiny: str) -> None:
    prefill, decode = (
        ran(sqlite_store, spec_of(tiny, phase=phase, record=["maps", "timing", "memory", "statistics"]))[0]
        for phase in ("prefill", "decode")
    )
    assert decode.state == "succeeded", decode.reason
    assert [(t.num_queries, t.num_keys) for t in results.traces(sqlite_store, decode.id)] == [
        (1, 13)
    ] * LAYERS
    given = results.run_input(sqlite_store, decode.id)
    assert given is not None
    assert (len(given.query_tokens), len(given.key_tokens)) == (1, 13)
    for layer, head in ((0, 0), (1, 5)):
        whole = stored_map(sqlite_store, prefill.id, layer, head).tile(slice(12, 13), slice(None))
        row = stored_map(sqlite_store, decode.id, layer, head).tile(slice(None), slice(None))
        np.testing.assert_allclose(row, whole, atol=1e-5)
    assert len(results.measurements(sqlite_store, decode.id, "latency")[0].samples or []) == 3


def test_a_batch_is_computed_and_its_first_element_kept(sqlite_store: Store, tiny: str) -> None:
    one, three = ran(sqlite_store, spec_of(tiny, record=["maps"], vary={"batch_size": [1, 3]}))
    assert (results.traces(sqlite_store, three.id)[0].detail or {})["batch"] == "element 0 of 3"
    assert tensors.stored_bytes(sqlite_store, one.id) == tensors.stored_bytes(sqlite_store, three.id)


def test_only_the_layers_asked_for_are_kept(sqlite_store: Store, tiny: str) -> None:
    (run,) = ran(sqlite_store, spec_of(tiny, record=["maps", "statistics"], layers=[1]))
    assert [trace.layer for trace in results.traces(sqlite_store, run.id)] == [1]
    assert {row.layer for row in results.measurements(sqlite_store, run.id, "entropy")} == {1}


def test_exactly_as_many_samples_as_repeats(sqlite_store: Store, tiny: str) -> None:
    (run,) = ran(sqlite_store, spec_of(tiny, record=["timing"], repeats=7))
    for name in ("latency", "attention_latency"):
        (row,) = results.measurements(sqlite_store, run.id, name)
        assert len(row.samples or []) == 7
        assert row.value == sorted(row.samples or [])[3]


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_bare_modules_run_in_every_phase(sqlite_store: Store, phase: str, dtype: str) -> None:
    values = {
        "name": "bare", "module": {"dim": 48, "num_heads": 6, "num_kv_heads": 2}, "phase": phase, "repeats": 2,
        "vary": {
            "mechanism": ["multi_head", "flash", "grouped_query", {"sliding_window": {"window_size": 5}}],
            "sequence_length": [17], "dtype": [dtype],
        },
    }  # fmt: skip
    runs = ran(sqlite_store, values)
    assert [(run.state, run.reason) for run in runs] == [("succeeded", None)] * 4
    for run in runs:
        (trace,) = results.traces(sqlite_store, run.id)
        assert trace.kv_heads == (6 if run.mechanism in ("multi_head", "flash") else 2)
        assert trace.row_sum_defect < 5e-6
        assert run.model == "module 48x6/2"


def test_the_same_seed_gives_the_same_numbers(sqlite_store: Store) -> None:
    values = {
        "name": "bare", "module": {"dim": 16, "num_heads": 2}, "record": ["maps"],
        "vary": {"mechanism": ["multi_head"], "sequence_length": [9]},
    }  # fmt: skip
    kept = []
    for seed in (0, 0, 1):
        (run,) = ran(sqlite_store, values | {"seed": seed})
        kept.append(tensors.read_tensor(sqlite_store, run.id, "query", 0, 1))
    np.testing.assert_array_equal(kept[0], kept[1])
    assert np.abs(kept[0] - kept[2]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"phase": "train"}, "train is for bare modules"),
        ({"vary": {"implementation": ["sdpa_cudnn"]}}, "cuDNN attention has no cpu kernel"),
        ({"vary": {"mechanism": ["flash"], "implementation": ["eager"]}}, "flash: is fused"),
        ({"vary": {"sequence_length": [1]}, "phase": "decode"}, "at least 2 tokens"),
    ],
)
def test_what_cannot_run_is_a_result_with_its_reason(
    sqlite_store: Store, tiny: str, changes: dict[str, Any], reason: str
) -> None:
    (run,) = ran(sqlite_store, spec_of(tiny, **changes))
    assert run.state == "unsupported"
    assert reason in (run.reason or "")
    assert results.traces(sqlite_store, run.id) == []


def test_a_run_that_needs_a_gpu_says_so_without_one(sqlite_store: Store, tiny: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    claim = claimed_with_gpus(sqlite_store, tiny)
    assert execute(sqlite_store, claim) == "unsupported"
    assert "resources.gpus: 1 asked for" in (row_of(sqlite_store, claim.run_id).reason or "")
    with pytest.raises(Unsupported, match="no CUDA device"):
        choose_device(2, None)
    assert choose_device(2, "cpu") == torch.device("cpu")


def claimed_with_gpus(store: Store, tiny: str) -> Claim:
    spec = parse_spec(spec_of(tiny, resources={"gpus": 1}))
    points = [point.to_dict() for point in spec.points()]
    submitted = queue.submit(store, name="x", spec=spec.to_dict(), spec_hash=spec.hash(), points=points)
    claim = queue.claim(store, "tester", run_id=submitted.run_ids[0])
    assert claim is not None
    return claim


def test_no_memory_is_a_result_with_the_bytes_asked(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procedure, "capture_call", lambda call: torch.empty(1 << 60))
    claim = claimed(sqlite_store, spec_of(tiny))
    assert execute(sqlite_store, claim) == "out_of_memory"
    run = row_of(sqlite_store, claim.run_id)
    assert str(1 << 62) in (run.reason or "")


def test_a_model_that_computes_something_else_stores_no_map(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnlab.swap import Swap

    monkeypatch.setattr(Swap, "mask", lambda self, mask: mask & Window(1))
    (run,) = ran(sqlite_store, spec_of(tiny))
    assert run.state == "failed"
    assert "off its own eager attention" in (run.reason or "")
    assert tensors.tensor_info(sqlite_store, run.id) == []
    assert results.measurements(sqlite_store, run.id) == []


def test_a_broken_model_fails_in_one_line_with_its_traceback(
    sqlite_store: Store, tiny: str, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text(
        (Path(tiny) / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    (run,) = ran(sqlite_store, spec_of(str(folder)))
    assert run.state == "failed"
    assert "cannot be loaded" in (run.reason or "")
    assert "Traceback" in (row_of(sqlite_store, run.id).error_detail or "")


def test_layers_that_the_model_has_not_fail_after_all(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnlab.spec_rules.describe_model", lambda name: None)
    monkeypatch.setattr("attnlab.spec_rules.is_hub_id", lambda name: True)
    (run,) = ran(sqlite_store, spec_of(tiny, layers=[5]))
    assert run.state == "failed"
    assert "layers: must be from 0 to 1" in (run.reason or "")


def test_a_run_taken_away_writes_nothing_more(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claimed(sqlite_store, spec_of(tiny))
    real = Recorder._write_capture

    def taken(self: Recorder, capture: Any) -> None:
        if capture.row.layer == 1:
            queue.give_back(sqlite_store, claim, error_kind="test", reason="taken")
        real(self, capture)

    monkeypatch.setattr(Recorder, "_write_capture", taken)
    with pytest.raises(LostLease):
        execute(sqlite_store, claim)
    run = row_of(sqlite_store, claim.run_id)
    assert run.state == "queued"
    assert tensors.tensor_info(sqlite_store, claim.run_id) == []


@pytest.mark.parametrize("free", [True, False])
def test_what_the_writer_raises_reaches_the_computation(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    monkeypatch.setattr("attnlab.procedure.core_is_free", lambda device: free)

    def full(self: Recorder, capture: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Recorder, "_write_capture", full)
    before = threading.active_count()
    (run,) = ran(sqlite_store, spec_of(tiny))
    assert (run.state, run.reason) == ("failed", "OSError: disk full")
    assert threading.active_count() == before


def test_the_computation_waits_for_a_slow_writer(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(sqlite_store, claimed(sqlite_store, spec_of(tiny)))
    waiting: list[int] = []
    gate = threading.Event()

    def slow(capture: Any) -> None:
        gate.wait(20)

    monkeypatch.setattr(recorder, "_write_capture", slow)

    def produce() -> None:
        with recorder.writer(9, beside=True) as writer:
            for number in range(9):
                writer.put(number)  # type: ignore[arg-type]
                waiting.append(number)

    thread = threading.Thread(target=produce)
    thread.start()
    deadline = time.monotonic() + 20
    while len(waiting) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # one is being written, two wait, the next is held back
    assert waiting == [0, 1, 2]
    gate.set()
    thread.join(20)
    assert waiting == list(range(9))


def test_progress_names_its_phases_in_order(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("attnlab_storage.queue.progress", lambda store, claim, phase, *_: said.append(phase))
    ran(sqlite_store, spec_of(tiny))
    order = list(dict.fromkeys(said))
    assert order == [
        "loading model", "checking", "capturing", "refining", "measuring", "comparing logits", "timing",
        "proving", "measuring memory",
    ]  # fmt: skip


def test_runs_of_one_experiment_share_the_loaded_model(
    sqlite_store: Store, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, *rest: (loads.append(name), real(name, *rest))[1])
    runs = ran(
        sqlite_store,
        spec_of(tiny, record=["maps"], vary={"mechanism": ["multi_head", "flash", "grouped_query"]}),
    )
    assert {run.state for run in runs} == {"succeeded"}
    assert loads == [tiny]


def test_the_environment_tells_where_the_numbers_are_from(sqlite_store: Store, tiny: str) -> None:
    (run,) = ran(sqlite_store, spec_of(tiny, seed=5))
    told = results.environment(sqlite_store, run.id)
    assert told is not None
    assert (told["seed"], told["device"]) == (5, "cpu")
    assert told["model"]["architecture"] == "LlamaForCausalLM"
    assert told["cpu"]["cores"] >= 1
    assert told["memory_bytes"] > 1 << 28
    assert told["versions"]["torch"] == torch.__version__
    names = {row["name"]: row for row in told["implementations"]}
    assert names["eager"]["available"]
    assert not names["sdpa_cudnn"]["available"]
    assert names["sdpa_cudnn"]["reason"]
    json.dumps(describe_environment())


@pytest.mark.model
def test_a_text_longer_than_asked_is_cut_and_said(sqlite_store: Store) -> None:
    if not is_fetched("rxnmapper"):
        pytest.skip("rxnmapper is not fetched: attnlab models fetch rxnmapper")
    values = {
        "name": "cut", "model": "rxnmapper", "record": ["maps"],
        "input": {"text": BUNDLED["rxnmapper"].sample}, "vary": {"mechanism": "multi_head", "sequence_length": [9]},
    }  # fmt: skip
    (run,) = ran(sqlite_store, values)
    given = results.run_input(sqlite_store, run.id)
    assert given is not None
    assert given.query_tokens[0] == "[CLS]"
    assert given.query_tokens[-1] == "[SEP]"
    assert len(given.query_tokens) == 9
    assert (given.detail or {})["cut_tokens"] == 14
    assert given.text == BUNDLED["rxnmapper"].sample
    names = [trace.name for trace in results.traces(sqlite_store, run.id)]
    assert len(set(names)) == 12
    assert names[11].endswith("#12")


def test_running_warns_of_nothing_and_prints_nothing(tmp_path: Path, tiny: str) -> None:
    code = (
        "import sys; from attnlab.spec import parse_spec; from attnlab.run import run_here;"
        "from attnlab_storage.database import migrate, open_store; url = sys.argv[1]; migrate(url);"
        "store = open_store(url); run_here(store, parse_spec(sys.argv[2])); store.close()"
    )
    url, spec = f"sqlite:///{tmp_path / 'x.db'}", json.dumps(spec_of(tiny))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, url, spec], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
