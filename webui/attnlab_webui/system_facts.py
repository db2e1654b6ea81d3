"""What the lab runs on, from the store and this process alone: nothing here loads torch or asks another machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sqlite3
from typing import Any

from sqlalchemy import text

from attnlab.bundled import BUNDLED, is_fetched, model_folder
from attnlab_storage.control import DispatcherRow, dispatchers, paused
from attnlab_storage.database import Store
from attnlab_storage.listing import counts_by_state, list_runs
from attnlab_storage.migrations import HEAD
from attnlab_storage.results import environment
from attnlab_storage.settings import home_folder, lease_seconds

FORGOTTEN_SECONDS = 7 * 86400.0


def system_document(store: Store) -> dict[str, Any]:
    """Program, database, queue, dispatchers, machines (with implementations and reasons) and models."""
    heard = [row for row in dispatchers(store) if row.silent_seconds < FORGOTTEN_SECONDS]
    return {
        "program": program_facts(),
        "database": database_facts(store),
        "queue": {"paused": paused(store), "states": counts_by_state(store)},
        "dispatchers": [dispatcher_facts(row) for row in heard],
        "machines": machines(store, heard),
        "models": model_facts(),
    }


def program_facts() -> dict[str, Any]:
    """Versions of what this process is made of."""
    packages = ("attnlab", "gradio", "sqlalchemy", "plotly", "numpy", "pyarrow")
    versions = {name: _version(name) for name in packages}
    return {"python": platform.python_version(), "home": str(home_folder()), "versions": versions}


def database_facts(store: Store) -> dict[str, Any]:
    """Kind, address without its password, server version, revision of the tables, and bytes on disk."""
    if store.path is not None:
        parts = (store.path, store.path.with_name(store.path.name + "-wal"))
        size = sum(part.stat().st_size for part in parts if part.exists())
        return _database("SQLite", store, sqlite3.sqlite_version, size)
    with store.read() as session:
        version = session.scalar(text("SHOW server_version"))
        size = session.scalar(text("SELECT pg_database_size(current_database())"))
    return _database("PostgreSQL", store, str(version), size)


def dispatcher_facts(row: DispatcherRow) -> dict[str, Any]:
    """One dispatcher: whether it is alive, and what its cluster has free."""
    shown = (
        "host",
        "pid",
        "ray",
        "address",
        "slots",
        "gpus",
        "free_slots",
        "free_gpus",
        "running",
        "waiting_for",
    )
    return {
        "owner": row.owner,
        "alive": is_alive(row),
        "started_at": row.started_at,
        "heartbeat_at": row.heartbeat_at,
        "silent_seconds": row.silent_seconds,
        **{name: row.cluster.get(name) for name in shown},
    }


def is_alive(row: DispatcherRow) -> bool:
    """Whether the dispatcher was heard of within a lease."""
    return row.silent_seconds <= lease_seconds()


def alive_dispatchers(store: Store) -> int:
    """How many dispatchers are serving the queue now."""
    return sum(map(is_alive, dispatchers(store)))


def machines(store: Store, heard: list[DispatcherRow] | None = None) -> list[dict[str, Any]]:
    """Every machine that a dispatcher surveyed, those of living ones first; else the one of the newest run.

    What several dispatchers see under one name is one machine; nodes of one dispatcher are always several.

    Each is {"host", "seen", "seconds", "slots", "gpus", "environment", "survey_error"}.
    """
    found: list[dict[str, Any]] = []
    for row in dispatchers(store) if heard is None else heard:
        known = {machine["host"] for machine in found}
        for node in row.cluster.get("nodes") or []:
            host = str(node.get("host") or node.get("id"))
            if host in known:
                continue
            found.append(
                {
                    "host": host,
                    "seen": "by a dispatcher" if is_alive(row) else "by a dispatcher that has stopped",
                    "seconds": row.silent_seconds,
                    "slots": node.get("slots"),
                    "gpus": node.get("gpus"),
                    "gpu_names": node.get("gpu_names") or [],
                    "environment": node.get("environment"),
                    "survey_error": node.get("survey_error"),
                }
            )
    if any(machine["environment"] for machine in found):
        return found
    return [*found, *_machine_of_newest_run(store)]


def implementation_reasons(store: Store) -> dict[str, str]:
    """Implementation -> why no known machine has it; empty where at least one has it, or nothing is known."""
    reasons: dict[str, str] = {}
    available: set[str] = set()
    for machine in machines(store):
        for item in (machine["environment"] or {}).get("implementations") or []:
            if item.get("available"):
                available.add(item["name"])
            else:
                reasons.setdefault(item["name"], str(item.get("reason") or "not available"))
    return {name: reason for name, reason in reasons.items() if name not in available}


def model_facts() -> list[dict[str, Any]]:
    """The bundled models, and whether each is on the machine of this process."""
    return [
        {
            "name": model.name,
            "title": model.title,
            "layers": model.layers,
            "heads": model.heads,
            "kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "context": model.context,
            "causal": model.causal,
            "license": model.license,
            "size_bytes": model.size_bytes,
            "fetched": is_fetched(model.name),
            "folder": str(model_folder(model.name)) if is_fetched(model.name) else None,
        }
        for model in BUNDLED.values()
    ]


def _machine_of_newest_run(store: Store) -> list[dict[str, Any]]:
    for run in list_runs(store, sort="-finished_at", limit=20).rows:
        document = environment(store, run.id) if run.environment_id is not None else None
        if document is not None:
            host = str(document.get("host") or document.get("hostname") or "a machine")
            facts = {"slots": None, "gpus": None, "gpu_names": [], "survey_error": None}
            seen = {"host": host, "seen": f"by run {run.id}", "seconds": None}
            return [{**seen, **facts, "environment": document}]
    return []


def _database(kind: str, store: Store, version: str, size: int | None) -> dict[str, Any]:
    return {"kind": kind, "url": store.label, "version": version, "revision": HEAD, "bytes": size}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
