"""Laws of the HTTP API of the views beside the map: the same numbers as in Python, errors that say the rule."""

import io
import threading

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pyarrow import parquet

from attnlab.views import through_layers
from attnlab.views.distances import head_distances, run_distances
from attnlab.views.flow import attention_flow
from attnlab.views.head_tiles import head_tiles
from attnlab.views.jobs import Jobs
from attnlab.views.rollout import pooled_rollout, rollout
from attnlab.views.token import token_document
from attnlab_storage import tensors
from attnlab_webui import api


@pytest.fixture
def client(traced):
    app = FastAPI()
    api.install(app, traced.store)
    return TestClient(app)


def test_a_token_is_answered_as_in_python(client, traced):
    run_id = traced.run_ids[1]
    found = client.get(f"/api/v1/runs/{run_id}/token?layer=1&head=2&row=50&shown=40:60&count=3").json()
    assert found == token_document(traced.store, run_id, 1, 50, 2, (40, 60), 3)
    mean = client.get(f"/api/v1/runs/{run_id}/token?layer=1&row=50").json()
    assert mean == token_document(traced.store, run_id, 1, 50)


def test_all_heads_of_a_region_come_as_one_block(client, traced):
    run_id = traced.run_ids[0]
    answer = client.get(f"/api/v1/runs/{run_id}/heads?layer=0&rows=10:23&cols=5:30&v=1")
    values = np.frombuffer(answer.content, "<f4").reshape(4, 13, 25)
    np.testing.assert_array_equal(values, head_tiles(traced.store, run_id, 0, (10, 23), (5, 30)))
    assert answer.headers["x-attnlab-rows"] == "10:23"
    assert answer.headers["x-attnlab-cols"] == "5:30"
    assert "immutable" in answer.headers["cache-control"]


def worked_out(client, path: str) -> dict:
    """The answer to a question that may have to be asked again."""
    while (answer := client.get(path)).status_code == 202:
        assert 0 <= answer.json()["building"] < 1
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_rollout_and_a_flow_are_answered_as_in_python(client, traced):
    run_id = traced.run_ids[0]
    found = worked_out(client, f"/api/v1/runs/{run_id}/rollout?row=50&residual=0.25")
    wanted = rollout(traced.store, run_id, 50, residual=0.25)
    np.testing.assert_array_equal(found["shares"], wanted.values[0])
    np.testing.assert_array_equal(found["values"], wanted.flow[:, 0])
    assert (found["layers"], found["columns"]) == ([1, 0], list(range(78)))
    order = np.argsort(-wanted.values[0], kind="stable")[:12]
    assert [place for place, _ in found["top"]] == order.tolist()
    pooled = worked_out(client, f"/api/v1/runs/{run_id}/rollout?height=10")
    np.testing.assert_array_equal(pooled["values"], pooled_rollout(traced.store, run_id, 10).values)
    flow = worked_out(client, f"/api/v1/runs/{run_id}/flow?row=50&tokens=40:51")
    assert flow["shares"] == attention_flow(traced.store, run_id, 50, (40, 51)).values.tolist()
    assert flow["start"] == 40


def test_a_long_rollout_is_pooled_into_columns_that_keep_the_sum(client, traced, monkeypatch):
    monkeypatch.setattr(through_layers, "MOST_COLUMNS", 10)
    monkeypatch.setattr(through_layers, "JOBS", Jobs())
    found = worked_out(client, f"/api/v1/runs/{traced.run_ids[1]}/rollout?row=70")
    assert len(found["columns"]) == 11
    np.testing.assert_allclose(np.sum(found["values"], axis=1), 1, atol=1e-9)
    a, b = found["columns"][3:5]
    assert found["values"][-1][3] == pytest.approx(sum(found["shares"][a:b]))


def test_more_than_a_page_can_wait_for_is_refused(client, traced, monkeypatch):
    monkeypatch.setattr(through_layers, "MOST_CELLS", 8 * 77 * 51 - 1)
    run_id = traced.run_ids[0]
    answer = client.get(f"/api/v1/runs/{run_id}/rollout?row=50")
    assert answer.status_code == 400
    assert "at most 31,415 weights" in answer.json()["error"]
    assert f"lab.run_by_id({run_id}).rollout(row)" in answer.json()["error"]
    worked_out(client, f"/api/v1/runs/{run_id}/rollout?row=49&residual=0.1")


