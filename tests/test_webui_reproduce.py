"""A run again: one point of the grid, and a verdict from the old interval."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from attnlab import reproduce
from attnlab.describe import run_document
from attnlab.environment import kernel_sources
from attnlab.intervals import median_interval
from attnlab.lab import open_lab
from attnlab.reproduce import judge, reproduction_spec
from attnlab.spec import parse_spec
from attnlab.views.errors import ViewError
from attnlab_storage import queue, results
from attnlab_webui.cli import app

SPEC = """
name: two
module: {dim: 32, num_heads: 2}
input: {synthetic: random}
vary:
  mechanism: [multi_head, {sliding_window: {window_size: 3}}]
  sequence_length: [24, 31]
record: [timing]
repeats: 5
seed: 11
"""


@pytest.fixture
def outcomes(sqlite_store, make_traced):
    return make_traced(sqlite_store, tokens=30, layers=1, outcomes=["failed"])


@pytest.fixture
def timed(sqlite_store, sqlite_url, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    with open_lab(sqlite_url) as lab:
        experiment = lab.run(SPEC)
        return [run.id for run in experiment.runs]


def test_a_run_is_made_again_from_its_own_point_and_judged_by_its_old_interval(sqlite_store, timed):
    spec = reproduction_spec(sqlite_store, timed[3])
    (point,) = spec.points()
    old = results.get_run(sqlite_store, timed[3])
    assert old is not None
    assert (point.mechanism, point.parameters) == ("sliding_window", old.parameters)
    assert (point.sequence_length, spec.seed, spec.repeats) == (31, 11, 5)
    result = CliRunner().invoke(app, ["reproduce", str(timed[3]), "--here", "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == (0 if document["reproduced"] else 1)
    assert document["changed"] == {}
    for time in document["times"]:
        samples = run_document(sqlite_store, timed[3])[time["name"]]["samples"]
        assert time["interval"] == pytest.approx(median_interval(samples))
        assert time["ratio"] == pytest.approx(time["new"] / time["old"])


def test_a_new_median_outside_the_old_interval_is_not_reproduced(sqlite_store, timed):
    same = judge(sqlite_store, timed[0], timed[0])
    assert same.holds
    slower = replace(same.times[0], new=same.times[0].interval[1] * 1.5)
    assert not replace(same, times=(slower, *same.times[1:])).holds
    assert not replace(same, outcome="failed").holds
    assert not replace(same, times=()).holds


def test_what_changed_around_a_run_is_named_and_readings_are_not():
    before = {"commit": "a", "versions": {"torch": "2.0"}, "ceilings": {"copy": 1.0}}
    after = {"commit": "b", "versions": {"torch": "2.0"}, "ceilings": {"copy": 2.0}}
    assert reproduce._changed(before, after) == {"commit": ("a", "b")}


def test_a_run_without_times_cannot_be_reproduced(outcomes):
    with pytest.raises(ViewError, match=r"must have succeeded .* is failed"):
        reproduction_spec(outcomes.store, outcomes.run_ids[2])


def test_a_run_without_an_interval_cannot_be_reproduced(sqlite_store, sqlite_url):
    with open_lab(sqlite_url) as lab:
        (run, *_) = lab.run(SPEC.replace("repeats: 5", "repeats: 2")).runs
    with pytest.raises(ViewError, match="at least 3 repeats"):
        reproduction_spec(sqlite_store, run.id)


def test_a_served_run_is_held_against_its_rates_and_waits(sqlite_store, sqlite_url, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    workload = {"requests": 4, "prompt_tokens": 5, "output_tokens": 3}
    spec = {
        "name": "served",
        "module": {"dim": 16, "num_heads": 4},
        "vary": {
            "mechanism": ["multi_head", {"grouped_query": {"num_kv_heads": 1}}],
            "cache": ["contiguous", "paged"],
        },
        "phase": "serving",
        "serving": {"workload": workload, "cache_bytes": 4096, "max_length": 12, "block_size": 4},
        "repeats": 3,
        "seed": 5,
    }
    with open_lab(sqlite_url) as lab:
        run = lab.run(spec).runs[2]
    again = reproduction_spec(sqlite_store, run.id)
    (point,) = again.points()
    old = results.get_run(sqlite_store, run.id)
    assert old is not None
    assert (point.mechanism, point.parameters) == ("grouped_query", old.parameters)
    assert (again.serving, again.seed) == (parse_spec(spec).serving, 5)
    same = judge(sqlite_store, run.id, run.id)
    assert same.holds
    assert {one.name: one.unit for one in same.times} == {
        "output_tokens_per_second": "tokens/s", "time_to_first_token": "ms", "inter_token_latency": "ms",
    }  # fmt: skip
    result = CliRunner().invoke(app, ["reproduce", str(run.id), "--here"])
    assert result.exit_code in (0, 1)
    assert "tokens written a second" in result.stdout


def test_a_search_is_held_against_its_own_resolution(sqlite_store):
    spec = parse_spec(
        {
            "name": "longest",
            "module": {"dim": 32, "num_heads": 2},
            "vary": {"mechanism": ["multi_head", "linear"]},
            "frontier": {"up_to": 1024, "memory_bytes": 50_000_000, "resolution": 64},
            "record": ["memory"],
        }
    )
    points = [point.to_dict() for point in spec.points()]
    queue.submit(sqlite_store, name="longest", spec=spec.to_dict(), spec_hash=spec.hash(), points=points)
    claim = queue.claim(sqlite_store, "tests")
    assert claim is not None
    detail = {"fits": 640, "fails": None, "resolution": 64, "memory_bytes": 1, "trials": []}
    with results.recording(sqlite_store, claim) as session:
        row = results.MeasurementRow("frontier", 640.0, "tokens", detail=detail)
        results.record_measurements(session, claim, [row])
    queue.finish(sqlite_store, claim, "succeeded", summary={})
    (one,) = judge(sqlite_store, claim.run_id, claim.run_id).times
    assert (one.name, one.old, one.interval, one.unit) == ("longest_fit", 640, (576, 704), "tokens")
    again = reproduction_spec(sqlite_store, claim.run_id)
    assert (again.frontier, len(again.points())) == (spec.frontier, 1)


def test_the_command_refuses_what_is_no_run(sqlite_store, sqlite_url, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    for target, words in (("experiment:1", "RUN must be one run"), ("7", "run 7 does not exist")):
        result = CliRunner().invoke(app, ["reproduce", target])
        assert result.exit_code == 2
        assert words in result.stderr


def test_the_hash_of_the_kernels_follows_names_and_contents(tmp_path):
    seen = set()
    for number, (name, content) in enumerate([("a.py", "1"), ("a.py", "2"), ("b.py", "1"), ("a.txt", "1")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(content)
        seen.add(kernel_sources(folder))
    assert len(seen) == 4
