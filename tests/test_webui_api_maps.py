"""Laws of maps over HTTP: exact bytes, honest headers, masked apart from zero, and speed."""

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from attnlab_webui import api

EPSILON = 2e-6


@pytest.fixture
def client(traced):
    app = FastAPI()
    api.install(app, traced.store)
    return TestClient(app, raise_server_exceptions=False)


def pixels(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    shape = [int(side) for side in answer.headers["x-attnlab-shape"].split(",")]
    return np.frombuffer(answer.content, "<f4").reshape(shape)


def test_a_viewport_is_the_exact_map_with_nan_where_masked(client, traced):
    run_id = traced.run_ids[0]
    answer = client.get(f"/api/v1/runs/{run_id}/viewport?layer=1&head=2&rows=10:60&cols=0:40")
    values = pixels(answer)
    reference = traced.reference(run_id, 1, 2)[10:60, :40]
    allowed = np.tri(77, dtype=bool)[10:60, :40]
    np.testing.assert_allclose(values[allowed], reference[allowed], atol=EPSILON)
    assert np.isnan(values[~allowed]).all()
    assert answer.headers["x-attnlab-rows"] == "10:60"
    assert answer.headers["x-attnlab-cols"] == "0:40"
    assert answer.headers["x-attnlab-exact"] == "1"
    assert float(answer.headers["x-attnlab-max"]) == pytest.approx(float(np.nanmax(values)))


def test_a_pooled_viewport_says_so_and_keeps_the_largest_weight(client, traced):
    run_id = traced.run_ids[0]
    answer = client.get(f"/api/v1/runs/{run_id}/viewport?layer=0&head=0&height=16&width=20")
    values = pixels(answer)
    assert values.shape == (16, 20)
    assert answer.headers["x-attnlab-exact"] == "0"
    assert np.nanmax(values) == pytest.approx(traced.reference(run_id, 0, 0).max(), abs=EPSILON)


def test_only_an_address_with_a_version_may_be_kept(client, traced):
    path = f"/api/v1/runs/{traced.run_ids[0]}/viewport?layer=0&head=0"
    assert client.get(path).headers["cache-control"] == "no-store"
    assert "immutable" in client.get(path + "&v=1.0").headers["cache-control"]


def test_the_map_document_names_layers_sizes_and_checks(client, traced):
    document = client.get(f"/api/v1/runs/{traced.run_ids[1]}/map").json()
    assert document["run"] == traced.run_ids[1]
    assert [layer["layer"] for layer in document["layers"]] == [0, 1]
    first = document["layers"][0]
    assert (first["heads"], first["kv_heads"], first["queries"], first["keys"]) == (4, 2, 77, 77)
    assert first["row_sum_defect"] == pytest.approx(1e-7)


def test_a_cell_is_exact_and_says_whether_it_is_masked(client, traced):
    run_id = traced.run_ids[1]
    path = f"/api/v1/runs/{run_id}/cell?layer=1&head=3"
    found = client.get(path + "&row=70&col=66").json()
    assert found["value"] == pytest.approx(traced.reference(run_id, 1, 3)[70, 66], abs=EPSILON)
    assert found["masked"] is False
    assert client.get(path + "&row=70&col=71").json() == {"row": 70, "col": 71, "value": 0.0, "masked": True}
    assert client.get(path + "&row=70&col=3").json()["masked"] is True


def test_thumbnails_hold_every_head(client, traced):
    run_id = traced.run_ids[0]
    values = pixels(client.get(f"/api/v1/runs/{run_id}/thumbnails?layer=1&size=8"))
    assert values.shape == (4 * 8, 8)
    for head in range(4):
        top = np.nanmax(values[head * 8 : head * 8 + 8])
        assert top == pytest.approx(traced.reference(run_id, 1, head).max(), abs=EPSILON)
    assert np.isnan(values[0, 7])
    alone = pixels(client.get(f"/api/v1/runs/{run_id}/thumbnails?layer=1&head=2&size=8"))
    np.testing.assert_array_equal(alone, values[16:24])
    answer = client.get(f"/api/v1/runs/{run_id}/thumbnails?layer=1&head=4")
    assert (answer.status_code, "head must be in 0..3" in answer.json()["error"]) == (400, True)


def test_statistics_come_by_layer_and_head(client, traced):
    document = client.get(f"/api/v1/runs/{traced.run_ids[0]}/statistics").json()
    entropy = document["statistics"]["entropy"]
    assert entropy["layers"] == [0, 1]
    assert entropy["heads"] == [0, 1, 2, 3]
    assert np.shape(entropy["values"]) == (2, 4)


def test_tokens_come_readable_and_raw(client, traced):
    document = client.get(f"/api/v1/runs/{traced.run_ids[0]}/tokens").json()
    assert document["query"][0] == "·token0"
    assert document["raw_query"][0] == "Ġtoken0"
    assert len(document["key"]) == 77


def test_a_difference_is_a_minus_b_and_masked_only_where_both_are(client, traced):
    a, b = traced.run_ids
    values = pixels(client.get(f"/api/v1/compare/viewport?a={a}&b={b}&layer=0&head=1"))
    expected = traced.reference(a, 0, 1) - traced.reference(b, 0, 1)
    seen = np.tri(77, dtype=bool)
    np.testing.assert_allclose(values[seen], expected[seen], atol=EPSILON)
    assert np.isnan(values[~seen]).all()
    one = client.get(f"/api/v1/compare/cell?a={a}&b={b}&layer=0&head=1&row=60&col=2").json()
    assert one["value"] == pytest.approx(expected[60, 2], abs=EPSILON)
    assert one["masked"] is False


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("layer=2&head=0", "layer must be one of 0..1"),
        ("layer=0&head=4", "head must be in 0..3"),
        ("layer=0&head=-1", "head must be in 0..3"),
        ("layer=0", "head must be given"),
        ("layer=x&head=0", "layer must be a valid integer"),
        ("layer=0&head=0&rows=5", "rows must be a range START:STOP of token positions, got '5'"),
        ("layer=0&head=0&rows=9:5", "rows must be a range start:stop with 0 <= start < stop <= 77; got 9:5"),
        ("layer=0&head=0&cols=0:78", "cols must be a range"),
        ("layer=0&head=0&height=0", "height must be greater than or equal to 1"),
        ("layer=0&head=0&width=5000", "width must be less than or equal to 2048"),
        ("layer=0&head=0&reduce=sum", "reduce must be one of max, mean; got 'sum'"),
    ],
)
def test_a_wrong_region_gets_one_sentence(client, traced, query, words):
    answer = client.get(f"/api/v1/runs/{traced.run_ids[0]}/viewport?{query}")
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]