def test_distances_and_curves_are_answered_as_in_python(client, traced):
    a, b = traced.run_ids[:2]
    found = client.get(f"/api/v1/compare/distances?a={a}&b={b}&layer=1&max_rows=16").json()
    assert found == run_distances(traced.store, a, b, [1], 16).to_json()
    heads = client.get(f"/api/v1/runs/{a}/distances?layer=0&layer_b=1").json()
    assert heads == head_distances(traced.store, a, 0, 1).to_json()
    answer = client.get(f"/api/v1/runs/{a}/curve?name=row_entropy&layer=0&head=0")
    assert (answer.status_code, "holds no row_entropy of L0H0" in answer.json()["error"]) == (404, True)
    points = np.arange(5, dtype=np.float32)
    assert tensors.keep_derived(traced.store, a, 1, "row_entropy", 0, points[None])
    document = client.get(f"/api/v1/runs/{a}/curve?name=row_entropy&layer=0&head=0").json()
    assert document["points"] == points.tolist()
    assert "entropy of the rows" in document["words"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("runs/{run}/token?layer=0&row=77", 400, "row must be in 0..76"),
        ("runs/{run}/token?layer=0", 400, "row must be given"),
        ("runs/{run}/token?layer=0&row=1&shown=x", 400, "shown must be a range START:STOP"),
        ("runs/{run}/heads?layer=5", 400, "layer must be one of 0..1"),
        ("runs/{run}/rollout?row=77", 400, "row must be in 0..76"),
        ("runs/{run}/rollout?row=1&residual=2", 400, "residual must be less than or equal to 1"),
        ("runs/{run}/flow?row=50&tokens=51:60", 400, "that hold row 50; got 51:60"),
        ("runs/{run}/curve?name=x&layer=0&head=0", 400, "curve must be one of row_entropy, column_mass"),
        ("runs/{run}/distances?layer=9", 400, "layer must be one of 0..1"),
        ("compare/distances?a={run}&b={run}&layer=7", 400, "layers must be some of those that both runs"),
        ("compare/distances?a={run}&b=4711", 404, "run must be the id of a run"),
        ("runs/4711/heads?layer=0", 404, "run must be the id of a run"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(client, traced, path, status, words):
    answer = client.get("/api/v1/" + path.format(run=traced.run_ids[0]))
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text


def test_what_took_long_is_kept_in_the_store_for_the_next_process(client, traced, monkeypatch):
    run_id = traced.run_ids[0]
    paths = [
        f"/api/v1/runs/{run_id}/rollout?residual=0.3",
        f"/api/v1/runs/{run_id}/rollout?row=60&residual=0.3",
        f"/api/v1/runs/{run_id}/flow?row=60&tokens=50:61&residual=0.3",
    ]
    monkeypatch.setattr(through_layers, "JOBS", Jobs())
    few = [worked_out(client, path) for path in paths]
    names = [info.name for info in tensors.tensor_info(traced.store, run_id)]
    assert not any(name.startswith(("rollout_", "flow_")) for name in names)
    monkeypatch.setattr(through_layers, "KEPT_CELLS", 1)
    monkeypatch.setattr(through_layers, "JOBS", Jobs())
    first = [worked_out(client, path) for path in paths]
    monkeypatch.setattr(through_layers, "JOBS", None)  # nothing is worked out any more
    assert [worked_out(client, path) for path in paths] == first == few


def test_work_that_is_cancelled_ends_and_what_is_not_going_on_is_said(client, traced, monkeypatch):
    run_id = traced.run_ids[0]
    go, begun = threading.Event(), threading.Event()

    def slow(*given, progress, **options):
        begun.set()
        assert go.wait(30)
        progress(0.1)
        raise AssertionError("not cancelled")

    monkeypatch.setattr(through_layers, "JOBS", Jobs())
    monkeypatch.setattr(through_layers, "pooled_rollout", slow)
    assert client.get(f"/api/v1/runs/{run_id}/rollout?residual=0.4").status_code == 202
    assert begun.wait(30)
    for cancelled in (True, False):
        answer = client.post(f"/api/v1/runs/{run_id}/rollout/cancel?residual=0.4")
        assert answer.json() == {"cancelled": cancelled}
    go.set()
    flow = client.post(f"/api/v1/runs/{run_id}/flow/cancel?row=5&residual=0.4")
    assert flow.json() == {"cancelled": False}


@pytest.mark.parametrize("form", ["npz", "parquet", "png", "svg", "pdf", "csv", "safetensors"])
def test_the_rollout_of_all_positions_is_exported(client, traced, form):
    run_id = traced.run_ids[0]
    wanted = pooled_rollout(traced.store, run_id, 10, residual=0.25)
    path = f"/api/v1/runs/{run_id}/rollout/export/{form}?through=all&residual=0.25&height=10"
    while (answer := client.get(path)).status_code == 409:
        pass
    assert answer.status_code == 200, answer.text
    assert f"rollout-all.{form}" in answer.headers["content-disposition"]
    if form == "npz":
        kept = np.load(io.BytesIO(answer.content))
        np.testing.assert_array_equal(kept["rollout"], wanted.values)
        assert kept["rows"].tolist() == [list(span) for span in wanted.rows]
        assert kept["tokens"].tolist() == traced.tokens
    if form == "parquet":
        table = parquet.read_table(io.BytesIO(answer.content)).to_pydict()
        np.testing.assert_array_equal(np.reshape(table["share"], (10, 77)), wanted.values)
        last = (table["first_position"][-1], table["last_position"][-1], table["token_position"][-1])
        assert last == (wanted.rows[-1][0], 76, 76)
        assert table["token"][:77] == traced.tokens
    if form == "svg":
        assert "rollout of all positions" in answer.text
        assert "residual share 0.25" in answer.text
