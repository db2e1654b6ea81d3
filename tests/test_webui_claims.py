"""The Claims page and the preset commands without a browser."""

import json

import pytest
from typer.testing import CliRunner

from attnlab.presets import PRESETS
from attnlab_storage import queue
from attnlab_storage.listing import count_runs
from attnlab_webui.cli import app
from attnlab_webui.pages import claims as page


@pytest.fixture
def attnlab(sqlite_store, sqlite_url, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_shows_every_claim_with_a_verdict(sqlite_store, name):
    head, table, *charts = page.on_choice(sqlite_store, name)
    assert "Not run yet" in head
    assert table.count("<tr>") == 1 + (len(PRESETS[name].claims) or len(PRESETS[name].grids))
    assert any(chart["visible"] for chart in charts) == bool(PRESETS[name].claims)


def test_running_a_preset_queues_it_and_the_page_says_so(sqlite_store):
    told = page.on_run(sqlite_store, "cache-sizes", "cpu")
    assert "6 runs queued at cpu scale" in told
    assert "No dispatcher is running" in told
    head, *_ = page.on_choice(sqlite_store, "cache-sizes")
    assert 'href="/experiment?id=1"' in head
    assert 'href="/experiment?id=2"' in head


def test_a_run_that_failed_stands_in_its_verdict_with_a_link(sqlite_store):
    page.on_run(sqlite_store, "cache-sizes", "cpu")
    for run in range(1, 5):
        claim = queue.claim(sqlite_store, "tests", run_id=run)
        assert claim is not None
        queue.finish(sqlite_store, claim, "failed", reason="made to be <b>", error_kind="made")
    _, table, *_ = page.on_choice(sqlite_store, "cache-sizes")
    assert "ended failed: made to be &lt;b&gt;" in table
    assert 'href="/experiment?id=1&amp;run=1"' in table


def test_a_stack_shows_how_each_run_of_its_newest_round_ended_and_why(sqlite_store):
    for _ in range(2):
        page.on_run(sqlite_store, "stack-vision", "cpu")
    assert count_runs(sqlite_store) == 24
    claim = queue.claim(sqlite_store, "tests", run_id=14)
    assert claim is not None
    queue.finish(sqlite_store, claim, "out_of_memory", reason="asked for <b> 64 bytes")
    _, table, *_ = page.on_choice(sqlite_store, "stack-vision")
    assert table.count("<tr>") == 2 + 13  # the grid, then twelve runs; each table with its head
    assert "asked for &lt;b&gt; 64 bytes" in table
    assert 'href="/experiment?id=2&amp;run=14"' in table
    assert 'run=1"' not in table


def test_nothing_changes_while_nothing_happens(sqlite_store):
    *_, seen = page.on_draw(sqlite_store, "cache-sizes", (-1, ""))
    assert page.on_draw(sqlite_store, "cache-sizes", seen)[-1] == page.gr.skip()


def test_an_unknown_preset_is_refused_in_words(sqlite_store):
    assert "preset must be one of" in page.on_choice(sqlite_store, "<b>")[0]
    assert "preset must be one of" in page.on_run(sqlite_store, "<b>", "cpu")
    assert count_runs(sqlite_store) == 0


def test_the_list_is_one_document(attnlab):
    result = attnlab("presets", "--json")
    assert result.exit_code == 0, result.stderr
    documents = json.loads(result.stdout)
    assert [document["name"] for document in documents] == list(PRESETS)
    assert documents[0]["claims"][0]["verdict"]["verdict"] == "not run yet"


def test_the_list_and_a_preset_in_words(attnlab):
    assert "training-speed" in attnlab("presets").stdout
    shown = attnlab("preset", "show", "context-scaling").stdout
    assert "FlashAttention runs out of memory at 64K tokens" in shown
    assert "simulated on one" in shown


def test_running_from_the_command_line_prints_runs_and_verdicts(attnlab):
    result = attnlab("preset", "run", "batch-serving", "--scale", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [len(one["runs"]) for one in document["experiments"]] == [6]
    assert {claim["kind"] for claim in document["claims"]} == {"not_run"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("run", "x"), "preset must be one of"), (("run", "cache-sizes", "--scale", "tpu"), "--scale must be")],
)
def test_a_bad_name_or_scale_is_refused(attnlab, arguments, words):
    result = attnlab("preset", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
