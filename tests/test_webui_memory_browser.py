"""The memory of a run over time in a real browser: from a link, and by the tab."""

import re

import pytest

from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_storage import results

SPEC = {
    "name": "memory",
    "module": {"dim": 32, "num_heads": 2},
    "vary": {
        "mechanism": ["multi_head"],
        "implementation": ["eager", "flash_attn_2"],
        "sequence_length": [65],
    },
    "phase": "decode",
    "record": ["memory"],
}


@pytest.fixture
def runs(sqlite_store):
    experiment = run_here(sqlite_store, parse_spec(SPEC))
    return results.runs_of(sqlite_store, experiment_id=experiment)


def test_a_link_opens_the_timeline_and_the_tab_goes_into_the_address(serve, browse, sqlite_store, runs):
    run, refused = runs
    assert (run.state, refused.state) == ("succeeded", "unsupported")
    address = f"{serve(sqlite_store)}/experiment?id={run.experiment_id}"
    page = browse(f"{address}&run={run.id}&tab=memory")
    for name in ("timeline", "kernel-timeline"):
        page.locator(f"#experiment-{name} .js-plotly-plot").wait_for()
    page.get_by_text(re.compile("^peak ")).first.wait_for()
    table = page.get_by_role("table", name="Allocations at the peak")
    table.get_by_text("KV cache", exact=True).first.wait_for()
    facts = page.locator("#experiment-facts")
    cache = f"{2 * 32 * 4 * 64 / 1000:.1f} kB"
    facts.get_by_text(cache, exact=True).wait_for()
    facts.get_by_text(f"{cache} = 2 · L · H · d · b · n").wait_for()
    page.get_by_role("row", name=re.compile("unsupported")).click()
    page.get_by_text("This run recorded no memory").wait_for()
    page.get_by_role("tab", name="Spec").click()
    page.get_by_label("spec").wait_for()
    page.get_by_role("tab", name="Memory over time").click()
    page.wait_for_url(re.compile("tab=memory"))


def test_a_timeline_is_a_file_to_take_away(serve, browse, sqlite_store, runs):
    served = serve(sqlite_store)
    address = f"{served}/api/v1/runs/{runs[0].id}/memory"
    page = browse(f"{served}/queue")
    timeline = page.request.get(f"{address}/memory_timeline")
    assert timeline.headers["content-disposition"].endswith('memory-timeline.json"')
    assert timeline.json()["held"]["kv_cache"] == 2 * 32 * 4 * 64
    for what, status, words in (
        ("snapshot", 404, "only runs on CUDA"),
        ("other", 400, "what must be one of"),
    ):
        refused = page.request.get(f"{address}/{what}")
        assert (refused.status, words in refused.json()["error"]) == (status, True)
