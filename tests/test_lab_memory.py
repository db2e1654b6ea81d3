"""Memory: known bytes found by two methods, every allocation given to its owner, caches against their formula."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from attnlab.describe import memory_snapshot, memory_timeline, run_document
from attnlab.probes.allocations import POINTS, Change, changes_of_snapshot, replay
from attnlab.probes.memory import peak_memory
from attnlab.run import run_here
from attnlab.snapshot import pack_snapshot, unpack_snapshot
from attnlab.spec import parse_spec
from attnlab.views.errors import ViewError
from attnlab.views.memory_timeline import timeline_figure, timeline_info
from attnlab_kernels.masks import Causal, Full
from attnlab_kernels.operations.softmax.api import attend
from attnlab_storage import results

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20

KNOWN = """
import json, sys, torch
from attnlab.probes.memory import peak_memory
from attnlab_kernels.masks import Full
from attnlab_kernels.operations.softmax.api import attend

q, k, v = torch.randn(3, 1, 8, 2048, 64)
with torch.inference_mode():
    found = peak_memory(
        "peak", lambda: attend(q, k, v, mask=Full(), implementation=sys.argv[1]), torch.device("cpu"), floor=0
    )
print(json.dumps([found.peak.value, found.peak.detail["resident_peak_bytes"]]))
"""


@pytest.mark.parametrize(("implementation", "known"), [("sdpa_flash", 5.2), ("sdpa_math", 292.0)])
def test_two_methods_agree_on_known_bytes(implementation: str, known: float) -> None:
    """1 x 8 x 2048 x 64 float32: scores and probabilities of 128 MiB, a mask of 32 and q scaled; flash: its output."""
    command = [sys.executable, "-c", KNOWN, implementation]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    replayed, resident = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    assert replayed / MEBIBYTE == pytest.approx(known, abs=0.1)
    assert resident / MEBIBYTE == pytest.approx(known, abs=2)


def change(at: int, address: int, count: int, operator: str = "aten::mm", *frames: str) -> Change:
    return Change(at * 1000, address, count, operator, frames)


def test_a_replay_equals_the_sum_of_what_is_alive_in_any_order() -> None:
    random = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 1000, (300,), generator=random).tolist()
    ends = torch.randint(1, 90, (300,), generator=random).tolist()
    changes = [change(2 * at, at, size) for at, size in enumerate(sizes)]
    changes += [change(2 * (at + ends[at]) + 1, at, -size) for at, size in enumerate(sizes)]
    alive = [sum(sizes[i] for i in range(300) if i <= at < i + ends[i] + 0.5) for at in range(300)]
    timeline = replay(reversed(changes))
    assert timeline["peak"]["bytes"] == max(alive)
    totals = timeline["owners"]["activations"]
    assert len(totals) <= POINTS < timeline["events"] == 600
    assert totals[timeline["peak"]["index"]] == max(totals) == max(alive)
    assert totals[-1] == 0


def test_memory_from_before_is_given_back_and_never_below_nothing() -> None:
    timeline = replay([change(0, 1, 100), change(1, 77, -60), change(2, 2, 30), change(3, 1, -100)])
    assert timeline["given_back"] == [0, 60, 60, 60]
    assert timeline["owners"]["activations"] == [100, 100, 130, 30]
    assert timeline["peak"] == {
        "index": 0,
        "bytes": 100,
        "holders": [
            {"owner": "activations", "operator": "aten::mm", "place": "", "bytes": 100, "allocations": 1}
        ],
    }
    assert replay([])["peak"]["index"] is None
    assert replay([change(0, 9, -5)])["peak"] == {"index": None, "bytes": 0, "holders": []}


def test_an_address_used_again_is_another_allocation() -> None:
    timeline = replay([change(0, 1, 10), change(1, 1, -10), change(2, 1, 25), change(3, 1, -25)])
    assert timeline["owners"]["activations"] == [10, 0, 25, 0]


def owners(step: Any) -> dict[str, int]:
    with torch.inference_mode():
        timeline = peak_memory("peak", step, CPU, floor=0).timeline
    return {owner: max(counts) for owner, counts in timeline["owners"].items()}


def test_scores_are_scratch_and_the_output_is_not() -> None:
    q, k, v = torch.randn(3, 1, 2, 300, 16)
    found = owners(lambda: attend(q, k, v, mask=Causal(), implementation="eager"))
    assert found["attention_scratch"] >= 2 * 2 * 300 * 300 * 4
    assert found["mask"] >= 300 * 300
    output, lse = q.nbytes, 2 * 300 * 4
    assert found["activations"] == output + lse
    flash = owners(lambda: attend(q, k, v, mask=Full(), implementation="sdpa_flash"))
    assert flash["attention_scratch"] < 300 * 300 * 4
    assert "mask" not in flash


def test_a_backward_has_gradients_and_a_layer_without_attention_only_activations() -> None:
    layer, given = nn.Linear(64, 64), torch.randn(33, 64)
    assert set(owners(lambda: layer(given).relu())) == {"activations"}

    def train() -> None:
        layer(given).square().mean().backward()
        layer.zero_grad(set_to_none=True)

    timeline = peak_memory("peak", train, CPU, floor=0).timeline
    assert max(timeline["owners"]["gradients"]) >= (64 * 64 + 64) * 4
    assert any("test_lab_memory.py" in holder["place"] for holder in timeline["peak"]["holders"])


SNAPSHOT: dict[str, Any] = {
    "segments": [],
    "device_traces": [
        [{"action": "alloc", "addr": 7, "size": 9, "time_us": 1, "frames": []}],
        [
            {"action": "segment_alloc", "addr": 1, "size": 1 << 21, "time_us": 1, "frames": []},
            {
                "action": "alloc", "addr": 1, "size": 512, "time_us": 2,
                "frames": [{"filename": "/x/attnlab_kernels/operations/softmax/eager.py", "line": 3, "name": "run"}],
            },
            {"action": "free_requested", "addr": 1, "size": 512, "time_us": 3, "frames": []},
            {"action": "free_completed", "addr": 1, "size": 512, "time_us": 4, "frames": []},
        ],
    ],
}  # fmt: skip


def test_a_snapshot_of_cuda_is_replayed_and_kept_as_json() -> None:
    changes = changes_of_snapshot(SNAPSHOT, 1)
    assert [(one.at_ns, one.bytes) for one in changes] == [(2000, 512), (4000, -512)]
    timeline = replay(changes)
    assert timeline["peak"]["bytes"] == 512
    assert timeline["peak"]["holders"][0]["place"] == "operations/softmax/eager.py(3): run"
    packed = pack_snapshot({**SNAPSHOT, "external": object()})
    assert json.loads(unpack_snapshot(packed) or b"") == SNAPSHOT
    assert unpack_snapshot({"left_out_bytes": 4}) is None
    with pytest.raises(ValueError, match="snapshot: is not compressed JSON"):
        unpack_snapshot(packed | {"data": "zzzz"})


def decoded(store: Any, mechanism: Any) -> dict[str, Any]:
    spec = {
        "name": "decode",
        "module": {"dim": 64, "num_heads": 4, "num_kv_heads": 2},
        "vary": {"mechanism": [mechanism], "sequence_length": [38], "batch_size": [3], "dtype": ["float64"]},
        "phase": "decode",
        "record": ["memory"],
    }
    experiment = run_here(store, parse_spec(spec))
    (run,) = results.runs_of(store, experiment_id=experiment)
    assert (run.state, run.reason) == ("succeeded", None)
    return run_document(store, run.id)


@pytest.mark.parametrize(
    "mechanism",
    [
        "multi_head",
        {"grouped_query": {"num_kv_heads": 2}},
        {"sliding_window": {"window_size": 9}},
        "multi_head_latent",
    ],
    ids=str,
)
def test_a_cache_takes_the_bytes_of_its_formula(sqlite_store: Any, mechanism: Any) -> None:
    document = decoded(sqlite_store, mechanism)
    assert document["cache_bytes"] == document["cache"]["formula_bytes"] > 0
    assert "b" in document["cache"]["formula"]
    timeline = memory_timeline(sqlite_store, document["id"])
    assert timeline is not None
    assert timeline["held"]["kv_cache"] == document["cache_bytes"]
    assert timeline["held"]["weights"] > 0
    assert timeline["peak"]["bytes"] == document["peak_memory_bytes"]
    assert memory_snapshot(sqlite_store, document["id"]) is None
    with pytest.raises(ViewError, match="what must be one of memory_timeline, attention_memory_timeline"):
        memory_timeline(sqlite_store, document["id"], "other")


def test_the_chart_stacks_the_owners_up_to_the_marked_peak() -> None:
    timeline = replay(
        [change(0, 1, 100), change(5, 2, 50, "aten::bmm", "attnlab_kernels/operations/x.py(1): f")],
        {"weights": 10**9},
    )
    info = timeline_info(timeline, "Memory <b>")
    figure = timeline_figure(info).to_plotly_json()
    areas = [trace for trace in figure["data"] if trace.get("stackgroup")]
    assert [trace["name"] for trace in areas] == ["activations"]
    assert info.peak == (0.005, 150)
    assert "weights 1.0 GB" in figure["layout"]["xaxis"]["title"]["text"]
    assert "&lt;b&gt;" in figure["layout"]["title"]["text"]
    empty = timeline_figure(timeline_info(replay([]), "x"))
    assert not [trace for trace in empty.to_plotly_json()["data"] if trace.get("stackgroup")]
