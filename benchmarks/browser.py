"""What a reader of a long map meets in the browser: time to the first picture, to hover, bytes a step, memory.

    python benchmarks/browser.py                    # 32,768 tokens causal; 131,072 with a window of 4,096
    python benchmarks/browser.py --tokens 2048      # one shorter causal map

Needs Playwright and a Chromium. The server is a process of its own; the overview of the head is built before the clock
starts (`viewport.py --long` times that). Beside it BertViz and CircuitsVis, each as far as it comes, where installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright
from viewport import LONG, peak_bytes, write_long

from attnlab_kernels.masks import Causal, Mask
from attnlab_storage.database import open_store
from attnlab_webui.app import build_app

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# no object: the driver would hold every tile that it was handed
READY = "() => window.__attnlab?.idle && window.__attnlab.panels()[0].tile !== null"
HOVER = """([x, y]) => new Promise((done) => {
  const canvas = document.querySelector("canvas.at-map");
  const box = canvas.getBoundingClientRect();
  const read = () => document.querySelector("[data-part=readout]")?.textContent;
  const weight = () => document.querySelector("[data-part=readout] .at-weight b")?.textContent ?? "";
  const before = read();
  const start = performance.now();
  const at = {clientX: box.x + x * box.width, clientY: box.y + y * box.height, bubbles: true};
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  let first = null;
  const look = () => {
    if (read() !== before) first ??= performance.now() - start;
    if (first !== null && /^(masked|[+-]?[0-9])/.test(weight())) done([first, performance.now() - start]);
    else requestAnimationFrame(look);
  };
  look();
})"""
OTHER_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
OTHER_SECONDS = 300
OTHER_BYTES = 12 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tokens", type=int, help="one causal map of this length in place of the two long ones"
    )
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    maps: list[tuple[int, Mask]] = LONG if options.tokens is None else [(options.tokens, Causal())]
    for length, mask in maps:
        with tempfile.TemporaryDirectory(prefix="attnlab-browser-") as folder:
            url = f"sqlite:///{folder}/attnlab.db"
            writer = get_context("spawn").Process(target=write_long, args=(url, length, mask))
            writer.start()
            writer.join()
            with serving(url) as address:
                look(address, f"{length:,} tokens, {mask.describe()}", options.steps)
    for name in ("bertviz", "circuitsvis"):
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed")
            continue
        for length in OTHER_LENGTHS:
            if not other(name, length):
                break


@contextmanager
def serving(url: str) -> Iterator[str]:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = get_context("spawn").Process(target=serve, args=(url, port))
    server.start()
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api/v1/runs/1/viewport?layer=0&head=0", server)
        yield address
    finally:
        server.terminate()
        server.join()


def serve(url: str, port: int) -> None:
    with open_store(url) as store:
        uvicorn.run(build_app(store), host="127.0.0.1", port=port, log_level="error")


def wait_for(address: str, server: Any) -> None:
    """Until the server answers with the whole map, its overview built."""
    while True:
        try:
            with urllib.request.urlopen(address) as answer:
                if answer.status == 200:
                    return
        except OSError:
            if not server.is_alive():
                raise
        time.sleep(0.2)


def look(address: str, title: str, steps: int) -> None:
    """Open the map, move about in it and point at cells; print what it took."""
    with a_browser() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.goto(f"{address}/experiment")  # styles and scripts are kept
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        sizes: dict[str, int] = {}
        asked: list[str] = []
        session.on(
            "Network.requestWillBeSent",
            lambda event: (
                asked.append(event["requestId"]) if "/viewport" in event["request"]["url"] else None
            ),
        )
        session.on(
            "Network.loadingFinished",
            lambda event: sizes.update({event["requestId"]: event["encodedDataLength"]}),
        )
        start = time.perf_counter()
        page.goto(f"{address}/experiment?id=1&run=1&layer=0&head=0")
        page.wait_for_function(READY, timeout=120_000)
        first = time.perf_counter() - start
        moved, bytes_moved = walk(page, steps, asked, sizes)
        hovered = [page.evaluate(HOVER, [0.2 + 0.6 * i / steps, 0.9 - 0.3 * i / steps]) for i in range(steps)]
        heap = {row["name"]: row["value"] for row in metrics(session)}["JSHeapUsedSize"]
        resident = renderer_bytes(browser)
    empty, bare = bare_bytes("about:blank"), bare_bytes(f"{address}/claims")
    print(f"{title}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(f"  first picture {first:.2f} s")
    read, exact = np.array(hovered).T
    figures = {
        "pan or zoom, ms": moved,
        "a step, KB": bytes_moved,
        "hover, ms": read,
        "exact weight, ms": exact,
    }
    for name, taken in figures.items():
        middle, most = np.percentile(taken, [50, 95])
        print(f"  {name:17} p50 {middle:6.1f} p95 {most:6.1f} max {max(taken):6.1f}")
    print(
        f"  renderer {resident / 1e6:.0f} MB resident, {heap / 1e6:.0f} MB of JavaScript; "
        f"a page of the lab without a map {bare / 1e6:.0f} MB, an empty one {empty / 1e6:.0f} MB"
    )


@contextmanager
def a_browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def bare_bytes(address: str) -> int:
    """What the renderer of a fresh browser holds once a page has come to rest: most of it is Chromium's own."""
    with a_browser() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.goto(address)
        if address.startswith("http"):
            page.get_by_role("link", name="Queue").wait_for()
        return renderer_bytes(browser)


