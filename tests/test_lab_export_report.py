"""Laws of the HTML report: it opens offline, holds every run, and no word of a user becomes markup."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from attnlab.export import html, report
from attnlab.views.errors import NotFound
from attnlab_storage import results
from attnlab_storage.tables import Experiment

EVIL = '</script><script>alert("x")</script><img src=//evil.example/x onerror=alert(1)>'


class Page(HTMLParser):
    """Collects tags, sources and shown text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.texts, self._hidden = [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._hidden:
            self.texts.append(data)


@pytest.fixture
def made(sqlite_store, make_traced):
    return make_traced(sqlite_store, outcomes=["out_of_memory", "timed_out"])


@pytest.fixture
def page(made):
    return report.write_report(made.store, made.experiment_id)


def test_the_report_asks_for_nothing(page):
    parsed = Page(page)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "link" not in parsed.tags
    assert "default-src 'none'" in page
    assert page.count("plotly.js v") == 1


def test_every_run_its_outcome_and_reason_are_in_the_report(made, page):
    text = "".join(Page(page).texts)
    for word in ("out of memory: made to be out_of_memory", "timed out: made to be timed_out", "banded"):
        assert word in text
    assert "Approximate swap" in text
    assert "window_size" in text
    assert "2.13.0" in text


def test_maps_are_pictures_inside_the_page(page):
    sources = Page(page).sources
    assert len(sources) == 1 + 2 * 2  # the head where two runs differ most, then two layers of two runs
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()


def test_no_word_of_a_user_becomes_markup(made):
    clean = Page(report.write_report(made.store, made.experiment_id))
    with made.store.write() as session:
        experiment = session.get_one(Experiment, made.experiment_id)
        experiment.name = experiment.note = EVIL
        experiment.tags = [EVIL]
        experiment.spec = {"name": EVIL, "model": "</pre>" + EVIL}
    parsed = Page(report.write_report(made.store, made.experiment_id))
    assert parsed.tags.count("script") == clean.tags.count("script")
    assert "//evil.example/x" not in parsed.sources
    assert EVIL in "".join(parsed.texts)


def test_an_experiment_without_results_still_has_a_report(sqlite_store, make_traced):
    made = make_traced(sqlite_store)
    results.delete_runs(sqlite_store, made.run_ids)
    page = report.write_report(sqlite_store, made.experiment_id)
    assert "0 runs" in page
    assert "plotly" not in page.lower()


def test_an_unknown_experiment_is_not_found(sqlite_store):
    with pytest.raises(NotFound):
        report.write_report(sqlite_store, 5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 30])
def test_layers_are_spread_from_the_first_to_the_last(count):
    chosen = report._spread(list(range(count)), 3)
    assert chosen[0] == 0
    assert chosen[-1] == count - 1
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(3, count)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), ("<b>", "&lt;b&gt;"), (0.1234567891, "0.123457"), (["<"], "[&quot;&lt;&quot;]"), (3, "3")],
)
def test_values_are_escaped_text(value, shown):
    assert html.text(value) == shown
    assert re.fullmatch(r"<td>.*</td>", f"<td>{html.text(value)}</td>")


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_draws_its_charts_offline_and_asks_for_nothing(page, browse, tmp_path, dark):
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    # the page itself is the one request that may leave loopback; any other, and any console error, fails the test
    opened = browse(f"file://{path}", dark=dark, expect=[f"request off this machine: file://{path}"])
    opened.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    assert opened.locator(".js-plotly-plot").count() == page.count("Plotly.newPlot(")
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
