"""Neighborhood attention by natten and linear attention by flash-linear-attention, behind the lab's own calls."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import pytest
import torch

from attnlab.probes.layout import copied_bytes
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_kernels import Neighborhood
from attnlab_kernels.operations.linear import fla
from attnlab_kernels.operations.linear.api import LinearSums, linear_attend
from attnlab_kernels.operations.neighborhood import natten
from attnlab_kernels.operations.neighborhood.api import neighborhood_attend
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.survey import survey
from attnlab_storage import results

FREE: dict[str, Any] = {"bias": None, "visible": None, "dropout": 0.0, "need_windows": False}
GRIDS = [
    Neighborhood((23,), (5,), (2,), (1,), (True,)),
    Neighborhood((9, 11), (3, 5), (2, 1), (1, 1), (False, False)),
    Neighborhood((5, 6, 7), (3, 3, 5), (1, 1, 1), (1, 2, 1), (False, False, True)),
]


@pytest.fixture
def package(apart) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("natten", reason="natten is not installed")


@pytest.mark.filterwarnings("ignore")  # natten calls torch by names that are going away
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid.space)))
def test_natten_gives_the_references_output_and_natural_log_sum_exp(package, grid):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, *grid.space, 16, generator=generator) for _ in range(3))
    theirs = neighborhood_attend(q, k, v, grid, scale=0.3, implementation="natten")
    ours = neighborhood_attend(q, k, v, grid, scale=0.3, implementation="tiled").result
    assert theirs.implementation == "natten"
    assert "flex-fna" in theirs.reason
    torch.testing.assert_close(theirs.result.output, ours.output, atol=1e-6, rtol=0)
    torch.testing.assert_close(theirs.result.lse, ours.lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bias": torch.zeros(1)}, "takes no table of relative positions"),
        ({"visible": torch.zeros(1)}, "hides no pixels"),
        ({"dropout": 0.1}, "drops no probabilities"),
        ({"need_windows": True}, "keeps no weights by window slot"),
    ],
)
def test_what_natten_lacks_is_refused_with_the_reason(change, says):
    q = torch.randn(1, 2, 9, 16)
    assert says in natten.supports(q, q, q, **FREE | change).reason


@pytest.mark.filterwarnings("ignore")
def test_natten_is_refused_where_it_has_no_kernel_or_no_gradient(package):
    odd, whole = torch.randn(1, 2, 9, 13), torch.randn(1, 2, 9, 16, requires_grad=True)
    with pytest.raises(Unsupported, match="natten cannot run this call: NATTEN could not find a suitable"):
        neighborhood_attend(
            odd, odd, odd, Neighborhood((9,), (3,), (1,), (1,), (False,)), implementation="natten"
        )
    assert "no gradient on a CPU" in natten.supports(whole, whole, whole, **FREE).reason
    with torch.no_grad():
        assert natten.supports(whole, whole, whole, **FREE)


def test_a_missing_natten_is_said(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "natten", None)
    q = torch.randn(1, 2, 9, 16)
    assert "natten cannot run this call: import of natten" in natten.supports(q, q, q, **FREE).reason


@pytest.mark.filterwarnings("ignore")
def test_an_experiment_runs_natten_beside_our_own(package, sqlite_store):
    spec = {
        "name": "windows",
        "module": {"dim": 32, "num_heads": 2, "causal": False},
        "vary": {
            "mechanism": [{"neighborhood": {"kernel_size": 3}}],
            "implementation": ["natten", "tiled"],
            "sequence_length": [49],
        },
        "record": ["timing", "accuracy", "maps"],
        "repeats": 3,
    }
    runs = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, parse_spec(spec)))
    assert [(run.state, run.reason) for run in runs] == [("succeeded", None)] * 2
    theirs, ours = ({row.name: row for row in results.measurements(sqlite_store, run.id)} for run in runs)
    assert theirs["layout_latency"].value == 0  # projections lie as natten reads them
    assert "layout_latency" not in ours
    assert (runs[0].summary or {})["implementation"] == "natten"


def test_an_implementation_of_another_operation_is_unsupported_and_no_failure(sqlite_store):
    mechanisms = [
        "multi_head",
        "cross",
        "paged",
        "chunked_prefill",
        "differential",
        "switch_head",
        "linear",
        "ring",
    ]
    spec = {
        "name": "others",
        "module": {"dim": 32, "num_heads": 2},
        "vary": {"mechanism": mechanisms, "implementation": ["natten"], "sequence_length": [24]},
        "record": ["timing"],
        "repeats": 1,
    }
    runs = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, parse_spec(spec)))
    assert {run.mechanism: run.state for run in runs} == dict.fromkeys(mechanisms, "unsupported")
    assert all("'natten'" in (run.reason or "") for run in runs)


def test_the_survey_has_a_row_and_a_reason_for_both():
    rows = {row["name"]: row for row in survey("cpu")}
    assert rows["sdpa_flash"]["available"]
    for name in ("natten", "fla"):
        assert rows[name]["requires"]
        assert rows[name]["reason"]
    assert "needs an NVIDIA GPU" in rows["fla"]["reason"]


def test_what_their_layout_copies_is_counted():
    heads_first = torch.zeros(1, 2, 9, 16)
    tokens_first = torch.zeros(1, 9, 2, 16).transpose(1, 2)
    for package in (fla, natten):
        assert copied_bytes(package.arrange(heads_first), (heads_first,)) == 2 * 9 * 16 * 4
        assert copied_bytes(package.arrange(tokens_first), (tokens_first,)) == 0


@pytest.fixture
def naive(monkeypatch) -> Any:
    """fla's own naive form, which has the signature of its kernels and runs on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that Triton is slow on a CPU
        module = pytest.importorskip(
            "fla.ops.linear_attn.naive", reason="flash-linear-attention is not installed"
        )
        kernel = pytest.importorskip("fla.ops.linear_attn").chunk_linear_attn
    calls: list[Any] = []

    def call(*given: Any, **named: Any) -> Any:
        inspect.signature(kernel).bind(*given, **named)
        assert all(tensor.is_contiguous() for tensor in given)
        calls.append(named)
        return module.naive_recurrent_linear_attn(*given, **named)

    monkeypatch.setattr(external, "found", lambda *_: call)
    return calls


