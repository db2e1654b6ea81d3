"""The Kernels page: filters and cells as pure functions, then sorting in a browser."""

import json

import pytest
from playwright.sync_api import expect

from attnlab_webui import kernel_view
from attnlab_webui.kernel_view import ANY, CARDS
from attnlab_webui.pages.kernels import show

expect.set_options(timeout=60_000)  # a busy machine is no reason to fail
ALL = (ANY, ANY, ANY, "", False)


def row(kernel: str, capability: int = 90, stack: int = 0, error: str | None = None, **changes) -> dict:
    facts = {
        "registers": 168,
        "stack_bytes": stack,
        "shared_bytes": 2048,
        "occupancy": 0.25,
        "matrix_count": {"HGMMA": 12},
        "tma_loads": 0,
        "exponentials": 64,
    }
    return {
        "operation": "softmax",
        "kernel": kernel,
        "form": "bf16 D 64, tile 64 x 64",
        "capability": capability,
        "dtype": "bf16",
        "spill_bound": 32,
        "facts": None if error else facts,
        "error": error,
    } | changes


@pytest.fixture
def panel(tmp_path, monkeypatch):
    """A panel of this machine with four rows."""
    monkeypatch.setattr(kernel_view, "home_folder", lambda: tmp_path)
    rows = [
        row("softmax forward", 80),
        row("softmax <b>forward</b>", stack=24),
        row("sparse key gradient", 100, stack=48, operation="sparse"),
        row("linear state", error="CompilationError: no", operation="linear", dtype="fp32"),
    ]
    document = {"made_at": "2026-11-28T10:00:00Z", "versions": {"triton": "3.8.0"}, "rows": rows}
    kernel_view.static_file().write_text(json.dumps(document))
    return kernel_view.read_panel()


def kernels(panel, *filters) -> list[str]:
    return [found["kernel"] for found in kernel_view.chosen(panel, *filters)]


def test_each_filter_keeps_what_it_says(panel):
    assert len(kernels(panel, *ALL)) == 4
    assert kernels(panel, CARDS[100], ANY, ANY, "", False) == ["sparse key gradient"]
    assert kernels(panel, ANY, "linear", ANY, "", False) == ["linear state"]
    assert kernels(panel, ANY, ANY, "fp32", "", False) == ["linear state"]
    assert kernels(panel, ANY, ANY, ANY, "GRADIENT d", False) == ["sparse key gradient"]
    assert len(kernels(panel, ANY, ANY, ANY, "", True)) == 3
    assert kernel_view.operations(panel) == [ANY, "softmax", "sparse", "linear"]


def test_a_kernel_of_others_has_no_bound_and_shows_what_its_code_does_not_tell(panel):
    theirs = row("flash-attn 4 forward", stack=152, spill_bound=None)
    theirs["facts"] |= {"shared_bytes": None, "occupancy": None}
    document = panel | {"rows": [theirs], "notes": ["one is not installed: pip install it"]}
    assert "none above its bound" in kernel_view.summary(document, [theirs])
    assert "one is not installed: pip install it." in kernel_view.summary(document, [theirs])
    table = kernel_view.table([theirs])
    assert "set at launch" in table
    assert "unknown" in table
    assert "at-bad" not in table


def test_what_is_over_its_bound_and_what_did_not_compile_are_red_and_counted(panel):
    head, table = show(*ALL)
    assert "2 above their bound of spills or not compiled" in head
    assert "compiled on this machine (2026-11-28)" in head
    assert '<td data-value="48" class="at-bad">48</td>' in table
    assert '<td data-value="24">24</td>' in table
    assert "CompilationError: no" in table
    assert "<b>forward</b>" not in table
    assert "No kernel fits" in show(ANY, ANY, ANY, "no such kernel", False)[1]


def test_a_half_written_panel_gives_way_to_the_shipped_one(panel):
    kernel_view.static_file().write_text('{"rows": [')
    shipped = kernel_view.read_panel()
    assert shipped["origin"] == "shipped with attnlab"
    assert {found["capability"] for found in shipped["rows"]} == set(CARDS)
    assert len(shipped["rows"]) > 100


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pandas, inside Gradio's own statistics
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_heading_sorts_by_keyboard_too_and_a_filter_keeps_the_order(serve, browse, sqlite_store, dark):
    page = browse(serve(sqlite_store) + "/kernels", dark=dark)
    spill = page.get_by_role("button", name="Spill B")
    expect(spill).to_be_visible()
    spill.focus()
    page.keyboard.press("Enter")
    heading = page.locator("th", has=spill)
    expect(heading).to_have_attribute("aria-sort", "ascending")
    page.keyboard.press("Enter")
    expect(heading).to_have_attribute("aria-sort", "descending")
    page.get_by_label("Name or form has").fill("sparse")
    first = page.locator("#kernels-table tbody tr")
    expect(first.nth(0)).to_contain_text("sparse")
    expect(heading).to_have_attribute("aria-sort", "descending")
    spills = [int(cell) for cell in page.locator("#kernels-table tbody td:nth-child(5)").all_inner_texts()]
    assert len(spills) > 10
    assert spills == sorted(spills, reverse=True)
