"""What is drawn over a map follows from the mechanism: bands, chunks, blocks, owners, routes, parts."""

from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.errors import ViewError
from attnlab.views.viewport import head_overlays, load_map, load_part
from attnlab_kernels.mechanisms.build import build_mechanism
from attnlab_kernels.operations.ring.layout import owners
from attnlab_storage import results
from attnlab_storage.database import Store
from attnlab_webui import api

TOKENS, DIM, HEADS = 30, 24, 4


def ran(store: Store, mechanism: str, given: dict[str, Any]) -> int:
    values = {
        "name": mechanism,
        "module": {"dim": DIM, "num_heads": HEADS},
        "vary": {"mechanism": [{mechanism: given}], "sequence_length": [TOKENS]},
        "record": ["maps"],
    }
    (run,) = results.runs_of(store, experiment_id=run_here(store, parse_spec(values)))
    assert (run.state, run.reason) == ("succeeded", None)
    return run.id


def named(store: Store, run_id: int, head: int = 0) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in head_overlays(store, run_id, 0, head)}


def test_a_window_is_a_diagonal_just_before_the_first_key_that_is_seen(sqlite_store: Store) -> None:
    run = ran(sqlite_store, "sliding_window", {"window_size": 7})
    ((row, col), _) = named(sqlite_store, run)["window"]["lines"][0]
    tile = load_map(sqlite_store, run, 0, 0).tile(slice(None), slice(None))
    assert (row, col) == (6, 0)
    for query in range(row, TOKENS):
        seen = np.flatnonzero(tile[query])
        assert seen[0] == query - row + col


def test_chunks_end_where_the_prompt_was_cut(sqlite_store: Store) -> None:
    found = named(sqlite_store, ran(sqlite_store, "chunked_prefill", {"chunk_size": 7}))
    cuts = {line[0][0] for line in found["chunks"]["lines"] if line[0][1] == 0}
    assert cuts == {7, 14, 21, 28}


