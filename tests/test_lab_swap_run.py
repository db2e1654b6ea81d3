"""A whole run of a swap: its label, the loss that is stored beside it, and a map that can be read back."""

from typing import Any

import numpy as np
import pytest

from attnlab.bundled import BUNDLED, is_fetched
from attnlab.describe import run_document
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_storage import results
from attnlab_storage.database import Store

LOSSES = {"kl", "perplexity", "logit_error", "map_change"}
SWAPS: list[Any] = [
    {"sparse": {"sparsity_pattern": "strided", "stride": 4}},
    {"neighborhood": {"kernel_size": 5}},
    "linear",
    {"multi_head_latent": {"kv_lora_rank": 9}},
    {"flash_attention_3": {"use_fp8": True}},
    "paged",
    {"ring": {"layout": "zigzag"}},
    {"chunked_prefill": {"chunk_size": 7}},
]


pytestmark = pytest.mark.usefixtures("forget_models")


def documents(store: Store, values: dict[str, Any]) -> list[dict[str, Any]]:
    experiment = run_here(store, parse_spec(values))
    return [run_document(store, run.id) for run in results.runs_of(store, experiment_id=experiment)]


def judged(document: dict[str, Any], approximate: bool) -> None:
    assert (document["outcome"], document["reason"]) == ("succeeded", None)
    swap = document["swap"]
    assert swap["kind"] == ("approximate" if approximate else "exact")
    if approximate:
        assert swap["loss"].keys() == LOSSES
        assert all(value > 0 for value in swap["loss"].values())
    else:
        assert swap["loss"]["logit_error"] < 2e-4
    assert document["map_check"]["row_sum_defect"] < 1e-5
    assert document["map_check"]["output_defect"] < (0.2 if "use_fp8" in document["parameters"] else 1e-4)


def test_each_run_says_what_kind_of_swap_it_is_and_what_it_loses(sqlite_store: Store, tiny: str) -> None:
    made = documents(
        sqlite_store,
        {
            "name": "swaps",
            "model": tiny,
            "input": {"synthetic": "random"},
            "vary": {"mechanism": SWAPS, "sequence_length": [29]},
            "record": ["maps", "accuracy", "statistics"],
        },
    )
    assert len(made) == len(SWAPS)
    for index, document in enumerate(made):
        judged(document, approximate=index < 5)
    changes = results.measurements(sqlite_store, made[0]["id"], "map_change")
    assert {(row.layer, row.head) for row in changes} >= {
        (layer, head) for layer in range(2) for head in range(6)
    }
    assert np.isfinite([row.value for row in changes]).all()


@pytest.mark.model
def test_mechanisms_stand_in_smollm2(sqlite_store: Store) -> None:
    if not is_fetched("smollm2-135m"):
        pytest.skip("smollm2-135m is not fetched: attnlab models fetch smollm2-135m")
    made = documents(
        sqlite_store,
        {
            "name": "smollm2",
            "model": "smollm2-135m",
            "input": {"text": BUNDLED["smollm2-135m"].sample, "max_tokens": 24},
            "vary": {"mechanism": [SWAPS[0], {"multi_head_latent": {"kv_lora_rank": 8}}, "paged", SWAPS[6]]},
            "record": ["maps", "accuracy"],
            "layers": [0, 29],
        },
    )
    for index, document in enumerate(made):
        judged(document, approximate=index < 2)