def walk(page: Page, steps: int, asked: list[str], sizes: dict[str, int]) -> tuple[list[float], list[float]]:
    """Zoom in, pan and zoom out: milliseconds until the new picture stands, and kilobytes of each step."""
    box = page.locator("canvas.at-map").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.6 * box["height"])
    times, kilobytes = [], []
    for step in range(steps):
        asked.clear()
        start = time.perf_counter()
        page.mouse.wheel(0, -240 if step < steps / 2 else 240)
        page.wait_for_function(READY, timeout=60_000)
        times.append(1e3 * (time.perf_counter() - start))
        kilobytes.append(sum(sizes.get(request, 0) for request in asked) / 1e3)
    return times, kilobytes


def metrics(session: Any) -> list[dict[str, Any]]:
    session.send("Performance.enable")
    return session.send("Performance.getMetrics")["metrics"]


def renderer_bytes(browser: Any) -> int:
    """Resident memory of the largest renderer."""
    found = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    pids = [process["id"] for process in found if process["type"] == "renderer"]
    pages = [int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in pids]
    return max(pages) * os.sysconf("SC_PAGE_SIZE")


def other(name: str, length: int) -> bool:
    """One layer of 8 heads in another viewer, in a process of its own; False where it stops."""
    process = get_context("spawn").Process(target=make_other, args=(name, length))
    process.start()
    process.join(OTHER_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        print(f"{name}, {length} tokens: stops, no page within {OTHER_SECONDS} s")
        return False
    if process.exitcode:
        print(f"{name}, {length} tokens: stops within {OTHER_BYTES >> 30} GiB, exit {process.exitcode}")
    return process.exitcode == 0


def make_other(name: str, length: int) -> None:
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (OTHER_BYTES, OTHER_BYTES))
    weights = torch.rand(1, 8, length, length).tril()
    weights /= weights.sum(-1, keepdim=True)
    tokens = [f"t{place}" for place in range(length)]
    start = time.process_time()
    if name == "bertviz":
        from bertviz import head_view  # pyright: ignore[reportMissingImports]

        page = head_view((weights,), tokens, html_action="return").data
    else:
        from circuitsvis.attention import attention_heads  # pyright: ignore[reportMissingImports]

        page = str(attention_heads(attention=weights[0], tokens=tokens))
    took = time.process_time() - start
    print(
        f"{name}, {length} tokens, 8 heads: {took:.1f} s, {len(page) / 1e6:.1f} MB of HTML, {peak_bytes() / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
