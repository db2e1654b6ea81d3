"""The System page without a browser: facts from the store, panels from the facts."""

import pytest
from sqlalchemy import text

from attnlab_storage.control import dispatcher_beat, pause
from attnlab_webui import system_facts, system_panels
from attnlab_webui.pages.system import show_system
from attnlab_webui.system_facts import alive_dispatchers, implementation_reasons, system_document

HOSTILE = "<script>alert(1)</script>"
SURVEY = [
    {"name": "eager", "label": "reference", "available": True, "reason": "keeps every score"},
    {"name": "triton", "label": "our kernel", "available": False, "reason": f"needs a GPU {HOSTILE}"},
]
MACHINE = {
    "device": "cuda",
    "cpu": {"model": HOSTILE, "cores": 16, "usable_cores": 8, "threads": 8},
    "memory_bytes": 128_000_000_000,
    "gpus": [
        {"name": "NVIDIA H100", "memory_bytes": 80_000_000_000, "capability": "9.0", "driver_version": "570"}
    ],
    "versions": {"torch": "2.13.0", "python": "3.11"},
    "platform": "Linux",
    "commit": None,
    "implementations": SURVEY,
}


def beat(store, host="node-1", survey=SURVEY, owner="here:1:a", **changed):
    environment = MACHINE | {"implementations": survey}
    node = {"id": host, "host": host, "slots": 2, "gpus": 1, "gpu_names": [], "environment": environment}
    cluster = {
        "host": "here",
        "pid": 7,
        "ray": "2.60",
        "address": "local",
        "slots": 2,
        "gpus": 1,
        "free_slots": 1,
    }
    dispatcher_beat(store, owner, cluster | {"free_gpus": 0, "running": [3, 4], "nodes": [node | changed]})


def age(store, seconds):
    with store.write(announce=False) as session:
        session.execute(
            text("UPDATE dispatcher SET heartbeat_at = heartbeat_at - :seconds"), {"seconds": seconds}
        )


def test_a_fresh_lab_says_what_to_do(sqlite_store):
    page = show_system(sqlite_store)
    assert "No machine has been surveyed yet" in page
    assert "No dispatcher is running" in page
    assert "smollm2-135m" in page


def test_machine_and_implementations_come_from_the_dispatcher(sqlite_store):
    beat(sqlite_store)
    page = show_system(sqlite_store)
    assert "NVIDIA H100, 80.0 GB, sm_90, driver 570" in page
    assert "8 of 16 cores" in page
    assert "keeps every score" in page
    assert "1 of 2 slots, 0 of 1 GPUs free" in page
    assert "3, 4" in page


def test_everything_from_outside_is_escaped(sqlite_store):
    beat(sqlite_store, host=HOSTILE, owner=HOSTILE)
    page = show_system(sqlite_store)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3


def test_without_a_dispatcher_the_newest_run_tells_of_its_machine(traced):
    page = show_system(traced.store)
    assert "seen by run" in page
    assert "cpu" in page


def test_a_silent_dispatcher_has_stopped(sqlite_store):
    beat(sqlite_store)
    assert alive_dispatchers(sqlite_store) == 1
    age(sqlite_store, 600)
    assert alive_dispatchers(sqlite_store) == 0
    page = show_system(sqlite_store)
    assert "stopped" in page
    assert "No dispatcher is running" in page
    assert "NVIDIA H100" in page, "what it surveyed is still known"


def test_a_dispatcher_of_long_ago_is_forgotten(sqlite_store):
    beat(sqlite_store)
    age(sqlite_store, 8 * 86400)
    assert system_document(sqlite_store)["dispatchers"] == []


def test_a_survey_that_failed_says_why(sqlite_store):
    beat(sqlite_store, environment=None, survey_error=f"the child died {HOSTILE}")
    page = show_system(sqlite_store)
    assert "the child died" in page
    assert "<script" not in page


def test_an_implementation_is_missing_only_if_no_machine_has_it(sqlite_store):
    beat(sqlite_store)
    assert set(implementation_reasons(sqlite_store)) == {"triton"}
    beat(
        sqlite_store,
        host="node-2",
        owner="there:2:b",
        survey=[{"name": "triton", "available": True, "reason": ""}],
    )
    assert implementation_reasons(sqlite_store) == {}


def test_database_facts(store):
    facts = system_document(store)["database"]
    assert facts["kind"] in ("SQLite", "PostgreSQL")
    assert facts["bytes"] > 10_000
    assert facts["version"][0].isdigit()


@pytest.mark.postgres
def test_the_password_of_the_database_is_never_shown(postgres_url):
    from attnlab_storage.database import Store, open_store

    with open_store(postgres_url) as store:
        assert "***" in Store(store._url.set(password="secret")).label
        assert "secret" not in show_system(store)


def test_a_paused_queue_is_told(sqlite_store):
    pause(sqlite_store)
    assert "The queue is paused" in show_system(sqlite_store)


def test_a_model_that_is_not_here_says_how_to_fetch_it(sqlite_store, home, monkeypatch):
    monkeypatch.setenv("ATTNLAB_MODELS", str(home / "none"))
    page = show_system(sqlite_store)
    assert "attnlab models fetch minilm-l6" in page


def test_a_node_without_a_slot_takes_no_runs_and_no_survey_is_waited_for(sqlite_store):
    """The head of a cluster, or a dispatcher's own node."""
    dispatcher_beat(sqlite_store, "here:1:a", {"nodes": [{"id": "x", "host": "ray-head", "slots": 0}]})
    page = show_system(sqlite_store)
    assert "takes no runs" in page
    assert "survey has not come in" not in page


def test_nodes_of_one_name_are_all_shown_and_those_of_an_older_dispatcher_once(sqlite_store):
    nodes = [{"id": name, "host": "ray-worker", "slots": 1} for name in "xy"]
    dispatcher_beat(sqlite_store, "here:1:a", {"nodes": nodes})
    dispatcher_beat(sqlite_store, "here:2:b", {"nodes": nodes})
    assert [machine["host"] for machine in system_facts.machines(sqlite_store)] == ["ray-worker"] * 2


def test_what_a_dispatcher_leaves_out_is_no_error(sqlite_store):
    dispatcher_beat(sqlite_store, "here:1:a", {"nodes": [{"id": "x", "environment": {}}]})
    page = show_system(sqlite_store)
    assert "says nothing about implementations" in page or "its survey has not come in yet" in page
    assert system_panels.machine({"host": "x", "seen": "by y", "environment": None, "survey_error": None})
