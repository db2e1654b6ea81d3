"""Laws of `attnlab statistics` and `attnlab distances`: the numbers of Python and HTTP, most distant first."""

import json

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from typer.testing import CliRunner

from attnlab.heads import statistics_document
from attnlab.views.distances import head_distances, run_distances
from attnlab_webui import api
from attnlab_webui.cli import app


@pytest.fixture
def ask(traced, sqlite_url, monkeypatch):
    """Runs a command over the made-up experiment."""
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_statistics_are_one_document_in_python_over_http_and_on_the_command_line(traced, ask):
    run_id = traced.run_ids[0]
    wanted = statistics_document(traced.store, run_id)
    assert wanted["entropy"]["title"] == "entropy"
    assert len(wanted["entropy"]["values"]) == 2
    assert json.loads(ask("statistics", run_id, "--json").stdout)["statistics"] == wanted
    web = FastAPI()
    api.install(web, traced.store)
    assert TestClient(web).get(f"/api/v1/runs/{run_id}/statistics").json()["statistics"] == wanted
    lines = ask("statistics", run_id, "--layer", 1).stdout.splitlines()
    assert lines[0].split() == ["head", "entropy"]
    assert [line.split()[0] for line in lines[1:]] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert lines[1].split()[1] == f"{wanted['entropy']['values'][1][0]:.3g}"


def test_distances_of_two_runs_list_the_heads_that_changed_most_first(traced, ask):
    a, b = traced.run_ids[:2]
    grid = run_distances(traced.store, a, b)
    assert json.loads(ask("distances", a, b, "--json").stdout) == grid.to_json()
    lines = ask("distances", a, b, "--measure", "jensen_shannon", "--limit", 3).stdout.splitlines()
    wanted = grid.most_changed("jensen_shannon", 3)
    assert [line.split()[0] for line in lines[1:]] == [f"L{one.layer}H{one.head}" for one in wanted]
    assert [line.split()[3] for line in lines[1:]] == [f"{one.value:.3g}" for one in wanted]


def test_distances_of_one_runs_heads_name_every_pair_once(traced, ask):
    run_id = traced.run_ids[0]
    asked = ask("distances", run_id, "--layer", 0)
    pairs = [tuple(line.split()[:2]) for line in asked.stdout.splitlines()[1:]]
    assert len(pairs) == len(set(pairs)) == 6
    assert json.loads(ask("distances", run_id, "--layer", 0, "--layer", 1, "--json").stdout) == (
        head_distances(traced.store, run_id, 0, 1).to_json()
    )
    between = ask("distances", run_id, "--layer", 1, "--layer", 0).stdout.splitlines()[1:]
    assert len(between) == 16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("statistics", 4711), "run 4711 does not exist"),
        (("statistics", "experiment:1"), "RUN must be the number of one run, got 'experiment:1'"),
        (("statistics", 1, "--name", "sinks"), "--name must be one of entropy"),
        (("distances", 1), "--layer must be given once or twice"),
        (("distances", 1, 2, "--measure", "euclid"), "measure must be one of total_variation"),
        (("distances", 1, "--layer", 9), "layer must be one of 0..1"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_rule(ask, words, says):
    answer = ask(*words)
    assert answer.exit_code == 2
    assert says in " ".join(answer.stderr.split())
