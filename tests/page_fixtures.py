"""The web pages of a store behind a server, and a browser to look at them with."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from store_fixtures import copied_store
from traced_fixtures import Traced

from attnlab_storage import results
from attnlab_storage.database import Store, open_store

# Gradio closes its stream of events when a page is left, and complains of its own doing if one was on its way
LEAVING = ("AbortError: signal is aborted without reason", "Unexpected error Connection errored out")
IDLE = "() => window.__attnlab?.idle"
"""every map, list and picture of the page stands"""


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """A Chromium or Chrome on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            found = playwright.chromium.executable_path
    if not Path(found).exists():
        pytest.skip("needs Chromium: apt-get install chromium, or python -m playwright install chromium")
    return found


@pytest.fixture(scope="session")
def chromium(chromium_path: str) -> Iterator[Any]:
    """One headless browser for all tests of the session; each test opens a context of its own."""
    from playwright.sync_api import sync_playwright

    quiet = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=quiet.split())
        yield browser
        browser.close()


def wait(page: Any) -> None:
    """Waits until the page stands and the browser has painted it."""
    page.wait_for_function(IDLE)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """Serves a store's web pages on a free loopback port; gives the address."""
    import uvicorn

    from attnlab_webui.app import build_app

    config = uvicorn.Config(
        build_app(store), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the web server ended"
        assert time.monotonic() < deadline, "the web server did not start within 30 s"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


class StoreOfTheTest:
    """Stands for the store of the test that runs: to build the pages takes longer than most tests."""

    def __init__(self, empty: Store) -> None:
        self.empty = self.now = empty

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now, name)


Shared = tuple[str, StoreOfTheTest]


@pytest.fixture(scope="session")
def shared_pages(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """The address of a server for all tests that change what they look at, and the store behind it."""
    with open_store(copied_store(sqlite_template, tmp_path_factory.mktemp("shared"))) as empty:
        store = StoreOfTheTest(empty)
        with serving(cast(Store, store)) as address:
            yield address, store


@pytest.fixture
def serve(shared_pages: Shared) -> Iterator[Callable[[Store], str]]:
    """Serves a store's web pages until the test ends; gives the address."""
    address, shared = shared_pages

    def show(store: Store) -> str:
        shared.now = store
        return address

    yield show
    shared.now = shared.empty


@dataclass
class Served:
    """A made-up experiment behind a web server; nothing may change it."""

    address: str
    traced: Traced


@pytest.fixture(scope="session")
def served(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, make_traced: Callable[..., Traced]
) -> Iterator[Served]:
    """Two succeeded runs of 77 tokens and a failed one, served for all tests that only look."""
    with open_store(copied_store(sqlite_template, tmp_path_factory.mktemp("served"))) as store:
        traced = make_traced(store, outcomes=["failed"])
        with serving(store) as address:
            yield Served(address, traced)


@pytest.fixture(scope="module")
def serve_store() -> Iterator[Callable[[Store], str]]:
    """Serves a store's web pages for all tests of a file; gives the address."""
    with contextlib.ExitStack() as stack:
        yield lambda store: stack.enter_context(serving(store))


@dataclass
class ServedRuns:
    """Real runs behind a web server, by the names that a test gave them; nothing may change them."""

    store: Store
    address: str
    runs: dict[str, results.RunRow]

    def link(self, name: str, query: str = "") -> str:
        """The address of a run's page."""
        run = self.runs[name]
        return f"{self.address}/experiment?id={run.experiment_id}&run={run.id}&{query}"


@pytest.fixture(scope="module")
def serve_runs(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ServedRuns]]:
    """Runs specs here, each of one run that keeps its maps, and serves them for all tests of a file."""
    from attnlab.run import run_here
    from attnlab.spec import parse_spec

    with contextlib.ExitStack() as stack:

        def make(**specs: dict[str, Any]) -> ServedRuns:
            store = stack.enter_context(
                open_store(copied_store(sqlite_template, tmp_path_factory.mktemp("runs")))
            )
            runs = {}
            for name, spec in specs.items():
                whole = {"name": name, "record": ["maps"], "repeats": 1} | spec
                (run,) = results.runs_of(store, experiment_id=run_here(store, parse_spec(whole)))
                assert run.state == "succeeded", run.reason
                runs[name] = run
            return ServedRuns(store, stack.enter_context(serving(store)), runs)

        yield make


@pytest.fixture(scope="session")
def window(chromium: Any) -> Iterator[Any]:
    """One browser context for the session, whose cache keeps Gradio's files; what a test stores in it is cleared."""
    context = chromium.new_context()
    yield context
    context.close()


@pytest.fixture
def browse(window: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages that may neither complain (console, uncaught errors) nor ask for anything off loopback."""
    problems: list[str] = []
    opened: list[Any] = []

    def watch(page: Any) -> None:
        opened.append(page)
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on(
            "console", lambda line: problems.append(f"console: {line.text}") if line.type == "error" else None
        )
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def check(request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.hostname != "127.0.0.1":
            problems.append(f"request off this machine: {request.url}")

    def open_page(
        url: str, *, dark: bool = False, width: int = 1280, height: int = 800, expect: Sequence[str] = ()
    ) -> Any:
        """A new page at the address; problems that contain one of ``expect`` are part of the test."""
        expected.extend(expect)
        page = window.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.goto(url)
        return page

    expected: list[str] = list(LEAVING)
    window.on("request", check)
    window.on("page", watch)
    yield open_page
    window.remove_listener("page", watch)
    for page in opened:
        if not page.is_closed():
            page.evaluate("() => { if (location.protocol === 'http:') localStorage.clear(); }")
            page.close()
    window.clear_cookies()
    window.remove_listener("request", check)
    left = [problem for problem in problems if not any(part in problem for part in expected)]
    assert not left, "\n".join(left)


@pytest.fixture
def browse_idle(browse: Callable[..., Any]) -> Callable[..., Any]:
    """Opens pages like ``browse`` and waits until their maps stand."""

    def open_page(url: str, **options: Any) -> Any:
        page = browse(url, **options)
        page.wait_for_function(IDLE)
        return page

    return open_page


@pytest.fixture
def open_view(served: Served, browse_idle: Callable[..., Any]) -> Callable[..., Any]:
    """Opens a run of the made-up experiment and waits until its view stands."""

    def open_page(query: str = "", run: int = 0, **options: Any) -> Any:
        traced = served.traced
        address = f"{served.address}/experiment?id={traced.experiment_id}&run={traced.run_ids[run]}"
        return browse_idle(f"{address}&{query}", **options)

    return open_page


@pytest.fixture(scope="module")
def lengths(
    sqlite_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_traced: Callable[..., Traced],
    serve_store: Callable[[Store], str],
) -> Iterator[tuple[str, Traced, Traced]]:
    """Runs of 77 and of 30 tokens; both begin with the same 28 and end with the same two."""
    with open_store(copied_store(sqlite_template, tmp_path_factory.mktemp("lengths"))) as store:
        long, short = make_traced(store), make_traced(store, tokens=30, seed=3)
        yield serve_store(store), long, short


@pytest.fixture
def compare(lengths: tuple[str, Traced, Traced], browse_idle: Callable[..., Any]) -> Callable[..., Any]:
    """Compares runs of ``lengths``."""
    return lambda query, **options: browse_idle(f"{lengths[0]}/compare?{query}", **options)
