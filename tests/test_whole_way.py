"""One person, one browser, the real lab, from the form to the export: Ray, child process and kernels are real."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from playwright.sync_api import expect

from attnlab.bundled import is_fetched
from attnlab_storage.database import open_store
from attnlab_storage.listing import get_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.ray,
    pytest.mark.model,
    pytest.mark.slow,
    # Gradio's own statistics of its events use what pandas has deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SPEC = """name: esterification
model: rxnmapper
input: {text: "CC(=O)O.OCC>>CC(=O)OCC"}
vary:
  mechanism: [multi_head, {sliding_window: {window_size: 5}}]
record: [maps, timing, memory, accuracy, statistics]
repeats: 3
"""


@pytest.fixture
def lab_up(tmp_path):
    """The address of a lab that `attnlab up` started; it ends by Ctrl-C."""
    said = tmp_path / "up.log"
    command = [sys.executable, "-m", "attnlab_workers.launch", "--port", "0", "--no-starter"]
    with said.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not (ready := re.search(r"is ready: (http://\S+)", said.read_text())):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)
    yield ready.group(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, said.read_text()


@pytest.mark.skipif(not is_fetched("rxnmapper"), reason="needs the bundled model rxnmapper: make models")
def test_from_the_form_to_the_export_in_one_browser(lab_up, browse):
    page = browse(lab_up)
    expect(page.locator("#new-cost")).to_contain_text("runs", timeout=30_000)
    page.locator("#new-yaml .cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(SPEC)
    expect(page.locator("#new-name input")).to_have_value("esterification", timeout=30_000)
    expect(page.locator("#new-cost")).to_contain_text("2runs", timeout=30_000)
    page.locator("#new-queue").click()
    expect(page.locator("#new-result")).to_contain_text("2 runs are queued", timeout=30_000)

    page.goto(f"{lab_up}/queue")
    finished = page.get_by_text("succeeded", exact=True)
    expect(finished.nth(1)).to_be_visible(timeout=180_000)  # the page follows by itself

    page.goto(f"{lab_up}/experiment?id=1")
    page.wait_for_function("() => window.__attnlab?.panels().length === 1", timeout=30_000)
    expect(page.get_by_text("rows sum to 1 within")).to_be_visible()

    page.goto(f"{lab_up}/compare?runs=1,2&layer=10&head=5")
    page.wait_for_function("() => window.__attnlab?.panels().length === 3", timeout=30_000)
    with page.expect_download() as download:
        page.get_by_role("link", name="NPZ").click()
    with np.load(io.BytesIO(download.value.path().read_bytes()), allow_pickle=False) as arrays:
        full, window = arrays["map_1"], arrays["map_2"]
    np.testing.assert_allclose(full.sum(axis=1), 1, atol=5e-6)
    assert not np.array_equal(full, window)

    report = urllib.request.urlopen(f"{lab_up}/api/v1/experiments/1/export/html").read().decode()
    assert "esterification" in report
    with open_store() as store:
        for run_id in (1, 2):
            run = get_run(store, run_id)
            assert run is not None
            assert (run.state, run.attempt) == ("succeeded", 1), run.reason