def test_a_run_without_maps_says_why(client, traced, make_traced):
    other = make_traced(traced.store, outcomes=["out_of_memory"])
    answer = client.get(f"/api/v1/runs/{other.run_ids[2]}/map")
    assert answer.status_code == 404
    assert "out of memory" in answer.json()["error"]


def test_the_difference_of_other_inputs_is_of_the_tokens_that_both_have(client, traced, make_traced):
    other = make_traced(traced.store, tokens=30, seed=3)
    a, b = traced.run_ids[0], other.run_ids[0]
    # both begin with token0 .. token27 and end with the same two tokens
    places = np.array([*range(28), *[-1] * 47, 28, 29])
    told = client.get(f"/api/v1/compare/alignment?a={a}&b={b}&layer=0").json()
    assert told["key"] == told["query"] == places.tolist()
    values = pixels(client.get(f"/api/v1/compare/viewport?a={a}&b={b}&layer=0&head=1"))
    both = (places >= 0)[:, None] & (places >= 0) & np.tri(77, dtype=bool)
    moved = other.reference(b, 0, 1)[np.ix_(places, places)]
    expected = traced.reference(a, 0, 1) - moved
    np.testing.assert_allclose(values[both], expected[both], atol=EPSILON)
    assert np.isnan(values[~both]).all()
    path = f"/api/v1/compare/cell?a={a}&b={b}&layer=0&head=1"
    assert client.get(f"{path}&row=76&col=75").json()["value"] == pytest.approx(expected[76, 75], abs=EPSILON)
    assert client.get(f"{path}&row=60&col=2").json()["value"] is None
    small = pixels(
        client.get(f"/api/v1/compare/viewport?a={a}&b={b}&layer=0&head=1&height=7&width=7&reduce=mean")
    )
    assert small[0, 0] == pytest.approx(expected[:11, :11].mean(), abs=EPSILON)


def test_equal_tokens_need_no_alignment(client, traced):
    a, b = traced.run_ids
    told = client.get(f"/api/v1/compare/alignment?a={a}&b={b}&layer=0").json()
    assert told == {"query": None, "key": None, "share": 1.0}


def test_colour_tables_have_256_colours(client):
    for table in client.get("/api/v1/colormaps").json()["colormaps"].values():
        assert len(table) == 768
        assert all(0 <= value <= 255 for value in table)


def test_a_viewport_of_a_long_map_is_the_pooled_map(sqlite_store, make_traced):
    made = make_traced(sqlite_store, tokens=2048, layers=1)
    app = FastAPI()
    api.install(app, made.store)
    answer = TestClient(app).get(
        f"/api/v1/runs/{made.run_ids[0]}/viewport?layer=0&head=1&rows=300:2000&cols=100:1900&height=512&width=512"
    )
    assert answer.status_code == 200
    shown = np.frombuffer(answer.content, "<f4").reshape(512, 512)
    whole = made.reference(made.run_ids[0], 0, 1)[300:2000, 100:1900]
    assert np.isnan(shown).any()
    assert np.nanmax(shown) == pytest.approx(whole.max(), abs=1e-6)
    top = np.arange(513) * 1700 // 512
    left = np.arange(513) * 1800 // 512
    for y, x in ((511, 0), (400, 17), (300, 200)):
        cell = whole[top[y] : top[y + 1], left[x] : left[x + 1]].max()
        assert shown[y, x] == pytest.approx(cell, abs=1e-6)


def test_a_text_has_no_picture_and_no_sound(client, traced):
    run_id = traced.run_ids[0]
    assert client.get(f"/api/v1/runs/{run_id}/picture").json() == {"picture": None, "answer": None}
    assert client.get(f"/api/v1/runs/{run_id}/sound").json()["envelope"] is None
