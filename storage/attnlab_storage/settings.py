"""Every environment variable that attnlab reads, one documented reader each."""

import os
from pathlib import Path


class SettingError(ValueError):
    """An environment variable cannot be used; the text names it, the rule and the value."""


def home_folder() -> Path:
    """``ATTNLAB_HOME``: where the embedded database and the models live. Default ``~/.attnlab``."""
    return Path(os.environ.get("ATTNLAB_HOME") or Path.home() / ".attnlab").expanduser()


def models_folder() -> Path:
    """``ATTNLAB_MODELS``: the converted bundled models. Default ``<home>/models``."""
    return Path(os.environ.get("ATTNLAB_MODELS") or home_folder() / "models").expanduser()


def database_url() -> str:
    """``ATTNLAB_DATABASE_URL``: an SQLAlchemy URL of SQLite or PostgreSQL. Default ``sqlite:///<home>/attnlab.db``."""
    return os.environ.get("ATTNLAB_DATABASE_URL") or f"sqlite:///{home_folder().absolute() / 'attnlab.db'}"


def lease_seconds() -> float:
    """``ATTNLAB_LEASE_SECONDS``: how long a claimed run stays its owner's without a beat. Default 30."""
    return _positive("ATTNLAB_LEASE_SECONDS", 30.0)


def api_token() -> str | None:
    """``ATTNLAB_TOKEN``: the bearer token that the HTTP API asks for; unset means none is asked for."""
    return os.environ.get("ATTNLAB_TOKEN") or None


def built_commit() -> str | None:
    """``ATTNLAB_COMMIT``: the commit that an image was built from; a checkout knows its own. Default: not known."""
    return os.environ.get("ATTNLAB_COMMIT") or None


def max_upload_bytes() -> int:
    """``ATTNLAB_MAX_UPLOAD_BYTES``: the largest file that may be uploaded or imported. Default 64 MiB."""
    return int(_positive("ATTNLAB_MAX_UPLOAD_BYTES", 64 * 2**20))


def run_threads() -> int | None:
    """``ATTNLAB_THREADS``: compute threads of a run. Default: the run's share of the machine's cores."""
    return int(_positive("ATTNLAB_THREADS", 1.0)) if os.environ.get("ATTNLAB_THREADS") else None


def run_memory_bytes() -> int | None:
    """``ATTNLAB_RUN_MEMORY_BYTES``: main memory a run may allocate.

    Default: what is free when it starts on a CPU, no limit on a GPU.
    """
    if not os.environ.get("ATTNLAB_RUN_MEMORY_BYTES"):
        return None
    return int(_positive("ATTNLAB_RUN_MEMORY_BYTES", 1.0))


def _positive(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise SettingError(f"{name} must be a positive number, got {text!r}")
    return value


def web_hosts() -> tuple[str, ...]:
    """``ATTNLAB_WEB_HOSTS``: host names, comma separated, that the web page answers to beside loopback."""
    names = os.environ.get("ATTNLAB_WEB_HOSTS", "").split(",")
    return tuple(name.strip().lower() for name in names if name.strip())
