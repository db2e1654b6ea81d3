"""Whole runs of models that change their scores: what is stored draws the maps, the swaps keep or refuse the rules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from attnlab.probes.score_rules import DENSE_BIAS_CELLS, rules_of
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.viewport import load_map, viewport
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage import results, tensors
from attnlab_storage.database import Store

pytestmark = pytest.mark.usefixtures("forget_models")

TOKENS = 13
DECODER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "sliding_window": 5,
}


def build(name: str) -> Any:
    torch.manual_seed(1)
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**DECODER, attn_logit_softcapping=2.0))
    if name == "gpt_oss":
        return GptOssForCausalLM(GptOssConfig(**DECODER, num_local_experts=4))
    sizes: dict[str, Any] = {
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 6,
        "vocab_size": 97,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config(**sizes, relative_attention_num_buckets=8, pad_token_id=0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made: dict[str, str] = {}
    for name in ("gemma2", "gpt_oss", "t5"):
        folder: Path = tmp_path_factory.mktemp("models") / name
        build(name).save_pretrained(folder)
        made[name] = str(folder)
    return made


def ran(
    store: Store, model: str, mechanism: str = "multi_head", dtype: str = "float32", **changes: Any
) -> results.RunRow:
    values = {
        "name": "modified",
        "model": model,
        "input": {"synthetic": "random"},
        "vary": {"mechanism": [mechanism], "sequence_length": [TOKENS], "dtype": [dtype]},
        "record": ["maps", "statistics", "accuracy", "timing"],
        "repeats": 2,
    }
    experiment = run_here(store, parse_spec(values | changes))
    [run] = results.runs_of(store, experiment_id=experiment)
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_run_stores_what_draws_its_maps(
    name: str, dtype: str, folders: dict[str, str], sqlite_store: Store
) -> None:
    run = ran(sqlite_store, folders[name], dtype=dtype)
    assert run.state == "succeeded", run.reason
    for trace in results.traces(sqlite_store, run.id):
        assert trace.row_sum_defect < 1e-6
        told = (trace.detail or {})["score"]
        assert set(told) == ({"softcap"} if name == "gemma2" else {"sinks"})
        sums = load_map(sqlite_store, run.id, trace.layer, 3).row_sums()
        if name == "gemma2":
            np.testing.assert_allclose(sums, 1, atol=1e-12)
        else:
            lse = tensors.read_tensor(sqlite_store, run.id, "lse", trace.layer, 3)
            np.testing.assert_allclose(sums, 1 - np.exp(told["sinks"][3] - lse), atol=1e-12)
            assert (sums < 0.99).all()


def test_an_encoder_decoder_with_biases_has_maps_of_all_three_kinds(
    folders: dict[str, str], sqlite_store: Store
) -> None:
    run = ran(sqlite_store, folders["t5"], input={"synthetic": "random", "target": "unused"})
    assert run.state == "succeeded", run.reason


@pytest.mark.parametrize(
    ("mechanism", "state"),
    [
        ("flash", "unsupported"),
        ("sliding_window", "succeeded"),
        ("efficient", "succeeded"),
        ("flash_attention_3", "unsupported"),
        ("multi_head_latent", "unsupported"),
        ("paged", "unsupported"),
    ],
)
def test_a_swap_keeps_the_soft_cap_or_is_refused(
    mechanism: str, state: str, folders: dict[str, str], sqlite_store: Store
) -> None:
    run = ran(sqlite_store, folders["gemma2"], mechanism)
    assert run.state == state, run.reason
    if state == "unsupported":
        assert "soft cap" in (run.reason or "") or "has no softcap" in (run.reason or "")
        return
    for trace in results.traces(sqlite_store, run.id):
        assert (trace.detail or {})["score"] == {"softcap": 2.0}
        assert viewport(sqlite_store, run.id, trace.layer, 0).values.shape == (TOKENS, TOKENS)


def test_a_bias_by_distance_is_kept_as_a_table_and_any_other_whole() -> None:
    table = torch.randn(6, 9 + 17 - 1)
    places = torch.arange(17) - (torch.arange(9)[:, None] + 17 - 9) + 17 - 1
    shifted = rules_of({"bias": table[:, places][None]}, 6, 9, 17)
    assert shifted.bias is None
    assert shifted.table is not None
    assert torch.equal(shifted.table, table)
    free = torch.randn(1, 1, 9, 17)
    kept = rules_of({"bias": free}, 6, 9, 17)
    assert kept.table is None
    assert kept.bias is not None
    assert torch.equal(kept.bias, free[0].expand(6, 9, 17))
    for rules, bias in ((shifted, table[:, places]), (kept, free[0].expand(6, 9, 17))):
        rows, cols = torch.arange(3, 7), torch.arange(2, 15)
        assert torch.equal(rules.apply(torch.zeros(6, 4, 13), rows, cols), bias[:, 3:7, 2:15])


def test_a_bias_too_large_to_keep_is_refused_with_its_size() -> None:
    side = int((DENSE_BIAS_CELLS / 6) ** 0.5) + 1
    with pytest.raises(Unsupported, match=rf"a bias of 6 x {side} x {side} is no function of the distance"):
        rules_of({"bias": torch.randn(1, 1, side, side)}, 6, side, side)
