"""A preset's runs end with the numbers that its claims need."""

from typing import Any

import pytest

from attnlab.describe import run_document
from attnlab.presets import Preset, Which
from attnlab.presets.claim import Claim
from attnlab.presets.grid import Grid, Size
from attnlab.presets.outcome import preset_state
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_kernels.catalog import MECHANISMS
from attnlab_storage import results

LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
GRID = Grid(
    "small",
    (
        "multi_head",
        {"grouped_query": {"num_kv_heads": 2}},
        {"multi_head_latent": LATENT},
        {"paged": {"block_size": 4}},
        {"sliding_window": {"window_size": 5}},
        "linear",
    ),
    Size(64, 8, (12,)),
    Size(64, 8, (12,)),
    phase="decode",
    record=("memory",),
)
CLAIM = Claim(
    *("gqa", "a quarter", "cache_bytes", 0.25, 0.25, Which("grouped_query"), Which("multi_head")),
    how="cache.nbytes()",
    source="made up",
)


def test_the_cache_of_a_decoding_run_weighs_what_the_formula_says_and_its_claim_is_judged(sqlite_store):
    preset = Preset("small", "Small", "about", (GRID,), (CLAIM,))
    run_here(sqlite_store, GRID.spec("cpu"), tags=(preset.tag,))
    state = preset_state(sqlite_store, preset)
    assert {document["state"] for document in state.documents} == {"succeeded"}
    for document in state.documents:
        record = MECHANISMS[document["mechanism"]]
        shape = {"heads": 8, "kv_heads": 8, "head_dim": 8, "layers": 1, "bytes_per_element": 4}
        expected = record.cache_bytes(tokens=11, **shape, **document["parameters"])
        if document["mechanism"] != "sliding_window":  # keeps one token less, that of the step comes on top
            assert document["cache_bytes"] == expected, document["mechanism"]
        assert 0 < document["cache_bytes"] <= expected
    verdict = state.verdicts["gqa"]
    assert verdict.kind == "holds"
    assert verdict.measured == pytest.approx(0.25)


def test_a_prompt_has_no_cache_to_weigh(sqlite_store):
    document: dict[str, Any] = GRID.document("cpu") | {"phase": "prefill"}
    document["vary"]["mechanism"] = ["multi_head"]
    experiment = run_here(sqlite_store, parse_spec(document))
    (run,) = results.runs_of(sqlite_store, experiment_id=experiment)
    assert run_document(sqlite_store, run.id)["cache_bytes"] is None