def test_fla_gives_the_references_sums_from_a_past_on(naive):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(2, 3, 37, width, generator=generator) for width in (8, 8, 5))
    past = LinearSums(torch.rand(2, 3, 8, 5, generator=generator), torch.rand(2, 3, 8, generator=generator))
    made = fla.run(q, k, v, causal=True, past=past, chunk=64)
    want = linear_attend(q, k, v, causal=True, past=past, eps=0.0, form="parallel")
    assert len(naive) == 1
    torch.testing.assert_close(made.numerator / made.denominator[..., None], want.output)
    torch.testing.assert_close(made.denominator, want.denominator)
    torch.testing.assert_close(made.sums.state, want.sums.state)
    torch.testing.assert_close(made.sums.normaliser, want.sums.normaliser)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"card": None}, "needs an NVIDIA GPU from sm80; the tensors are on cpu"),
        ({"card": (7, 5)}, "needs an NVIDIA GPU from sm80"),
        ({"dtype": torch.float32}, "takes float16 or bfloat16, one of them; got float32, float32, float32"),
        ({"causal": False}, "no form without a causal order"),
        ({"chunk": 32}, "takes chunks of 64 tokens; got 32"),
        ({"width": 257}, "is given at most 256 features here; got 257"),
    ],
)
def test_what_fla_lacks_is_refused_with_the_reason(monkeypatch, change, says):
    call = {"card": (9, 0), "dtype": torch.bfloat16, "causal": True, "chunk": 64, "width": 16} | change
    monkeypatch.setattr(external, "card", lambda tensor: call["card"])
    q = torch.zeros(1, 2, 7, call["width"], dtype=call["dtype"])
    support = fla.supports(q, q, q, causal=call["causal"], chunk=call["chunk"])
    assert not support
    assert says in support.reason


def test_a_form_that_cannot_run_here_raises_its_reason():
    q = torch.rand(1, 2, 7, 8)
    with pytest.raises(Unsupported, match="form 'fla' cannot run this call: fla needs an NVIDIA GPU"):
        linear_attend(q, q, q, causal=True, form="fla")
