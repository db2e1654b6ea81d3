"""Laws of the HTTP API of the views beside the map: the same numbers as in Python, errors that say the rule."""

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from attnlab.views.head_tiles import head_tiles
from attnlab.views.token import token_document
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


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("runs/{run}/token?layer=0&row=77", 400, "row must be in 0..76"),
        ("runs/{run}/token?layer=0", 400, "row must be given"),
        ("runs/{run}/token?layer=0&row=1&shown=x", 400, "shown must be a range START:STOP"),
        ("runs/{run}/heads?layer=5", 400, "layer must be one of 0..1"),
        ("runs/4711/heads?layer=0", 404, "run must be the id of a run"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(client, traced, path, status, words):
    answer = client.get("/api/v1/" + path.format(run=traced.run_ids[0]))
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text
