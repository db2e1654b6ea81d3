"""The New experiment page in a browser: both sides follow each other, and the Queue button queues."""

import re

import pytest
from playwright.sync_api import Route, expect

from attnlab_storage.listing import count_runs, list_experiments

# Gradio's own statistics of its events use what pandas has deprecated
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
expect.set_options(timeout=60_000)  # a busy machine is no reason to fail


@pytest.fixture
def page(serve, browse, sqlite_store):
    opened = browse(serve(sqlite_store))
    expect(opened.locator("#new-cost")).to_contain_text("runs")
    return opened


def yaml_text(page):
    return page.locator("#new-yaml .cm-content")


def type_yaml(page, text):
    yaml_text(page).click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(text)


def fill(page, field, text):
    """Write into a field and leave it, as a person does."""
    page.locator(f"{field} input").fill(text)
    page.locator(f"{field} input").press("Tab")


SMALL = """name: small
model: minilm-l6
vary:
  mechanism: [multi_head]
  sequence_length: [5]
input: {text: The river bank.}
"""


def test_form_and_yaml_follow_each_other(page):
    fill(page, "#new-name", "renamed")
    expect(yaml_text(page)).to_contain_text("name: renamed")
    page.locator("#new-mechanism-grouped_query input").check()
    expect(yaml_text(page)).to_contain_text("- grouped_query")
    fill(page, "#new-grouped_query-num_kv_heads", "1, 3")
    expect(yaml_text(page)).to_contain_text("num_kv_heads: 3")
    expect(page.locator("#new-cost")).to_contain_text("4runs")
    type_yaml(page, SMALL)
    expect(page.locator("#new-name input")).to_have_value("small")
    expect(page.locator("#new-lengths input")).to_have_value("5")
    expect(page.locator("#new-mechanism-grouped_query input")).not_to_be_checked()
    expect(page.locator("#new-grouped_query-num_kv_heads")).to_have_count(0)
    expect(page.locator("#new-cost")).to_contain_text("1runs")


def test_fields_that_stand_beside_each_other_stand_at_one_height(page):
    page.locator("#new-mechanism-sparse input").check()
    expect(page.locator("#new-sparse-local_window")).to_be_visible()
    ends = page.locator(".at-parameters input").evaluate_all(
        "(boxes) => boxes.map((box) => box.getBoundingClientRect().bottom).filter((end) => end > 0)"
    )
    assert len(ends) > 4
    assert all(abs(one - other) < 1 or abs(one - other) > 31 for one in ends for other in ends)
    page.locator("#new-kind").get_by_text("serve requests").click()
    expect(page.locator("#new-serving-workload-requests")).to_be_visible()
    tops = [
        page.locator(f"#new-serving-workload-{name}").get_by_text(label, exact=True).bounding_box()["y"]
        for name, label in (("arrivals-process", "Arrivals"), ("requests", "Requests"))
    ]
    assert abs(tops[0] - tops[1]) < 2


def test_random_tokens_have_no_text_and_a_trace_has_a_row_of_its_own(page):
    page.locator("#new-source").get_by_text("random tokens").click()
    expect(yaml_text(page)).to_contain_text("synthetic: random")
    for name in ("#new-text", "#new-upload"):
        expect(page.locator(name)).to_be_hidden()
    expect(page.get_by_label("Cut after (tokens)")).to_be_visible()
    page.locator("#new-source").get_by_text("text", exact=True).click()
    expect(page.locator("#new-text")).to_be_visible()
    page.locator("#new-kind").get_by_text("serve requests").click()
    page.locator("#new-serving-workload-arrivals-process").get_by_text("from a trace").click()
    field = page.locator("#new-serving-workload-trace input")
    expect(field).to_be_visible()
    assert field.bounding_box()["width"] > 200
    button = page.locator("#new-upload-trace").bounding_box()
    assert button["height"] < 40