def test_blocks_stand_in_logical_order_with_their_place_in_the_pool(sqlite_store: Store) -> None:
    found = named(sqlite_store, ran(sqlite_store, "paged", {"block_size": 8}))["blocks"]
    assert found["values"] == [place // 8 for place in range(TOKENS)]
    assert len(set(found["names"])) == 4


def seen_by(store: Store, run: int) -> np.ndarray:
    return load_map(store, run, 0, 0).tile(slice(None), slice(None)) > 0


@pytest.mark.parametrize(
    ("pattern", "size"), [("bigbird", {"block_size": 8, "num_random": 1}), ("fixed", {"stride": 8})]
)
def test_blocks_of_a_pattern_are_where_what_a_query_sees_changes(
    sqlite_store: Store, pattern: str, size: dict[str, int]
) -> None:
    run = ran(sqlite_store, "sparse", {"sparsity_pattern": pattern, **size})
    lines = named(sqlite_store, run)["block edges"]["lines"]
    edges = {8, 16, 24}
    assert {start[1] for start, _ in lines if start[0] == 0 and start[1]} == edges
    assert {start[0] for start, _ in lines if start[1] == 0 and start[0]} == edges
    below = np.tril(seen_by(sqlite_store, run))
    # away from the diagonal the rows of a block see the same keys
    assert all((below[at : at + 6, :at] == below[at, :at]).all() for at in edges)


@pytest.mark.parametrize(
    ("pattern", "given"),
    [
        ("local", {"local_window": 6}),
        ("strided", {"stride": 6}),
        ("local_global", {"local_window": 6, "global_tokens": 3}),
        ("longformer", {"local_window": 6, "global_tokens": 3}),
    ],
)
def test_the_band_of_a_pattern_begins_at_the_first_near_key_and_the_shared_tokens_end_at_their_line(
    sqlite_store: Store, pattern: str, given: dict[str, int]
) -> None:
    run = ran(sqlite_store, "sparse", {"sparsity_pattern": pattern, **given})
    found, seen = named(sqlite_store, run), seen_by(sqlite_store, run)
    ((row, col), _) = found["window"]["lines"][0]
    shared = found.get("global tokens", {"lines": [[(0, 0)]]})["lines"][0][0][1]
    assert shared == given.get("global_tokens", 0)
    for query in range(int(row) + 5, TOKENS):
        edge = query - int(row - col)
        assert seen[query, edge : query + 1].all()
        assert pattern == "strided" or not seen[query, int(shared) : edge].any()
    assert seen[:, : int(shared)].sum() == np.tri(TOKENS, int(shared)).sum()


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_a_ring_says_who_owns_what_and_when_they_meet(sqlite_store: Store, layout: str) -> None:
    found = named(sqlite_store, ran(sqlite_store, "ring", {"ring_size": 3, "layout": layout}))
    whose = owners(layout, TOKENS, 3)
    assert found["query owners"]["values"] == found["key owners"]["values"] == whose.tolist()
    assert found["step, for rank 0"]["values"] == [(0 - owner) % 3 for owner in whose]


def test_experts_are_those_that_the_router_chose(sqlite_store: Store) -> None:
    run = ran(sqlite_store, "switch_head", {"top_k": 1})
    torch.manual_seed(0)
    module = build_mechanism("switch_head", dim=DIM, num_heads=HEADS, causal=True, top_k=1).eval()
    routing = module(torch.randn(1, TOKENS, DIM), return_dict=True).aux["routing"]
    for head in range(HEADS):
        found = named(sqlite_store, run, head)
        for name, which in (("value experts", "source"), ("output experts", "destination")):
            assert found[name]["values"] == routing[which].experts[0, :, head, 0].tolist()


def test_the_two_maps_and_lambda_make_the_difference(sqlite_store: Store) -> None:
    run = ran(sqlite_store, "differential", {})
    part = slice(None), slice(None)
    first, second = (load_part(sqlite_store, run, 0, 1, name).tile(*part) for name in ("first", "second"))
    np.testing.assert_allclose(first.sum(1), 1, atol=1e-6)
    signed = load_map(sqlite_store, run, 0, 1).tile(*part)
    weight = 1 - signed.sum(1)
    np.testing.assert_allclose(first - weight[:, None] * second, signed, atol=1e-6)
    assert f"λ = {weight[0]:.4g}" in named(sqlite_store, run, 1)["lambda"]["help"]


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_the_two_parts_of_a_latent_score_make_the_map(sqlite_store: Store, form: str) -> None:
    sizes = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "form": form}
    run = ran(sqlite_store, "multi_head_latent", sizes)
    part = slice(None), slice(None)
    content, position = (
        load_part(sqlite_store, run, 0, 2, name).tile(*part) for name in ("content", "position")
    )
    weights = np.exp((content + position).astype(np.float64)) * np.tri(TOKENS)
    exact = load_map(sqlite_store, run, 0, 2).tile(*part)
    np.testing.assert_allclose(weights / weights.sum(1, keepdims=True), exact, atol=1e-6)
    assert np.abs(position).max() > 0.05


def test_the_api_serves_overlays_parts_and_what_columns_are(sqlite_store: Store) -> None:
    run = ran(sqlite_store, "differential", {})
    slots = ran(sqlite_store, "linear", {"variant": "linformer", "num_slots": 5})
    app = FastAPI()
    api.install(app, sqlite_store)
    client = TestClient(app)

    def get(path: str) -> Any:
        return client.get(f"/api/v1/runs/{path}").json()

    (layer,) = get(f"{run}/map")["layers"]
    assert (layer["kind"], layer["signed"], set(layer["parts"])) == ("difference", True, {"first", "second"})
    assert "5 slots" in get(f"{slots}/map")["layers"][0]["columns"]
    assert get(f"{run}/overlays?layer=0&head=1")["overlays"] == head_overlays(sqlite_store, run, 0, 1)
    whole, first, second = (
        get(f"{run}/cell?layer=0&head=1&row=9&col=3{part}")["value"]
        for part in ("", "&part=first", "&part=second")
    )
    weight = 1 - load_map(sqlite_store, run, 0, 1).row_sums()[9]
    assert whole == pytest.approx(first - weight * second, abs=1e-6)


def test_a_part_that_a_map_has_not_is_refused(sqlite_store: Store) -> None:
    run = ran(sqlite_store, "multi_head", {})
    with pytest.raises(ViewError, match="part must be one of none: this map has none; got 'first'"):
        load_part(sqlite_store, run, 0, 0, "first")
    assert head_overlays(sqlite_store, run, 0, 0) == []
