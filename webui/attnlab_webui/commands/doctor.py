"""`doctor`: what this machine has, what is missing and why, and whether the lab is alive."""

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text
from sqlalchemy import text

from attnlab.bundled import BUNDLED, is_fetched
from attnlab_storage.control import dispatchers
from attnlab_storage.database import Store, open_store
from attnlab_storage.errors import StoreError
from attnlab_storage.settings import home_folder, models_folder
from attnlab_webui.commands.console import EXIT_BAD_OUTCOME, JsonOption, errors, print_document, short_bytes
from attnlab_webui.system_facts import is_alive

Status = Literal["ok", "note", "problem"]
MARKS = {"ok": ("ok", "green"), "note": ("--", "yellow"), "problem": ("!!", "bold red")}
LOW_DISK_BYTES = 2_000_000_000
RECENT_SECONDS = 86400.0

WORKER_LIBRARIES = ("torch", "transformers", "ray", "triton", "safetensors")
KERNEL_LIBRARIES = {
    "flash_attn": "flash-attn",
    "flashinfer": "flashinfer-python",
    "natten": "natten",
    "fla": "flash-linear-attention",
    "xformers": "xformers",
}


@dataclass(frozen=True)
class Check:
    """One thing looked at; a `problem` makes `doctor` end with 1, a `note` does not."""

    name: str
    status: Status
    detail: str


def doctor(
    dispatcher: Annotated[
        bool, typer.Option("--dispatcher", help="Only ask whether a dispatcher is alive (for health checks).")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check the store, the models, the libraries, the disk and the dispatcher."""
    checks = list(dispatcher_checks(open_store())) if dispatcher else list(all_checks())
    healthy = all(check.status != "problem" for check in checks)
    if dispatcher:
        healthy = any(check.status == "ok" for check in checks)
    if json:
        print_document({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            mark, style = MARKS[check.status]
            errors().print(Text.assemble((mark, style), f" {check.name}: {check.detail}"), soft_wrap=True)
    if not healthy:
        raise typer.Exit(EXIT_BAD_OUTCOME)


def all_checks() -> Iterator[Check]:
    yield from store_checks()
    yield disk_check(home_folder())
    yield from model_checks()
    yield from library_checks()
    yield browser_check()


def store_checks() -> Iterator[Check]:
    """Version and integrity of the store, then the dispatchers it knows."""
    try:
        store = open_store()
    except StoreError as problem:
        yield Check("database", "problem", str(problem))
        return
    with store:
        size = f", {short_bytes(store.path.stat().st_size)}" if store.path is not None else ""
        yield Check("database", "ok", f"{store.label}{size}")
        yield integrity_check(store)
        yield from dispatcher_checks(store)


def dispatcher_checks(store: Store) -> Iterator[Check]:
    """One check a dispatcher of the last day; a note when there is none."""
    found = [row for row in dispatchers(store) if row.silent_seconds < RECENT_SECONDS]
    for row in found:
        alive = is_alive(row)
        words = (
            f"{row.owner} {'is alive' if alive else 'has stopped'}, last seen {row.silent_seconds:.0f} s ago"
        )
        yield Check("dispatcher", "ok" if alive else "note", words)
    if not found:
        yield Check("dispatcher", "note", "none is running: `attnlab up` or `attnlab dispatch` starts one")


def integrity_check(store: Store) -> Check:
    """SQLite's own check of the file; PostgreSQL looks after itself."""
    if store.path is None:
        return Check("integrity", "ok", "left to PostgreSQL")
    with store.read() as session:
        found = list(session.scalars(text("PRAGMA quick_check(5)")))
        orphans = len(session.execute(text("PRAGMA foreign_key_check")).all())
    if found != ["ok"] or orphans:
        return Check("integrity", "problem", f"{'; '.join(found)}; {orphans} rows without their parent")
    return Check("integrity", "ok", "pages and references are whole")


def disk_check(folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    words = f"{short_bytes(free)} free for {folder}"
    if free < LOW_DISK_BYTES:
        return Check("disk", "problem", f"{words}: under {short_bytes(LOW_DISK_BYTES)}, runs may fail")
    return Check("disk", "ok", words)


def model_checks() -> Iterator[Check]:
    for name in BUNDLED:
        if is_fetched(name):
            yield Check("model", "ok", f"{name} in {models_folder() / name}")
        else:
            yield Check("model", "note", f"{name} is not here: `attnlab models fetch {name}` gets it")


def library_checks() -> Iterator[Check]:
    """The libraries of the worker and of the optional kernels, found without importing any."""
    for name in WORKER_LIBRARIES:
        version = installed_version(name, name)
        reason = (
            "not installed: this machine can show results, not run anything (pip install 'attnlab[worker]')"
        )
        yield Check("library", "ok" if version else "note", f"{name} {version or reason}")
    for module, package in KERNEL_LIBRARIES.items():
        version = installed_version(module, package)
        yield Check(
            "kernels", "ok" if version else "note", f"{module} {version or f'not installed ({package})'}"
        )


def installed_version(module: str, package: str) -> str | None:
    """The installed version, or None; the module is looked up and not loaded."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def browser_check() -> Check:
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if path:
        return Check("browser", "ok", f"{path} (used by the browser tests only)")
    return Check("browser", "note", "no Chromium: the browser tests skip (`make browser` installs one)")