def test_broken_yaml_shows_its_line_and_costs_nothing(page):
    type_yaml(page, SMALL)
    expect(page.locator("#new-name input")).to_have_value("small")
    type_yaml(page, "name: [small\nmodel: x: y")
    expect(page.locator("#new-problems")).to_contain_text("at line 2")
    expect(page.locator("#new-queue")).to_be_disabled()
    expect(page.locator("#new-name input")).to_have_value("small")
    fill(page, "#new-name", "still here")
    expect(yaml_text(page)).to_contain_text("name: [small")
    page.locator("#new-rewrite").click()
    expect(yaml_text(page)).to_contain_text("name: still here")
    expect(page.locator("#new-problems")).to_have_text("")
    expect(page.locator("#new-queue")).to_be_enabled()


def test_late_answers_leave_the_verdict_on_the_yaml_that_is_seen(page):
    """The edit that was sent before the rewrite reaches the server after it, still with the broken YAML."""
    type_yaml(page, SMALL.replace("small", "[small"))
    expect(page.locator("#new-rewrite")).to_be_visible()
    held: list[Route] = []

    def hold_the_edit(route: Route) -> None:
        if not held and "held back" in (route.request.post_data or ""):
            held.append(route)
        else:
            route.continue_()

    page.route("**/queue/join*", hold_the_edit)
    fill(page, "#new-name", "held back")
    for _ in range(500):
        if held:
            break
        page.wait_for_timeout(20)
    page.locator("#new-rewrite").click()
    held[0].continue_()
    expect(yaml_text(page)).to_contain_text("name: held back")
    expect(page.locator("#new-problems")).to_have_text("")
    expect(page.locator("#new-queue")).to_be_enabled()


def test_a_broken_rule_stands_beside_the_form(page):
    type_yaml(page, SMALL.replace("[5]", "[5000]"))
    expect(page.locator("#new-problems")).to_contain_text("vary.sequence_length must be at most 512 tokens")
    expect(page.locator("#new-queue")).to_be_disabled()
    fill(page, "#new-lengths", "6")
    expect(page.locator("#new-problems")).to_be_empty()
    expect(page.locator("#new-queue")).to_be_enabled()


def test_queue_button_queues_and_leads_to_the_experiment(page, sqlite_store):
    type_yaml(page, SMALL.replace("name: small", "name: <script>alert(1)</script>"))
    expect(page.locator("#new-queue")).to_be_enabled()
    page.locator("#new-queue").click()
    expect(page.locator("#new-result")).to_contain_text("1 run is queued")
    assert count_runs(sqlite_store) == 1
    assert list_experiments(sqlite_store).rows[0].name == "<script>alert(1)</script>"
    expect(page.locator("#new-recent")).to_contain_text("<script>alert(1)</script>")
    page.get_by_role("link", name="Open experiment 1").click()
    page.wait_for_url("**/experiment?id=1")


def test_a_picture_for_a_model_of_text_is_refused_with_the_model_that_reads_it(page):
    page.locator("#new-source").get_by_label("image").check()
    expect(page.locator("#new-problems")).to_contain_text("image is for vit-digits")
    expect(page.locator("#new-image input")).to_have_value("astronaut")
    expect(yaml_text(page)).not_to_contain_text("max_tokens")
    type_yaml(
        page, "name: small\nmodel: vit-digits\nvary: {mechanism: [multi_head]}\ninput: {image: digit-3}"
    )
    expect(page.locator("#new-problems")).to_be_empty()
    expect(page.locator("#new-preview img")).to_be_visible()
    expect(page.locator("#new-queue")).to_be_enabled()


FRONTIER = """name: how far
module: {dim: 16, num_heads: 2}
vary: {mechanism: [multi_head]}
record: [memory]
frontier: {memory_bytes: 67108864, up_to: 512}
"""


