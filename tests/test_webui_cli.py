"""The command line as a contract: one JSON document on stdout, words on stderr, exit codes that mean something."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from sqlalchemy import text
from typer.testing import CliRunner

from attnlab_storage import keeping, queue
from attnlab_storage.control import dispatcher_beat, pause
from attnlab_storage.database import migrate, open_store
from attnlab_storage.listing import count_runs, list_runs
from attnlab_webui.cli import app

SPEC = """
name: small
model: minilm-l6
input: {text: "The river bank and the savings bank."}
vary:
  mechanism: [multi_head, {sliding_window: {window_size: 3}}]
  sequence_length: [5, 7]
"""


@pytest.fixture
def attnlab():
    def call(*arguments, stdin=None):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return call


@pytest.fixture
def recorded(traced, sqlite_url, monkeypatch):
    """The made-up experiment of the `traced` fixture as the store that the commands find."""
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    return traced


@pytest.fixture
def empty_store(sqlite_store, sqlite_url, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    return sqlite_store


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def refused(result) -> str:
    """The message of a command that was given bad input: exit code 2, one message, nothing on stdout, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("list",),
        ("list", "--experiments"),
        ("show", "1"),
        ("show", "experiment:1"),
        ("compare", "1", "2"),
        ("mechanisms",),
        ("mechanisms", "flash"),
        ("models",),
        ("models", "list"),
        ("doctor",),
        ("cancel", "1"),
        ("retry", "experiment:1"),
    ],
    ids=" ".join,
)
def test_json_is_one_document_on_stdout(attnlab, recorded, command):
    result = attnlab(*command, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) is not None


def test_list_pages_through_all_runs(attnlab, recorded):
    first = json.loads(attnlab("list", "--limit", "1", "--json").stdout)
    second = json.loads(attnlab("list", "--limit", "1", "--after", first["next"], "--json").stdout)
    assert [run["id"] for run in first["runs"] + second["runs"]] == [2, 1]
    assert second["next"] is None


def test_list_filters_by_mechanism(attnlab, recorded):
    runs = json.loads(attnlab("list", "--mechanism", "sliding_window", "--json").stdout)["runs"]
    assert [run["mechanism"] for run in runs] == ["sliding_window"]


def test_list_shows_user_text_as_it_is(attnlab, recorded):
    assert "made up <b>&" in attnlab("list").stdout


def test_show_has_what_scripts_read(attnlab, recorded):
    document = json.loads(attnlab("show", "1", "--json").stdout)
    assert document["outcome"] == "succeeded"
    assert document["reason"] is None
    assert document["environment"]["device"] == "cpu"
    assert document["kernels"]
    assert document["peak_memory_bytes"] == 3_000_000
    assert {"median", "p10", "p90", "samples"} <= set(document["latency_ms"])
    assert document["map_check"] == {"row_sum_defect": 2e-7, "output_defect": 4e-7, "lse_defect": None}
    assert document["accuracy"]["kl"] == 0.01


