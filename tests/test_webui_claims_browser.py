"""The Claims page in a browser: a claim, what was measured and the verdict side by side; and its button."""

import pytest
from playwright.sync_api import expect

from attnlab.presets import PRESETS, find_preset
from attnlab.presets.outcome import submit_preset
from attnlab_storage import queue, results
from attnlab_storage.listing import count_runs

# Gradio's own statistics of its events use what pandas has deprecated
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
expect.set_options(timeout=60_000)  # a busy machine is no reason to fail

# mechanism -> milliseconds (p10, median, p90) and bytes of the cache
MADE = {
    "multi_head": ([9.8, 10.0, 10.2], 8_000_000.0),
    "grouped_query": ([5.8, 6.0, 6.2], 2_000_000.0),
    "multi_head_latent": ([9.9, 10.0, 10.1], 1_000_000.0),
    "flash_attention_3": ([1.0, 4.0, 20.0], 0.0),
}
LONG = "made_to_fail_" + "x" * 200


@pytest.fixture
def measured(sqlite_store):
    """Every run of one preset, made up; the paged one failed with a word that no line can hold."""
    for submitted in submit_preset(sqlite_store, find_preset("cache-sizes"), "cpu", "tests"):
        for run in submitted.run_ids:
            claim = queue.claim(sqlite_store, "tests", run_id=run)
            assert claim is not None
            made = MADE.get(claim.point["mechanism"])
            if made is None:
                queue.finish(sqlite_store, claim, "failed", reason=LONG, error_kind="made")
                continue
            samples, size = made
            rows = [
                results.MeasurementRow("latency", samples[1], "ms", samples=samples),
                results.MeasurementRow("cache_bytes", size, "bytes"),
            ]
            with results.recording(sqlite_store, claim) as session:
                results.record_environment(session, claim, {"device": "cpu", "cpu": {"model": "<b>a CPU"}})
                results.record_measurements(session, claim, rows)
            queue.finish(sqlite_store, claim, "succeeded")
    return sqlite_store


@pytest.fixture
def every_preset(sqlite_store):
    """All runs of all presets with claims, made up, on a CPU."""
    presets = [preset for preset in PRESETS.values() if preset.claims]
    for preset in presets:
        runs = [run for made in submit_preset(sqlite_store, preset, "cpu", "tests") for run in made.run_ids]
        for run in runs:
            claim = queue.claim(sqlite_store, "tests", run_id=run)
            assert claim is not None
            interval = {"p10": 9.0, "p90": 11.0}
            rows = [
                results.MeasurementRow("latency", 10.0, "ms", samples=[9.9, 10.0, 10.1]),
                results.MeasurementRow("cache_bytes", 5e5, "bytes"),
                results.MeasurementRow("attention_peak_memory", 5e5, "bytes"),
                results.MeasurementRow("output_tokens_per_second", 10.0, "tokens/s", detail=interval),
            ]
            with results.recording(sqlite_store, claim) as session:
                results.record_environment(session, claim, {"device": "cpu", "cpu": {"model": "a CPU"}})
                results.record_measurements(session, claim, rows)
            queue.finish(sqlite_store, claim, "succeeded")
    return presets


def row(page, claim):
    return page.locator("#claims-table tr", has_text=claim)


def test_claim_measurement_and_verdict_stand_side_by_side(serve, browse, measured):
    page = browse(serve(measured) + "/claims?preset=cache-sizes")
    smaller = row(page, "1 / g of multi-head's cache")
    expect(smaller).to_contain_text("25.0% of the baseline's bytes on <b>a CPU")
    expect(smaller.locator(".at-chip")).to_have_text("holds")
    latent = row(page, "1 / 16 of multi-head's cache")
    expect(latent).to_contain_text("12.5% of the baseline's bytes on <b>a CPU, more than claimed")
    expect(latent.locator(".at-chip")).to_have_text("does not hold here")
    expect(row(page, "PagedAttention").locator(".at-chip")).to_have_text("not measurable on this device")
    expect(page.locator("#claims-chart-0 .legend")).to_contain_text("measured: holds")
    expect(page.locator("#claims-chart-1 .legend")).to_contain_text("measured: does not hold here")
    assert page.evaluate("document.querySelector('.at-claims').getBoundingClientRect().right <= innerWidth")


