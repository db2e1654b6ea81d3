"""Laws of decoding several steps: each step is the row that one full pass over the same tokens has in its place."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from model_fixtures import HEADS, LAYERS
from transformers import LlamaForCausalLM

from attnlab.problems import SpecError
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.viewport import load_map
from attnlab_kernels.catalog import MECHANISMS
from attnlab_storage import results
from attnlab_storage.database import Store

pytestmark = pytest.mark.usefixtures("forget_models")

TOKENS, STEPS = 13, 5
SMALL: dict[str, dict[str, Any]] = {
    "sliding_window": {"window_size": 6},
    "neighborhood": {"kernel_size": 3},
}
ONE_STEP_ONLY = {"sliding_window"}
"""whose cache rolls over"""


def spec_of(given: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "steps",
        "model": given,
        "input": {"synthetic": "random"},
        "vary": {"mechanism": ["multi_head"], "sequence_length": [TOKENS]},
        "record": ["maps"],
    }
    vary = changes.pop("vary", {})
    return values | changes | {"vary": values["vary"] | vary}


def ran(store: Store, values: dict[str, Any]) -> list[results.RunRow]:
    return results.runs_of(store, experiment_id=run_here(store, parse_spec(values)))


def assert_rows_equal(store: Store, steps: int, full: int, layers: int, heads: int) -> None:
    for layer, head in itertools.product(range(layers), range(heads)):
        rows = load_map(store, steps, layer, head)
        wanted = load_map(store, full, layer, head)
        assert rows.shape == (STEPS, wanted.shape[1])
        last = slice(wanted.shape[0] - STEPS, wanted.shape[0])
        np.testing.assert_allclose(
            rows.tile(slice(None), slice(None)), wanted.tile(last, slice(None)), atol=1e-5
        )


def test_rows_of_decoding_steps_equal_those_of_one_full_pass(sqlite_store: Store, tiny: str) -> None:
    vary = {"mechanism": ["multi_head", {"sliding_window": {"window_size": 6}}], "batch_size": [2]}
    record = ["maps", "statistics", "accuracy"]
    walked = ran(
        sqlite_store, spec_of(tiny, phase="decode", decode={"steps": STEPS}, record=record, vary=vary)
    )
    whole = ran(sqlite_store, spec_of(tiny, record=record, vary=vary))
    for steps, full in zip(walked, whole, strict=True):
        assert (steps.state, steps.reason) == ("succeeded", None)
        assert_rows_equal(sqlite_store, steps.id, full.id, LAYERS, HEADS)
        given = results.run_input(sqlite_store, steps.id)
        assert given is not None
        assert given.query_tokens == given.key_tokens[TOKENS - STEPS :]
        traces = results.traces(sqlite_store, steps.id)
        assert max(trace.output_defect for trace in traces) < 1e-5
        assert max(trace.row_sum_defect for trace in traces) < 1e-6


def test_statistics_of_steps_are_those_of_their_rows(sqlite_store: Store, tiny: str) -> None:
    record = ["maps", "statistics"]
    (run,) = ran(sqlite_store, spec_of(tiny, phase="decode", decode={"steps": STEPS}, record=record))
    found = {
        (row.layer, row.head): row.value for row in results.measurements(sqlite_store, run.id, "entropy")
    }
    for (layer, head), value in found.items():
        rows = load_map(sqlite_store, run.id, layer or 0, head or 0).tile(slice(None), slice(None))
        logs = np.log(np.where(rows > 0, rows, 1), dtype=np.float64)
        assert value == pytest.approx(-(rows * logs).sum(1).mean(), abs=1e-5)
    assert len(found) == LAYERS * HEADS


def test_what_a_model_writes_is_its_own_greedy_generation(sqlite_store: Store, tiny: str) -> None:
    decode = {"steps": STEPS, "generate": True}
    (run,) = ran(sqlite_store, spec_of(tiny, phase="decode", decode=decode))
    assert (run.state, run.reason) == ("succeeded", None)
    given = results.run_input(sqlite_store, run.id)
    assert given is not None
    ids = [int(token[1:-1]) for token in given.key_tokens]
    assert len(ids) == TOKENS
    prompt = torch.tensor([ids[:-STEPS]])
    model: Any = LlamaForCausalLM.from_pretrained(tiny)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    theirs = model.generate(prompt, max_new_tokens=STEPS, min_new_tokens=STEPS, **options)
    assert theirs[0].tolist() == ids
    assert given.query_tokens == given.key_tokens[-STEPS:]
    assert (given.detail or {})["generated_tokens"] == STEPS


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_module_decodes_the_rows_of_its_full_pass_or_says_why_not(
    sqlite_store: Store, mechanism: str
) -> None:
    values = spec_of(
        "", module={"dim": 24, "num_heads": 2}, vary={"mechanism": [{mechanism: SMALL.get(mechanism, {})}]}
    )
    del values["model"]
    (steps,) = ran(sqlite_store, values | {"phase": "decode", "decode": {"steps": STEPS}})
    if steps.state == "unsupported":
        assert mechanism in ONE_STEP_ONLY or "cannot decode" in (steps.reason or ""), steps.reason
        return
    assert (steps.state, steps.reason) == ("succeeded", None)
    assert mechanism not in ONE_STEP_ONLY
    (full,) = ran(sqlite_store, values)
    assert_rows_equal(sqlite_store, steps.id, full.id, 1, 2)


@pytest.mark.parametrize(
    ("mechanism", "parameters"),
    [
        ("linear", {"feature_map": "relu"}),
        ("linear", {"feature_map": "identity"}),
        ("linear", {"feature_map": "softmax_kernel", "num_features": 24}),
        ("differential", {"variant": "v2"}),
        ("sparse", {"sparsity_pattern": "strided", "stride": 3}),
        ("sparse", {"sparsity_pattern": "bigbird", "block_size": 2}),
    ],
)
def test_each_form_of_a_mechanism_decodes_its_rows(
    sqlite_store: Store, mechanism: str, parameters: dict[str, Any]
) -> None:
    values = spec_of("", module={"dim": 24, "num_heads": 2}, vary={"mechanism": [{mechanism: parameters}]})
    del values["model"]
    (steps,) = ran(sqlite_store, values | {"phase": "decode", "decode": {"steps": STEPS}})
    assert (steps.state, steps.reason) == ("succeeded", None)
    (full,) = ran(sqlite_store, values)
    assert_rows_equal(sqlite_store, steps.id, full.id, 1, 2)
    (trace,) = results.traces(sqlite_store, steps.id)
    assert trace.output_defect < 1e-5
    assert trace.row_sum_defect < 1e-6


@pytest.mark.parametrize("features", ["elu", "softmax_kernel"])
def test_a_model_with_linear_attention_decodes_the_rows_of_its_full_pass(
    sqlite_store: Store, tiny: str, features: str
) -> None:
    record = ["maps", "statistics"]
    given: dict[str, Any] = {"vary": {"mechanism": [{"linear": {"feature_map": features}}]}, "record": record}
    (steps,) = ran(sqlite_store, spec_of(tiny, phase="decode", decode={"steps": STEPS}, **given))
    assert (steps.state, steps.reason) == ("succeeded", None)
    (full,) = ran(sqlite_store, spec_of(tiny, **given))
    assert_rows_equal(sqlite_store, steps.id, full.id, LAYERS, HEADS)
    assert max(trace.output_defect for trace in results.traces(sqlite_store, steps.id)) < 1e-5
    assert results.measurements(sqlite_store, steps.id, "entropy")


def test_sparse_steps_that_would_change_earlier_rows_are_refused_with_the_reason(sqlite_store: Store) -> None:
    refused = {
        "holds all 10 global tokens, got 8": ({"sparsity_pattern": "longformer", "global_tokens": 10}, True),
        "without a causal order": ({"sparsity_pattern": "strided"}, False),
    }
    for reason, (parameters, causal) in refused.items():
        module = {"dim": 24, "num_heads": 2, "causal": causal}
        values = spec_of("", module=module, vary={"mechanism": [{"sparse": parameters}]})
        del values["model"]
        (run,) = ran(sqlite_store, values | {"phase": "decode", "decode": {"steps": STEPS}})
        assert run.state == "unsupported"
        assert reason in (run.reason or "")


def test_a_step_has_a_token_before_it_and_only_models_write(tiny: str) -> None:
    refused = {
        "decode.steps: must be fewer than the 13 tokens": {"phase": "decode", "decode": {"steps": TOKENS}},
        "decode: is for phase decode": {"decode": {"steps": 2}},
        "decode.generate: is for models": {
            "phase": "decode",
            "decode": {"steps": 2, "generate": True},
            "module": {"dim": 24, "num_heads": 2},
            "model": None,
        },
    }
    for message, changes in refused.items():
        with pytest.raises(SpecError, match=message):
            parse_spec(spec_of(tiny, **changes))