def test_compare_says_what_differs(attnlab, recorded):
    result = attnlab("compare", "1", "2")
    assert "sliding_window" in result.stdout
    assert "Approximate swap" in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("show", "99"), "run 99 does not exist"),
        (("show", "experiment:99"), "experiment 99 does not exist"),
        (("show", "--", "-1"), "must be a run's number"),
        (("show", "nope"), "got 'nope'"),
        (("cancel", "1", "98"), "run 98 does not exist"),
        (("compare", "1"), "at least two runs"),
        (("list", "--state", "sleeping"), "choices: queued, running"),
        (("list", "--sort", "beauty"), "choices: id"),
        (("list", "--after", "x"), "after must be"),
        (("mechanisms", "telepathy"), "choices: multi_head"),
        (("models", "fetch", "gpt-9"), "choices: smollm2-135m"),
        (("models", "fetch"), "NAME or --all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_names_rule_and_value(attnlab, recorded, command, words):
    assert words in refused(attnlab(*command))


def test_cancel_and_retry_a_whole_experiment(attnlab, empty_store, spec_file):
    attnlab("submit", spec_file)
    assert json.loads(attnlab("cancel", "experiment:1", "--json").stdout)["cancelled"] == 4
    assert json.loads(attnlab("retry", "experiment:1", "2", "--json").stdout)["queued"] == [1, 2, 3, 4]


def test_submit_prints_ids_and_queues_the_grid(attnlab, empty_store, spec_file):
    result = attnlab("submit", spec_file, "--json")
    document = json.loads(result.stdout)
    assert document["experiment"] == 1
    assert [run["sequence_length"] for run in document["runs"]] == [5, 7, 5, 7]
    assert {run["outcome"] for run in document["runs"]} == {None}
    assert count_runs(empty_store, filters={"state": "queued"}) == 4


def test_submit_reads_stdin(attnlab, empty_store):
    assert attnlab("submit", "-", stdin=SPEC).exit_code == 0
    assert count_runs(empty_store) == 4


def test_submit_reads_a_text_file_beside_the_spec(attnlab, empty_store, tmp_path):
    (tmp_path / "text.txt").write_text("Banks of the river.")
    (tmp_path / "spec.yaml").write_text(
        "name: n\nmodel: minilm-l6\ninput: {file: text.txt}\nvary: {mechanism: [multi_head]}"
    )
    assert attnlab("submit", tmp_path / "spec.yaml").exit_code == 0
    page = list_runs(empty_store)
    assert len(page.rows) == 1


def test_submit_says_that_no_dispatcher_runs(attnlab, empty_store, spec_file):
    assert "no dispatcher is running" in attnlab("submit", spec_file).stderr
    dispatcher_beat(empty_store, "here:1:a", {})
    assert "no dispatcher" not in attnlab("submit", spec_file).stderr
    pause(empty_store)
    assert "the queue is paused" in attnlab("submit", spec_file).stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("  \n ", "is empty"),
        ("name: [broken\nmodel: x", "at line 2"),
        ("just words", "must be a mapping"),
        ("name: n\nmodel: minilm-l6\nvary: {mechanism: [telepathy]}", "must be a mechanism of the catalog"),
        ("name: n\nmodel: minilm-l6\nvary: {mechanism: [{sliding_window: {window_size: 0}}]}", "window_size"),
        (SPEC.replace("minilm-l6", "no such model"), "must be a bundled name"),
        (SPEC + "layers: [0, 6]", "0 to 5"),
        (SPEC + "  dtype: [float8]".replace("  dtype", "colour"), "is not a field of a spec"),
        (SPEC.replace("[5, 7]", "[5, 9999]"), "must be at most 512 tokens"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("#" * 2_000_001, "must be at most"),
    ],
    ids=[
        "zero bytes",
        "blank",
        "broken yaml",
        "no mapping",
        "mechanism",
        "window",
        "model",
        "layer",
        "unknown field",
        "context",
        "binary",
        "too large",
    ],
)
def test_submit_refuses_a_bad_spec_and_stores_nothing(attnlab, empty_store, tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(attnlab("submit", path))
    assert count_runs(empty_store) == 0


def test_submit_refuses_what_is_no_file(attnlab, empty_store, tmp_path):
    assert "does not exist" in refused(attnlab("submit", tmp_path / "absent.yaml"))
    assert "is a folder" in refused(attnlab("submit", tmp_path))


def end_runs(url: str, outcomes: dict[str, str]) -> None:
    """What a dispatcher would do: claim every run and end it, by mechanism."""
    store = open_store(url)
    done = 0
    while done < 4:
        claim = queue.claim(store, "tests")
        if claim is not None:
            queue.progress(store, claim, "measuring", 1, 2)
            queue.finish(store, claim, outcomes[claim.point["mechanism"]], reason="made up")
            done += 1
    store.close()


@pytest.mark.parametrize(
    ("other", "code"),
    [
        ("unsupported", 0),
        ("succeeded", 0),
        ("failed", 1),
        ("out_of_memory", 1),
        ("timed_out", 1),
        ("cancelled", 1),
    ],
)
def test_submit_wait_ends_with_the_runs(attnlab, empty_store, sqlite_url, spec_file, other, code):
    worker = threading.Thread(
        target=end_runs, args=(sqlite_url, {"multi_head": "succeeded", "sliding_window": other})
    )
    worker.start()
    result = attnlab("submit", spec_file, "--wait", "--json")
    worker.join()
    assert result.exit_code == code
    runs = json.loads(result.stdout)["runs"]
    assert [run["outcome"] for run in runs] == ["succeeded", "succeeded", other, other]
    assert {"id", "outcome", "mechanism", "implementation", "sequence_length", "dtype"} <= set(runs[0])


@pytest.mark.parametrize("format", ["csv", "parquet", "json"])
def test_export_writes_the_measurements_of_a_run_or_an_experiment(attnlab, recorded, tmp_path, format):
    one, both = tmp_path / f"run.{format}", tmp_path / f"experiment.{format}"
    assert attnlab("export", "1", "--format", format, "--out", one).exit_code == 0
    assert attnlab("export", "experiment:1", "--format", format, "--out", both).exit_code == 0
    assert both.stat().st_size > one.stat().st_size > 100


def test_exported_map_is_the_exact_map(attnlab, recorded, tmp_path):
    path = tmp_path / "map.npz"
    result = attnlab(
        "export", "2", "--map", "1:3", "--rows", "20:77", "--cols", ":50", "--out", path, "--json"
    )
    assert json.loads(result.stdout) == {"out": str(path), "bytes": path.stat().st_size, "run": 2}
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    expected = recorded.reference(2, 1, 3)[20:77, :50]
    np.testing.assert_allclose(arrays["map"], expected, atol=1e-6)
    assert list(arrays["query_tokens"]) == recorded.tokens[20:77]
    assert list(arrays["key_tokens"]) == recorded.tokens[:50]


@pytest.mark.parametrize("place", ["0:0", "0"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".png", ".svg", ".pdf"])
def test_export_map_in_every_format(attnlab, recorded, tmp_path, suffix, place):
    path = tmp_path / f"map{suffix}"
    assert attnlab("export", "1", "--map", place, "--out", path).exit_code == 0
    assert path.stat().st_size > 1000


def test_export_map_as_a_table_holds_every_weight(attnlab, recorded, tmp_path):
    path = tmp_path / "map.parquet"
    region = ("--rows", "70:77", "--cols", "3:9")
    assert attnlab("export", "2", "--map", "1:3", *region, "--out", path).exit_code == 0
    rows = parquet.read_table(path).to_pylist()
    expected = recorded.reference(2, 1, 3)
    assert [(row["query"], row["key"]) for row in rows] == [
        (q, k) for q in range(70, 77) for k in range(3, 9)
    ]
    assert all(abs(row["weight"] - expected[row["query"], row["key"]]) < 1e-6 for row in rows)
    assert all(row["query_token"] == recorded.tokens[row["query"]] for row in rows)


def test_export_of_statistics_holds_every_head(attnlab, recorded, tmp_path):
    path = tmp_path / "statistics.npz"
    assert attnlab("export", "1", "--format", "npz", "--out", path).exit_code == 0
    with np.load(path, allow_pickle=False) as file:
        assert file["entropy"].shape == (2, 4)
    assert "is of one run's heads" in refused(
        attnlab("export", "experiment:1", "--format", "npz", "--out", tmp_path / "no.npz")
    )


def test_export_html_and_zip_are_of_an_experiment(attnlab, recorded, tmp_path):
    assert attnlab("export", "1", "--format", "html", "--out", tmp_path / "report.html").exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)</script>" not in page
    assert "use experiment:1" in refused(
        attnlab("export", "run:1", "--format", "zip", "--out", tmp_path / "a.zip")
    )


