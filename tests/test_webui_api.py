"""Laws of the HTTP API: what it stores, what it lists, and that every mistake is one clear sentence."""

import json

import pytest
import yaml
from fastapi import FastAPI
from starlette.testclient import TestClient

from attnlab_storage import queue, results
from attnlab_webui import api

SPEC = {
    "name": "from the API",
    "module": {"dim": 64, "num_heads": 4},
    "input": {"synthetic": "random"},
    "vary": {"mechanism": ["multi_head"], "sequence_length": [33, 65]},
}


@pytest.fixture
def client_of():
    def make(store) -> TestClient:
        app = FastAPI()
        api.install(app, store)
        return TestClient(app, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(client_of, sqlite_store):
    return client_of(sqlite_store)


@pytest.fixture
def traced_client(client_of, traced):
    return client_of(traced.store)


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump], ids=["json", "yaml"])
def test_a_spec_is_queued_whole_as_json_or_yaml(client, sqlite_store, write):
    answer = client.post("/api/v1/experiments", content=write(SPEC))
    assert answer.status_code == 201, answer.text
    document = answer.json()
    rows = results.runs_of(sqlite_store, experiment_id=document["experiment"])
    assert [row.id for row in rows] == document["runs"]
    assert [(row.state, row.sequence_length) for row in rows] == [("queued", 33), ("queued", 65)]


def test_every_problem_of_a_spec_is_named_and_nothing_is_stored(client, sqlite_store):
    wrong = SPEC | {"vary": {"mechanism": ["multihead"], "dtype": ["float31"]}}
    answer = client.post("/api/v1/experiments", json=wrong)
    assert answer.status_code == 400
    document = answer.json()
    assert "multihead" in document["error"]
    assert "float31" in document["error"]
    assert {problem["suggestion"] for problem in document["problems"]} >= {"multi_head", "float32"}
    assert results.list_experiments(sqlite_store).rows == []


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "got nothing"),
        (b"\xff\xfe\x00", 400, "UTF-8"),
        (b"a: [1, 2", 400, "must be YAML"),
        (b"just a sentence", 400, "spec"),
        (b"x" * 2_000_001, 413, "at most 2000000 bytes"),
    ],
    ids=["nothing", "bytes", "broken", "text", "large"],
)
def test_a_body_that_is_no_spec_is_refused_in_one_sentence(client, sqlite_store, body, status, words):
    answer = client.post("/api/v1/experiments", content=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]
    assert results.list_experiments(sqlite_store).rows == []


def test_the_cost_is_estimated_before_anything_is_queued(client, sqlite_store):
    document = client.post("/api/v1/estimate", json=SPEC).json()
    assert document["runs"] == 2
    assert document["stored_bytes"] >= 0
    assert results.list_experiments(sqlite_store).rows == []


def test_a_page_of_runs_is_filtered_sorted_and_continued(traced_client, traced):
    first = traced_client.get("/api/v1/runs", params={"sort": "id", "limit": 1}).json()
    assert [run["id"] for run in first["runs"]] == traced.run_ids[:1]
    assert first["total"] == 2
    second = traced_client.get(
        "/api/v1/runs", params={"sort": "id", "limit": 1, "after": first["next"]}
    ).json()
    assert [run["id"] for run in second["runs"]] == traced.run_ids[1:]
    assert second["next"] is None
    windows = traced_client.get("/api/v1/runs?mechanism=sliding_window&state=succeeded").json()
    assert [run["id"] for run in windows["runs"]] == traced.run_ids[1:]


def test_documents_of_runs_and_experiments_are_plain_json(traced_client, traced):
    run = traced_client.get(f"/api/v1/runs/{traced.run_ids[0]}").json()
    assert run["outcome"] == "succeeded"
    assert run["latency_ms"]["samples"]
    experiment = traced_client.get(f"/api/v1/experiments/{traced.experiment_id}").json()
    assert [one["id"] for one in experiment["runs"]] == traced.run_ids
    listed = traced_client.get("/api/v1/experiments").json()
    assert listed["experiments"][0]["states"] == {"succeeded": 2}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/runs/999", 404, "run must be the id of a run, got 999"),
        ("/runs/0", 404, "got 0"),
        ("/runs/99999999999999999999", 404, "got 99999999999999999999"),
        ("/runs/seven", 400, "run_id must be a valid integer"),
        ("/experiments/999", 404, "experiment must be the id of an experiment, got 999"),
        ("/runs?sort=colour", 400, "sort must be a column, got 'colour'; choices: id"),
        ("/runs?colour=red", 400, "colour must be a known parameter; choices: state"),
        ("/runs?limit=0", 400, "limit"),
        ("/runs?limit=many", 400, "limit must be a valid integer"),
        ("/runs?after=nonsense", 400, "after"),
        ("/runs?search=" + "x" * 201, 400, "search"),
        ("/nothing/here", 404, "there is no /api/v1/nothing/here"),
    ],
)
def test_a_wrong_question_gets_one_sentence(traced_client, path, status, words):
    answer = traced_client.get("/api/v1" + path)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


def test_cancel_and_retry_change_the_run_or_say_why_not(client, sqlite_store):
    run = client.post("/api/v1/experiments", json=SPEC).json()["runs"][0]
    assert client.post(f"/api/v1/runs/{run}/cancel").json() == {"run": run, "state": "cancelled"}
    again = client.post(f"/api/v1/runs/{run}/cancel")
    assert again.status_code == 409
    assert f"run {run} cannot be cancelled: it is cancelled" in again.json()["error"]
    assert client.post(f"/api/v1/runs/{run}/retry").json() == {"run": run, "state": "queued"}
    assert client.post(f"/api/v1/runs/{run}/retry").status_code == 409
    assert client.get(f"/api/v1/runs/{run}/cancel").status_code in (404, 405)


def test_a_running_run_is_asked_to_end(client, sqlite_store):
    client.post("/api/v1/experiments", json=SPEC)
    claim = queue.claim(sqlite_store, "tests")
    assert claim is not None
    assert client.post(f"/api/v1/runs/{claim.run_id}/cancel").json()["state"] == "running"
    assert queue.beat(sqlite_store, "tests")[0].cancel_requested


def test_the_queue_is_counted(client):
    client.post("/api/v1/experiments", json=SPEC)
    document = client.get("/api/v1/queue").json()
    assert document["queued"] == 2
    assert document["running"] == 0
    assert document["paused"] is False


def test_health_needs_an_answering_store(client, sqlite_store):
    assert client.get("/api/v1/health").json() == {"status": "ok"}
    sqlite_store.close()
    sqlite_store.path.write_bytes(b"this is no database" * 1000)
    answer = client.get("/api/v1/health")
    assert answer.status_code == 503
    assert "cannot be used" in answer.json()["error"]


def test_the_catalog_and_the_system_are_documents(client):
    mechanisms = client.get("/api/v1/mechanisms").json()["mechanisms"]
    assert len(mechanisms) == 17
    assert {"id", "title", "parameters", "swap"} <= mechanisms[0].keys()
    assert client.get("/api/v1/system").json()["database"]["kind"] == "SQLite"
