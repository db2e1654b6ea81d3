"""Connects to Ray: a small cluster of our own on this machine, or one that is there.

The local cluster listens on the loopback interface only, asks every connection for a token (whoever can talk
to Ray can run code), has no dashboard and reports nothing. It ends with this process.
"""

import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from attnlab_storage.database import Store
from attnlab_workers.processes import is_alive

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 * 2**20  # nothing but small documents goes through Ray; 75 MB is its minimum
# Ray puts sockets below it, whose paths may have 107 bytes
FOLDERS = Path("/tmp")
PREFIX = "attnlab-ray-"

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would end a run because *other* processes use the memory
    "RAY_memory_monitor_refresh_ms": "0",
    # workers started through `uv run` would each ask the network for packages
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # a driver without its cluster is of no use: end soon and be restarted
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# the switch that Ray has for laptops: every address is 127.0.0.1
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class ClusterRefused(RuntimeError):
    """The cluster cannot be used with this store or these settings; the text says what to change."""


def prepare(*, local: bool) -> None:
    """Set what Ray reads from the environment. Call it before anything imports ray."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "OMP_NUM_THREADS" in os.environ:
        # Ray sets this one too, so children do not trust it: pass the person's own wish on by our name
        os.environ.setdefault("ATTNLAB_THREADS", os.environ["OMP_NUM_THREADS"])
    if local:
        os.environ.update(LOOPBACK_ONLY)
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def start(slots: int | None) -> Path:
    """Start a cluster on this machine, which ends with this process; returns its folder.

    `slots` None: one for each GPU of this machine, or one.
    """
    import ray

    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=FOLDERS))
    ray.init(
        address="local",
        # Ray must see no fewer processors than there are slots; a run's threads are not Ray's business
        num_cpus=slots or _gpus() or 1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(folder),
    )
    return folder


def join(address: str) -> None:
    """Connect to a cluster that is there: `auto` or `HOST:PORT`.

    Raises:
        ClusterRefused: nothing answers there, or it does not accept the token.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterRefused(
            f"no Ray cluster can be joined at {address!r}: {str(error).strip().splitlines()[0]}. "
            "Is it running, and is RAY_AUTH_TOKEN the same here and there?"
        ) from error


def refuse_shared_sqlite(store: Store, hosts: list[str], here: str) -> None:
    """Raise `ClusterRefused` when other machines would have to open this machine's SQLite file."""
    elsewhere = sorted({host for host in hosts if host != here})
    if store.dialect == "sqlite" and elsewhere:
        raise ClusterRefused(
            f"the cluster has other machines ({', '.join(elsewhere)}), and only one can use the SQLite file "
            f"{store.path}: set ATTNLAB_DATABASE_URL to a PostgreSQL database on all of them"
        )


def facts(address: str | None) -> dict[str, Any]:
    """What the System page shows of the cluster itself."""
    import ray

    return {"ray": ray.__version__, "address": address or "local"}


def remove(folder: Path) -> None:
    """Delete what a local cluster left on disk."""
    shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Delete the folders of clusters whose process was killed."""
    for folder in FOLDERS.glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not is_alive(int(pid)) and folder.stat().st_uid == os.getuid():
            remove(folder)


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
