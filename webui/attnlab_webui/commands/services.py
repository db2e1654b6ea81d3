"""`up`, `web`, `dispatch`, `migrate`, `purge`: the services, and the database they meet in."""

import ctypes
import os
import sys
from typing import Annotated

import typer

from attnlab_storage import keeping
from attnlab_storage.database import migrate as migrate_store
from attnlab_storage.database import open_store
from attnlab_webui.commands.console import JsonOption, print_document, reading_store, say
from attnlab_webui.guard import check_bind

Host = Annotated[str, typer.Option(help="Address to listen on. Anything but loopback needs ATTNLAB_TOKEN.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's numbers
# also --help: the service behind a command says which options it takes
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def up(ctx: typer.Context) -> None:
    """Start everything on this machine: database, Ray, dispatcher and web page. Ctrl-C ends all of it."""
    become("attnlab_workers.launch", ctx.args)


def dispatch(ctx: typer.Context) -> None:
    """Start the dispatcher: it takes queued runs and has Ray execute them."""
    become("attnlab_workers.dispatcher", ctx.args)


def web(host: Host = "127.0.0.1", port: Port = 7860) -> None:
    """Start only the web page and its HTTP API."""
    check_bind(host)
    store = reading_store()
    import uvicorn

    from attnlab_webui.app import build_app

    bound_heaps()
    say(f"attnlab on http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}")
    uvicorn.run(build_app(store), host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)


def bound_heaps() -> None:
    """Have glibc give back what the page forgets: tensors and pyramids by themselves, the rest in two heaps.

    Left alone it has eight heaps a core, and keeps there what is no larger than the largest block freed so far. With
    the overviews of 16 heads of 32,768 tokens and 320 looks the process reached 666 MB so, 618 MB with two heaps,
    544 MB with both bounds; a look takes 15 % less processor time with both than with two heaps.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_ARENA_MAX, 2)
        set_option(M_MMAP_THRESHOLD, 4 << 20)  # the scores of a block, 2 MB, are soon taken again and stay
        set_option(M_TRIM_THRESHOLD, 16 << 20)


def migrate(json: JsonOption = False) -> None:
    """Create the database, or bring it to this program's version."""
    store = open_store(check=False)
    revision = migrate_store(store)
    if json:
        print_document({"database": store.label, "revision": revision})
    else:
        say(f"{store.label} is at version {revision}")


def purge(
    older_than: Annotated[float, typer.Option(min=0, help="Days since it was deleted.")] = 30.0,
    json: JsonOption = False,
) -> None:
    """Remove for good what was deleted long ago, and give its space back to the disk.

    Until then a deleted run can be brought back. SQLite rewrites its file: that needs as much space once more, and
    nobody can write meanwhile, so do it while nothing runs.
    """
    store = reading_store()
    gone = keeping.purge(store, older_than_seconds=older_than * 24 * 3600)
    if gone:
        store.compact()
        store.settle()
    if json:
        print_document({"database": store.label, "removed": gone})
    else:
        say(f"removed {gone} {'run' if gone == 1 else 'runs'} from {store.label}")


def become(module: str, arguments: list[str]) -> None:
    """Replaces this process by `python -m module`, so that signals and exit codes are the service's own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
