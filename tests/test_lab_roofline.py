"""Operations and bytes counted by hand and by torch's own counter; ceilings measured once and kept a week."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnlab import procedure
from attnlab.describe import run_document
from attnlab.hook import LayerCall
from attnlab.probes import ceilings
from attnlab.probes.work import count_pairs, pattern_pairs, work_of
from attnlab.roofline import at_clock, stand
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.roofline import roofline_figure, roofline_info
from attnlab_kernels.attention_call import AttentionCall
from attnlab_kernels.masks import Causal, Documents, Full, Mask, Padding, Window
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.softmax.api import attend
from attnlab_kernels.patterns import build_pattern
from attnlab_storage import results
from attnlab_webui.experiment_view import clock_words

CPU = torch.device("cpu")
PATTERNS = ("local", "strided", "fixed", "local_global", "longformer", "bigbird")
SPARSE = {
    "local_window": 6, "stride": 5, "block_size": 4, "global_tokens": 2, "summary_tokens": 2, "num_random": 1,
}  # fmt: skip
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(3),
    "padded": Causal() & Padding(((2, 13), (0, 9))),
    "packed": Causal() & Documents((3, 1, 9)),
}


def call_of(mask: Mask, dtype: torch.dtype = torch.float32) -> LayerCall:
    query, key = torch.randn(2, 6, 13, 8, dtype=dtype), torch.randn(2, 2, 13, 8, dtype=dtype)
    value = torch.randn(2, 2, 13, 5, dtype=dtype)
    made = attend(query, key, value, mask=mask, scale=0.5, implementation="eager")
    assert made.lse is not None
    return LayerCall(0, "x", query, key, value, mask, 0.5, made.output, made.lse, "eager", "")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_operations_are_those_of_the_masks_own_pairs(mask: Mask) -> None:
    rows = np.arange(13)
    batched = mask.form().batch_size > 1
    tiles = [
        mask.allowed(rows, rows, num_queries=13, num_keys=13, **({"batch": element} if batched else {}))
        for element in range(2)
    ]
    pairs = int(sum(tile.sum() for tile in tiles))
    work = work_of(call_of(mask), backward=False)
    assert work is not None
    assert work.pairs == count_pairs(mask, 2, 13, 13) == pairs
    assert work.flops == 6 * pairs * 2 * (8 + 5)
    assert work_of(call_of(mask), backward=True).flops == round(3.5 * work.flops)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("mask", [Causal(), Causal() & Padding(((2, 13), (0, 9)))], ids=["causal", "padded"])
@pytest.mark.parametrize("queries", [13, 5])
def test_operations_of_a_pattern_are_those_of_its_own_pairs(name: str, mask: Mask, queries: int) -> None:
    pattern = build_pattern(name, True, **SPARSE)
    rows, cols = np.arange(13 - queries, 13), np.arange(13)
    pairs = 0
    for element in range(2):
        batch = element if mask.form().batch_size > 1 else 0
        open_pairs = mask.allowed(rows - 13 + queries, cols, num_queries=queries, num_keys=13, batch=batch)
        for head in range(6):
            pairs += int((pattern.allowed(rows, cols, num_keys=13, head=head) & open_pairs).sum())
    assert pattern_pairs(pattern, mask, 2, 6, queries, 13) * 6 == pytest.approx(pairs)


def test_operations_of_a_neighborhood_are_those_of_its_own_pairs() -> None:
    around = Neighborhood((4, 5), (3, 3), (1, 1), (1, 1), (False, False))
    everyone = np.arange(20)
    query = torch.randn(2, 3, 20, 8)
    told = told_by(query, "neighborhood", asdict(around))
    work = work_of(LayerCall.told(0, "x", told), backward=False)
    assert work is not None
    assert work.pairs == 2 * around.allowed(everyone, everyone).sum() == 2 * 20 * 9
    assert work.flops == 2 * work.pairs * 3 * (8 + 8)
    hidden = replace(told, unmapped="pixels are hidden from everyone")
    assert work_of(LayerCall.told(0, "x", hidden), backward=False) is None


def told_by(query: torch.Tensor, kind: str, detail: dict[str, Any]) -> AttentionCall:
    rest = (query, query, query, query[..., 0], Full(), 1.0, "tiled", torch.add, torch.add, ())
    return AttentionCall(kind, query, *rest, detail=detail)


def test_without_a_mask_they_are_what_torch_counts() -> None:
    call = call_of(Full())
    with FlopCounterMode(display=False) as counter:
        attend(call.query, call.key, call.value, mask=Full(), implementation="eager")
    work = work_of(call, backward=False)
    assert work is not None
    assert work.flops == counter.get_total_flops()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_every_tensor_is_counted_once(dtype: torch.dtype, size: int) -> None:
    work = work_of(call_of(Causal(), dtype), backward=False)
    assert work is not None
    query, key, value, output, lse = 6 * 13 * 8, 2 * 13 * 8, 2 * 13 * 5, 6 * 13 * 5, 6 * 13
    assert work.bytes == 2 * (size * (query + key + value + output) + 4 * lse)
    both = work_of(call_of(Causal(), dtype), backward=True)
    assert both is not None
    assert both.bytes - work.bytes == 2 * (size * (2 * (query + key + value) + 2 * output) + 4 * lse)


def test_a_ceiling_is_the_lower_of_two() -> None:
    device = {"copy_bytes_per_s": 10.0, "matmul_flops_per_s": 40.0}
    low = stand(20, 10, 2.0, device)
    assert low == {
        "intensity": 2.0, "flops_per_s": 10.0, "ceiling_flops_per_s": 20.0, "share": 0.5, "bound": "memory",
    }  # fmt: skip
    high = stand(80, 10, 2.0, device)
    assert (high["ceiling_flops_per_s"], high["share"], high["bound"]) == (40.0, 1.0, "compute")
    with pytest.raises(ValueError, match="must be above 0"):
        stand(1, 0, 1.0, device)


def test_a_device_that_is_slower_than_when_it_was_measured_has_a_lower_ceiling() -> None:
    device = {"copy_bytes_per_s": 10.0, "matmul_flops_per_s": 40.0, "mhz": 2000.0}
    bound = stand(80, 10, 4.0, device)
    slower = at_clock(bound, device, 1000.0, peak=100.0)
    assert slower == {
        "mhz": 1000.0, "ceiling_mhz": 2000.0, "ceiling_flops_per_s": 20.0, "share": 1.0, "peak_flops_per_s": 100.0,
        "peak_share": 0.2,
    }  # fmt: skip
    # the copy bounds it, whose clock is another
    assert at_clock(stand(20, 10, 4.0, device), device, 1000.0)["share"] == 0.25
    assert at_clock(bound, device, None) == {}
    assert at_clock(bound, KNOWN, 1000.0) == {}
    words = clock_words(slower)
    assert "at the 1000 MHz sampled 100 % (ceiling measured at 2000 MHz)" in words
    assert "20 % of the card's 1e-10 TFLOP/s at 1000 MHz" in words


@dataclass
class Measuring:
    """A clock, and how often a ceiling was measured; each is half as high as the one before."""

    now: float = 1e9
    times: int = 0

    def measure(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        speed = 8.0 / 2**self.times
        self.times += 1
        return {"copy_bytes_per_s": speed, "matmul_flops_per_s": speed, "measured_at": self.now}


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch, home: Path) -> Measuring:
    made = Measuring()
    monkeypatch.setattr(ceilings, "measure", made.measure)
    monkeypatch.setattr(ceilings, "_measured", {})
    monkeypatch.setattr(ceilings.time, "time", lambda: made.now)
    return made


def test_a_ceiling_is_measured_once_a_week_for_each_dtype(measuring: Measuring, home: Path) -> None:
    first = ceilings.ceilings_of(CPU, torch.float32)
    ceilings._measured.clear()  # as in another process
    assert ceilings.ceilings_of(CPU, torch.float32) == first
    ceilings.ceilings_of(CPU, torch.float64)
    assert measuring.times == 2
    better = ceilings.ceilings_of(CPU, torch.float32, again=True)
    assert (measuring.times, better["copy_bytes_per_s"]) == (3, 8.0)
    measuring.now += 8 * 86_400
    assert ceilings.ceilings_of(CPU, torch.float32)["copy_bytes_per_s"] == 1.0
    (home / "ceilings.json").write_text("not JSON")
    ceilings._measured.clear()
    assert ceilings.ceilings_of(CPU, torch.float32)["copy_bytes_per_s"] == 0.5


def test_what_is_measured_is_what_a_copy_and_a_product_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.COPIED_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(ceilings.LARGEST_SIDE, "cpu", 256)
    monkeypatch.setattr(ceilings, "_timed", lambda step, device: (step(), 0.25)[1])
    found = ceilings.measure(CPU, torch.float64)
    assert found["copy_bytes_per_s"] == 4 * 2 * (1 << 20)
    assert found["matmul_flops_per_s"] == 4 * 2 * 256**3
    assert (found["dtype"], found["side"], found["threads"]) == ("float64", 256, torch.get_num_threads())


SPEC = {
    "name": "roofs",
    "module": {"dim": 32, "num_heads": 4},
    "vary": {"mechanism": ["multi_head", "linear", "sparse"], "sequence_length": [64]},
    "record": ["timing"],
    "repeats": 2,
}
KNOWN = {
    "copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e12, "dtype": "float32", "device": "made up", "measured_at": 5.0,
}  # fmt: skip


def test_a_timed_run_stands_under_its_ceilings(sqlite_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedure, "ceilings_of", lambda *given, again=False: KNOWN)
    experiment = run_here(sqlite_store, parse_spec(SPEC))
    documents = [
        run_document(sqlite_store, run.id) for run in results.runs_of(sqlite_store, experiment_id=experiment)
    ]
    plain, linear, sparse = documents
    found = plain["roofline"]
    assert found["flops"] == 4 * (64 * 65 // 2) * 2 * (8 + 8)
    assert found["flops_per_s"] == pytest.approx(
        found["flops"] / plain["attention_latency_ms"]["median"] * 1e3
    )
    assert plain["environment"]["ceilings"] == KNOWN
    assert linear["roofline"]["counted"].endswith("linear attention")
    assert sparse["roofline"]["counted"].endswith("x the pattern's pairs")
    assert sparse["roofline"]["pairs"] <= plain["roofline"]["pairs"]
    info = roofline_info(documents)
    assert [point.share for point in info.points] == [
        found["share"],
        linear["roofline"]["share"],
        sparse["roofline"]["share"],
    ]
    assert info.missing == []
    uncounted = roofline_info([sparse | {"roofline": None}])
    assert uncounted.missing == [f"#{sparse['id']} sparse fused: no count of operations, or no time"]
    roof, *points = roofline_figure(info).to_plotly_json()["data"]
    assert roof["name"] == "made up · float32"
    assert roof["y"][1] == roof["y"][2] == 1e12
    assert roof["x"][1] == pytest.approx(100)
    assert [point["y"][0] for point in points] == [point.speed for point in info.points]
    assert [point["name"] for point in points] == [
        "multi_head · sdpa_flash", "linear · chunked", "sparse · fused",
    ]  # fmt: skip
    again = roofline_figure(roofline_info([plain, linear, plain])).to_plotly_json()["data"][1:]
    assert [point["showlegend"] for point in again] == [True, True, False]
    assert again[0]["marker"]["color"] == again[2]["marker"]["color"] != again[1]["marker"]["color"]
    assert f"{100 * found['share']:.0f} % of its ceiling, bound by memory" in points[0]["hovertemplate"]