def test_zip_reads_back_into_another_store(attnlab, recorded, tmp_path, monkeypatch):
    assert attnlab("export", "1", "--format", "zip", "--out", tmp_path / "a.zip").exit_code == 0
    before = json.loads(attnlab("show", "experiment:1", "--json").stdout)
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", f"sqlite:///{tmp_path / 'other.db'}")
    result = attnlab("import", tmp_path / "a.zip", "--json")
    assert json.loads(result.stdout) == {"experiment": 1}
    after = json.loads(attnlab("show", "experiment:1", "--json").stdout)
    assert after["runs"][0]["latency_ms"] == before["runs"][0]["latency_ms"]
    assert after["spec"] == before["spec"]


def test_import_of_no_bundle_stores_nothing(attnlab, empty_store, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK but not really")
    assert "must be a zip written by attnlab export" in refused(attnlab("import", tmp_path / "a.zip"))
    (tmp_path / "b.zip").write_bytes(b"")
    assert "must be a zip written by attnlab export" in refused(attnlab("import", tmp_path / "b.zip"))
    assert "is no file" in refused(attnlab("import", tmp_path / "absent.zip"))
    assert count_runs(empty_store) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--map", "9:0", "--out", "m.npz"), "layer must be one of 0..1"),
        (("--map", "0:9", "--out", "m.npz"), "head"),
        (("--map", "zero", "--out", "m.npz"), "--map must be LAYER:HEAD"),
        (("--map", "0:0", "--rows", "5:2", "--out", "m.npz"), "0 <= start < stop <= 77"),
        (("--map", "0:0", "--cols", "70:78", "--out", "m.npz"), "0 <= start < stop <= 77"),
        (("--map", "0:0", "--rows", "all", "--out", "m.npz"), "--rows must be A:B"),
        (("--map", "0:0", "--out", "m.docx"), "--out must end in one of .npz"),
        (("--map", "0", "--out", "m.parquet"), "--out must end in one of .npz"),
        (("--map", "0", "--rows", "1:2", "--out", "m.npz"), "--map 0 is a whole layer"),
        (("--format", "docx", "--out", "m.docx"), "--format must be one of csv"),
        (("--format", "csv", "--map", "0:0", "--out", "m.csv"), "exactly one of --format, --map and --view"),
        (("--out", "m.csv"), "exactly one of --format, --map and --view"),
        (("--format", "csv", "--out", "no/such/folder.csv"), "a folder that exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_export_names_rule_and_writes_nothing(attnlab, recorded, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert words in refused(attnlab("export", "1", *options))
    assert sorted(tmp_path.iterdir()) == before


def test_reading_command_leaves_an_absent_database_absent(attnlab, home):
    assert "run `attnlab migrate`" in refused(attnlab("list"))
    assert not (home / "attnlab.db").exists()


def test_submit_makes_the_embedded_database(attnlab, home, spec_file):
    assert attnlab("submit", spec_file).exit_code == 0
    assert (home / "attnlab.db").exists()


@pytest.mark.parametrize("command", [("list",), ("submit", "-")], ids=" ".join)
def test_newer_database_says_what_to_do(attnlab, empty_store, command):
    with empty_store.write(announce=False) as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert "newer than this program" in refused(attnlab(*command, stdin=SPEC))


def test_purge_removes_for_good_what_was_deleted_and_gives_its_space_back(attnlab, recorded):
    keeping.delete_runs(recorded.store, recorded.run_ids[:1])
    recorded.store.settle()
    size = recorded.store.path.stat().st_size
    assert "removed 0 runs" in attnlab("purge").stderr  # deleted today: it can still be brought back
    assert keeping.restore_runs(recorded.store, recorded.run_ids[:1]) == recorded.run_ids[:1]
    keeping.delete_runs(recorded.store, recorded.run_ids[:1])
    assert json.loads(attnlab("purge", "--older-than", 0, "--json").stdout)["removed"] == 1
    assert keeping.restore_runs(recorded.store, recorded.run_ids[:1]) == []
    assert recorded.store.path.stat().st_size < size
    assert [run.id for run in list_runs(recorded.store).rows] == recorded.run_ids[1:]
    assert "--older-than" in attnlab("purge", "--older-than", -1).stderr


def test_migrate_names_the_database_without_its_password(attnlab, home):
    result = attnlab("migrate", "--json")
    assert json.loads(result.stdout)["database"] == f"sqlite:///{home / 'attnlab.db'}"
    assert attnlab("list").exit_code == 0


@pytest.mark.postgres
def test_submit_leaves_a_shared_database_to_migrate(attnlab, postgres_server, monkeypatch, spec_file):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", postgres_server)
    assert "run `attnlab migrate`" in refused(attnlab("submit", spec_file))


def test_database_url_that_is_none(attnlab, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", "mysql://somewhere/db")
    assert "SQLite file or a PostgreSQL database" in refused(attnlab("list"))


def test_web_refuses_an_open_address_without_a_token(attnlab, empty_store):
    assert "ATTNLAB_TOKEN" in refused(attnlab("web", "--host", "0.0.0.0"))


def test_doctor_dispatcher_is_a_health_check(attnlab, empty_store):
    assert attnlab("doctor", "--dispatcher").exit_code == 1
    dispatcher_beat(empty_store, "here:1:a", {})
    assert attnlab("doctor", "--dispatcher").exit_code == 0
    with empty_store.write(announce=False) as session:
        session.execute(text("UPDATE dispatcher SET heartbeat_at = heartbeat_at - 3600"))
    assert attnlab("doctor", "--dispatcher").exit_code == 1


def test_doctor_finds_rows_without_their_parent(attnlab, empty_store):
    assert attnlab("doctor").exit_code == 0
    with contextlib.closing(sqlite3.connect(empty_store.path)) as raw:
        raw.execute("INSERT INTO log_chunk (run_id, attempt, at, text) VALUES (77, 1, 0, 'lost')")
        raw.commit()
    result = attnlab("doctor", "--json")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["integrity"]["status"] == "problem"


def test_doctor_says_what_to_do_without_a_database(attnlab, home):
    result = attnlab("doctor")
    assert result.exit_code == 1
    assert "run `attnlab migrate`" in result.stderr


def test_mechanisms_lists_all_seventeen(attnlab):
    documents = json.loads(attnlab("mechanisms", "--json").stdout)
    assert len(documents) == 17
    kernel = {item["name"]: item for item in documents[4]["parameters"]}["variant"]
    assert (documents[4]["id"], kernel["choices"]) == ("linear", ["kernel", "linformer"])


def test_every_command_has_help(attnlab):
    services = ("up", "dispatch")  # these become another program, which says its own options
    for name in {command.name for command in app.registered_commands} - set(services):
        result = attnlab(name, "--help")
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) > 5
    for name in services:
        told = subprocess.run(
            [sys.executable, "-m", "attnlab_webui.cli", name, "--help"], capture_output=True
        )
        assert (told.returncode, told.stderr) == (0, b"")
        assert b"--slots" in told.stdout


def test_export_leaves_no_half_file_when_the_disk_is_full(attnlab, recorded, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused(attnlab("export", "1", "--format", "csv", "--out", tmp_path / "m.csv"))
    assert not [path for path in tmp_path.iterdir() if "m.csv" in path.name]


def test_migrate_is_what_older_databases_need(attnlab, home):
    url = f"sqlite:///{home / 'attnlab.db'}"
    migrate(url)
    with open_store(url, check=False) as store, store.write(announce=False) as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    assert "run `attnlab migrate`" in refused(attnlab("list"))