def test_a_server_is_written_with_the_form_and_with_the_yaml(page, tmp_path):
    expect(page.locator("#new-serving-token_budget")).to_have_count(0)
    page.locator("#new-kind").get_by_label("serve requests").check()
    expect(yaml_text(page)).to_contain_text("cache: [contiguous, paged]")
    expect(page.locator("#new-lengths")).to_have_count(0)
    expect(page.locator("#new-mechanism-linear")).to_have_count(0)
    page.locator("#new-serving-workload-arrivals-process").get_by_label("Poisson").check()
    fill(page, "#new-serving-workload-arrivals-rate", "7")
    fill(page, "#new-serving-cache_bytes", "32 MiB")
    page.locator("#new-caches").get_by_label("contiguous").uncheck()
    expect(page.locator("#new-cost")).to_contain_text("1runs")
    fill(page, "#new-serving-token_budget", "0")
    budget = page.locator("#new-serving-token_budget")
    expect(budget).to_contain_text("must be greater than or equal to 1, got 0")
    expect(page.locator("#new-queue")).to_be_disabled()
    fill(page, "#new-serving-token_budget", "64")
    expect(budget).not_to_contain_text("must be")
    expect(page.locator("#new-queue")).to_be_enabled()
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,7,2\n1,9,4\n")
    page.locator("#new-serving-workload-arrivals-process").get_by_label("from a trace").check()
    expect(page.locator("#new-serving-workload-trace")).to_contain_text("must be a file of requests")
    with page.expect_file_chooser() as chooser:
        page.locator("#new-upload-trace").click()
    chooser.value.set_files(trace)
    expect(page.locator("#new-serving-workload-trace input")).to_have_value(re.compile("upload-.*csv"))
    expect(page.locator("#new-queue")).to_be_enabled()
    type_yaml(page, FRONTIER)
    expect(page.locator("#new-frontier-memory_bytes input")).to_have_value("64 MiB")
    expect(page.locator("#new-kind").get_by_label("find the longest")).to_be_checked()
    expect(page.locator("#new-serving-token_budget")).to_have_count(0)
    fill(page, "#new-frontier-up_to", "1024")
    expect(yaml_text(page)).to_contain_text("up_to: 1024")
    expect(page.locator("#new-queue")).to_be_enabled()


def test_clone_prefills_the_form(serve, browse, sqlite_store, traced):
    page = browse(serve(sqlite_store) + "/?clone=1")
    expect(page.locator("#new-notice")).to_contain_text("A copy of experiment 1")
    expect(page.locator("#new-name input")).to_have_value("made up <b>&-copy")


def test_uploads(page, tmp_path, monkeypatch):
    text, empty, large = tmp_path / "text.txt", tmp_path / "empty.txt", tmp_path / "large.txt"
    text.write_text("Banks of the river Thames.")
    empty.write_text("")
    large.write_bytes(b"x" * 1_000_001)
    upload = page.locator("input[type=file]")
    upload.set_input_files(text)
    expect(page.locator("#new-text textarea")).to_have_value("Banks of the river Thames.")
    expect(yaml_text(page)).to_contain_text("Banks of the river Thames.")
    upload.set_input_files(empty)
    expect(page.locator("#new-notice")).to_contain_text("'empty.txt' is empty")
    upload.set_input_files(large)
    expect(page.locator("#new-notice")).to_contain_text("must be at most 1,000,000 bytes")
    expect(page.locator("#new-text textarea")).to_have_value("Banks of the river Thames.")


def test_a_file_over_the_servers_limit_is_refused_before_it_is_sent(
    serve_store, browse, sqlite_store, tmp_path, monkeypatch
):
    monkeypatch.setenv("ATTNLAB_MAX_UPLOAD_BYTES", "2000000")
    page = browse(serve_store(sqlite_store))
    expect(page.locator("#new-cost")).to_contain_text("runs")
    huge = tmp_path / "huge.txt"
    huge.write_bytes(b"x" * 3_000_000)
    page.locator("input[type=file]").set_input_files(huge)
    expect(page.get_by_text("exceed the maximum allowed size")).to_be_visible()
    assert "Alice" in page.locator("#new-text textarea").input_value()
