"""Laws of the web process as a whole: light, offline, closed, and every page answers."""

import json
import platform
import re
import subprocess
import sys

import httpx
import pytest
from starlette.testclient import TestClient

from attnlab_webui import app, pieces, theme
from attnlab_webui.guard import Guard


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served.address) as client:
        yield client


def test_the_web_process_loads_neither_torch_nor_ray():
    code = (
        "import sys\n"
        "from attnlab_webui import app\n"
        "[__import__(f'attnlab_webui.pages.{page.key}') for page in app.PAGES]\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'ray', 'triton', 'transformers')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


HEAPS = """
import os, threading
import numpy as np
from attnlab_webui.commands.services import bound_heaps

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def work():
    np.ones(3 << 20)  # by itself glibc keeps in its heaps what is no larger than the largest block freed so far
    together.wait()
    for _ in range(6):
        large.append(np.ones(1 << 20))
        small.append(np.ones(1 << 13))

bound_heaps()
large, small, together = [], [], threading.Barrier(8)
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
places = {array.ctypes.data >> 26 for array in small}  # heaps are 64 MB and begin at such addresses
held, before = sum(array.nbytes for array in large), resident()
large.clear()
print(len(places), (before - resident()) / held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heaps are glibc's")
def test_what_the_web_process_forgets_leaves_it():
    done = subprocess.run(
        [sys.executable, "-c", HEAPS], capture_output=True, text=True, timeout=120, check=True
    )
    places, given_back = done.stdout.split()
    assert int(places) <= 3  # the first heap may lie over a border
    assert float(given_back) > 0.95


def test_every_page_answers_and_names_no_other_server(client):
    for page in app.PAGES:
        answer = client.get(f"/{page.path}")
        assert answer.status_code == 200, page.key
        head = answer.text.partition("<body")[0]
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', head)
        assert loaded == []
        assert theme.STATIC_URL in head


def test_the_static_files_are_served_and_change_their_address_with_their_content(client):
    for name in ("js/shell.js", "js/heatmap.js", "css/map.css"):
        assert client.get(f"{theme.STATIC_URL}/{name}").status_code == 200
    assert client.get(f"{theme.STATIC_URL}/../app.py").status_code == 404
    assert client.get(f"{theme.STATIC_URL}/js/nothing.js").status_code == 404


def test_no_stylesheet_or_script_asks_another_server():
    for path in theme.STATIC_FOLDER.rglob("*"):
        if path.suffix in (".js", ".css"):
            text = path.read_text(encoding="utf-8")
            assert not re.findall(r"""(?:url\(|import\s|from\s|fetch\()\s*["']?https?://""", text), path.name
            assert "@import" not in text
            assert len(text.splitlines()) < 500, path.name


def test_no_handler_of_a_page_is_a_public_endpoint(client):
    information = client.get("/gradio_api/info").json()
    assert information["named_endpoints"] == {}
    assert information["unnamed_endpoints"] == {}


def test_gradio_keeps_no_history_sends_no_statistics_and_hides_its_footer(client):
    found = re.search(r"window\.gradio_config = (\{.*?\});</script>", client.get("/").text)
    assert found
    config = json.loads(found[1])
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert config["footer_links"] == []
    assert config["show_error"] is False


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=/etc/passwd", "/gradio_api/file=" + app.__file__, "/file=/etc/passwd", "/monitoring"],
)
def test_no_file_of_the_machine_is_served(client, path):
    answer = client.get(path)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text


def test_the_guard_stands_before_the_pages_too(traced):
    built = app.build_app(traced.store, guard=Guard(token="secret"))
    client = TestClient(built, base_url="http://127.0.0.1:7860", follow_redirects=False)
    for path in (
        "/",
        "/queue",
        "/config",
        "/gradio_api/info",
        "/api/v1/runs",
        f"{theme.STATIC_URL}/js/shell.js",
    ):
        assert client.get(path).status_code == 401
    assert client.get("/api/v1/health").status_code == 200
    assert client.get("/api/v1/runs", headers={"authorization": "Bearer secret"}).status_code == 200


def test_an_unknown_page_is_answered(client):
    assert client.get("/nowhere").status_code in (200, 404)


def test_pieces_escape_what_people_write():
    assert (
        pieces.chip("failed", '"><script>')
        == '<span class="at-chip at-failed" title="&quot;&gt;&lt;script&gt;">failed</span>'
    )
    assert "<b>" not in pieces.table(["a"], [["<b>"]])
    assert "<b>" in pieces.table(["a"], [[pieces.Raw("<b>")]])
    assert "<i>" not in pieces.empty_state("<i>", "<i>", [("<i>", '"<i>')])
    assert "<i>" not in pieces.notice("<i>", "error")


@pytest.mark.parametrize(
    ("value", "words"), [(None, "—"), (0.1234, "0.123 ms"), (12.34, "12.3 ms"), (1234.0, "1.23 s")]
)
def test_milliseconds_read_well(value, words):
    assert pieces.milliseconds(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "just now"), (42, "42 s ago"), (600, "10 min ago"), (7200, "2 h ago"), (864000, "10 days ago")],
)
def test_ages_read_well(seconds, words):
    assert pieces.ago(1000.0, 1000.0 + seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "—"), (0.84, "0.8 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")]
)
def test_durations_read_well(seconds, words):
    assert pieces.duration(seconds) == words


def test_progress_is_a_number_only_when_the_end_is_known():
    assert 'aria-valuenow="25"' in pieces.progress_bar(3, 12, "capture")
    moving = pieces.progress_bar(None, None, "loading")
    assert "aria-valuenow" not in moving
    assert "at-moving" in moving
