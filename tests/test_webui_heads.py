"""One question about heads, asked in Python, over HTTP and on the command line, has one answer."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from typer.testing import CliRunner

from attnlab.heads import head_document, parse_conditions
from attnlab.lab import Lab
from attnlab.views.errors import ViewError
from attnlab_storage import results
from attnlab_storage.heads import HeadCondition
from attnlab_webui import api
from attnlab_webui.cli import app

WHERE = "entropy >= 0.4"


@pytest.fixture
def client(traced) -> TestClient:
    web = FastAPI()
    api.install(web, traced.store)
    return TestClient(web, raise_server_exceptions=False)


def expected(traced, run_ids: list[int]) -> list[dict[str, Any]]:
    rows = [
        {"run": run_id, "name": f"L{row.layer}H{row.head}", "entropy": row.value}
        for run_id in run_ids
        for row in results.measurements(traced.store, run_id, "entropy")
        if row.value >= 0.4
    ]
    return sorted(rows, key=lambda row: -row["entropy"])


def shown(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"run": head["run"], "name": head["name"], **head["values"]} for head in heads]


def test_python_http_and_the_command_line_find_the_same_heads(traced, client, sqlite_url, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    wanted = expected(traced, traced.run_ids)
    assert wanted
    assert shown([head_document(row) for row in Lab(traced.store).heads(WHERE).rows]) == wanted
    assert shown(client.get("/api/v1/heads", params={"where": WHERE}).json()["heads"]) == wanted
    asked = CliRunner().invoke(app, ["heads", WHERE, "--json"])
    assert asked.exit_code == 0, asked.output
    assert shown(json.loads(asked.stdout)["heads"]) == wanted
    table = CliRunner().invoke(app, ["heads", WHERE]).stdout.splitlines()
    assert [line.split()[1] for line in table[1:]] == [row["name"] for row in wanted]


def test_filters_are_those_of_runs_and_pages_join(traced, client):
    found, after = [], None
    while True:
        params = {"where": WHERE, "mechanism": "sliding_window", "limit": 2, "after": after}
        page = client.get("/api/v1/heads", params={k: v for k, v in params.items() if v is not None}).json()
        found += page["heads"]
        after = page["next"]
        if after is None:
            break
    assert shown(found) == expected(traced, traced.run_ids[1:])
    assert found[0]["mechanism"] == "sliding_window(window_size=16)"


def test_several_bounds_are_read():
    assert parse_conditions(" sink_mass>0.8 AND entropy <= 1e-1 ") == [
        HeadCondition("sink_mass", ">", 0.8),
        HeadCondition("entropy", "<=", 0.1),
    ]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("", "condition must be a statistic"),
        ("sink_mass", "condition must be a statistic"),
        ("sink_mass > 0.8 and", "condition must be a statistic"),
        ("colour > 1", "statistic must be one of entropy, .*; got 'colour'"),
        ("entropy > much", "bound of entropy must be a number; got 'much'"),
        ("entropy > nan", "value of entropy must be a number; got nan"),
    ],
)
def test_a_condition_that_cannot_be_read_is_refused_with_the_rule(where, says, client):
    answer = client.get("/api/v1/heads", params={"where": where})
    assert answer.status_code == 400
    with pytest.raises(ValueError, match=says):
        raise ViewError(answer.json()["error"])


def test_an_unknown_parameter_is_named(client):
    answer = client.get("/api/v1/heads", params={"where": WHERE, "colour": "red"})
    assert (answer.status_code, "colour must be a known parameter" in answer.json()["error"]) == (400, True)