def test_every_claim_of_every_preset_has_its_verdict_and_the_reason(
    serve, browse, sqlite_store, every_preset
):
    page = browse(serve(sqlite_store) + "/claims")
    verdicts = {"holds", "does not hold here", "not measurable on this device"}
    seen = set()
    for preset in every_preset:
        page.locator("#claims-preset").get_by_label(preset.title).check()
        expect(page.locator("#claims-head h1")).to_have_text(preset.title)
        expect(page.locator("#claims-table .at-chip")).to_have_count(len(preset.claims))
        for claim in preset.claims:
            cells = row(page, claim.says).first.locator("td").all_inner_texts()
            assert cells[2] in verdicts, (claim.id, cells)
            assert len(cells[3]) > 20, (claim.id, cells)
            seen.add(cells[2])
        expect(page.locator("#claims-chart-0")).to_be_visible()
    assert seen == verdicts
    assert "batch-serving" in {preset.name for preset in every_preset}


def test_every_stack_shows_its_runs_and_what_they_took(serve, browse, sqlite_store):
    stacks = [preset for preset in PRESETS.values() if not preset.claims]
    for preset in stacks:
        for submitted in submit_preset(sqlite_store, preset, "cpu", "tests"):
            claim = queue.claim(sqlite_store, "tests", run_id=submitted.run_ids[0])
            assert claim is not None
            row_of = results.MeasurementRow("latency", 10.0, "ms", samples=[9.9, 10.0, 10.1])
            with results.recording(sqlite_store, claim) as session:
                results.record_measurements(session, claim, [row_of])
            queue.finish(sqlite_store, claim, "succeeded")
    page = browse(serve(sqlite_store) + "/claims", dark=True)
    for preset in stacks:
        page.locator("#claims-preset").get_by_label(f"Stack: {preset.title}").check()
        expect(page.locator("#claims-head h1")).to_have_text(preset.title)
        ended = page.get_by_role("table", name="how its runs ended")
        points = sum(len(spec.points()) for spec in preset.specs("cpu"))
        expect(ended.locator("tbody tr")).to_have_count(points)
        expect(ended.get_by_text("succeeded", exact=True)).to_have_count(len(preset.grids))
        expect(ended.get_by_text("10 ms", exact=True)).to_have_count(len(preset.grids))
        # the last column is on the page, not cut off
        assert ended.locator("th").last.evaluate("cell => cell.getBoundingClientRect().right <= innerWidth")


def test_the_button_queues_the_preset_and_the_page_follows_it(serve, browse, sqlite_store):
    page = browse(serve(sqlite_store) + "/claims", dark=True)
    expect(page.locator("#claims-head h1")).to_have_text("Memory relative to multi-head")
    page.locator("#claims-preset").get_by_label("Cache sizes and speed-ups").check()
    page.wait_for_url("**/claims?preset=cache-sizes")
    expect(page.locator("#claims-head h1")).to_have_text("Cache sizes and speed-ups")
    expect(page.locator("#claims-head")).to_contain_text("Not run yet: press “Run this preset”")
    page.get_by_role("button", name="Run this preset").click()
    expect(page.locator("#claims-result")).to_contain_text("6 runs queued")
    assert count_runs(sqlite_store) == 6
    expect(page.get_by_role("link", name="experiment 2")).to_be_visible()
    for run in (1, 2):
        claim = queue.claim(sqlite_store, "tests", run_id=run)
        assert claim is not None
        queue.finish(sqlite_store, claim, "failed", reason=f"made {run}", error_kind="made")
    expect(row(page, "1 / g of multi-head's cache")).to_contain_text("ended failed: made")


def test_a_preset_that_is_clicked_at_once_stays_chosen(serve, browse, sqlite_store):
    page = browse(serve(sqlite_store) + "/claims")
    radios = page.locator("#claims-preset input[type=radio]")
    radios.nth(2).click()
    chosen = radios.nth(2).input_value()
    expect(page.locator("#claims-head")).to_contain_text(find_preset(chosen).title)
    expect(radios.nth(2)).to_be_checked()
    assert f"preset={chosen}" in page.url
