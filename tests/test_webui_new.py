"""The New experiment page without a browser: what its handlers answer."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlencode

import gradio as gr
import pytest

from attnlab.documents import read_document
from attnlab.estimate import Estimate
from attnlab_storage.control import dispatcher_beat
from attnlab_storage.database import revision
from attnlab_storage.listing import count_runs, get_experiment, list_experiments
from attnlab_webui import drafts, new_experiment
from attnlab_webui.form import Form, form_of
from attnlab_webui.form_fields import make_fields
from attnlab_webui.form_sections import FRONTIER, PROCESS, RUN, SERVE, TRACE, TRACE_FILE
from attnlab_webui.pages import new

HOSTILE = "<script>alert(1)</script>{{x}}${y}"


@pytest.fixture
def fields():
    async def make():
        # inside a loop, because Gradio else makes loops of its own and never closes them
        with gr.Blocks():
            return make_fields(Form())

    # in a thread of its own: Playwright's loop, once it runs, is the main thread's for the rest of the session
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, make()).result()


def skipped(value) -> bool:
    return value == gr.skip()


@pytest.fixture
def starter():
    draft = drafts.read_draft(drafts.starter())
    assert draft.document is not None
    return draft.text, form_of(draft.document)


def filled(form):
    """The form without the parameter fields that hold nothing, which only the page knows of."""
    parameters = {
        name: {key: text for key, text in given.items() if text} for name, given in form.parameters.items()
    }
    return replace(form, parameters={name: given for name, given in parameters.items() if given})


def named_folds(fields, opened):
    """What is opened or closed, by name; columns of mechanisms as `offer:ID`."""
    offers = [f"offer:{mechanism}" for mechanism in fields.offers]
    kinds = [*fields.of_kind, *fields.sections.folds]
    return dict(
        zip(["module", *fields.rows, *fields.inputs, *offers, *kinds, "preview"], opened, strict=True)
    )


def test_fields_show_a_form_and_read_it_back(fields, starter):
    _, form = starter
    assert filled(fields.read(fields.values(form))) == form


def test_an_empty_form_is_read_as_empty(fields):
    values = [None] * len(fields.components())
    form = fields.read(values)
    assert form.mechanisms == ()
    assert form.text == ""
    assert form.dtypes == ()


def test_an_edit_in_the_form_rewrites_the_yaml(fields, starter):
    text, form = starter
    values = fields.values(replace(form, repeats="9"))
    new_text, shown, *_ = new.on_form(fields, text, form, *values)
    assert "repeats: 9" in new_text
    assert shown.repeats == "9"


def test_a_blur_without_an_edit_rewrites_nothing(fields, starter):
    text, form = starter
    new_text, *_ = new.on_form(fields, text, form, *fields.values(form))
    assert skipped(new_text)


def test_an_edit_in_the_yaml_fills_the_form(fields, starter):
    text, _ = starter
    answers = new.on_yaml(fields, text.replace("repeats: 5", "repeats: 11"))
    shown = answers[0]
    assert shown.repeats == "11"
    assert answers[-len(fields.components()) :] == fields.values(shown)


def test_broken_yaml_shows_its_line_and_leaves_the_form(sqlite_store, fields):
    broken = "name: [x\nvary: 1"
    problems, _, queue_button, rewrite = new.verdict_of(sqlite_store, broken)
    assert "at line 2" in problems
    assert queue_button["interactive"] is False
    assert rewrite["visible"] is True
    assert all(skipped(answer) for answer in new.on_yaml(fields, broken))


def test_an_edit_in_the_form_leaves_broken_yaml_alone(fields, starter):
    _, form = starter
    broken = "name: [x"
    answers = new.on_form(fields, broken, form, *fields.values(replace(form, repeats="9")))
    assert skipped(answers[0])
    assert answers[1] == form


def test_rewrite_gives_broken_yaml_up_for_the_form(fields, starter):
    _, form = starter
    text, *_ = new.on_rewrite(fields, *fields.values(form))
    draft = drafts.read_draft(text)
    assert draft.spec is not None
    assert draft.spec.repeats == 5
    assert "Alice" in (draft.spec.input.text or "")


def test_every_problem_is_shown_escaped(sqlite_store, fields):
    hostile = f"name: n\nmodel: {HOSTILE!r}\nvary: {{mechanism: [{HOSTILE!r}]}}\n{HOSTILE!r}: 1"
    problems = new.verdict_of(sqlite_store, hostile)[0]
    assert "<script>" not in problems
    assert "&lt;script&gt;" in problems
    assert "choices: multi_head" in problems
    assert "things to fix" in problems


def test_a_near_miss_gets_a_suggestion(sqlite_store, fields):
    near_miss = "name: n\nmodel: minilm-l6\nvary: {mechanism: [sliding_windw]}"
    problems = new.verdict_of(sqlite_store, near_miss)[0]
    assert "did you mean <code>sliding_window</code>" in problems


def test_only_ticked_mechanisms_show_their_parameters(fields):
    opened = fields.folded(Form(mechanisms=("sliding_window",)))
    by_name = named_folds(fields, opened)
    assert by_name["sliding_window"]["visible"] is True
    assert by_name["grouped_query"]["visible"] is False
    assert by_name["module"]["visible"] is False
    assert [name for name in fields.inputs if by_name[name]["visible"]] == ["text"]


def test_a_model_that_reads_pictures_gets_a_picture(sqlite_store, fields, starter):
    text, form = starter
    values = fields.values(replace(form, model="vit-digits"))
    new_text, shown, facts, *answers = new.on_form(fields, text, form, *values)
    document = read_document(new_text)
    assert document["input"] == {"image": "digit-3"}
    assert (shown.source, shown.image, shown.sequence_lengths) == ("image", "digit-3", "")
    assert "17 positions" in facts
    assert new.verdict_of(sqlite_store, new_text)[0] == "", "nothing is left to fix"
    folds = answers[len(answers) - len(fields.components()) - len(fields.folds()) :]
    by_name = named_folds(fields, folds[: len(fields.folds())])
    assert [name for name in fields.inputs if by_name[name]["visible"]] == ["image"]
    assert "<img" in by_name["preview"]["value"]
    written = dict(zip(fields.plain, folds[len(fields.folds()) :], strict=False))
    assert (written["source"], written["image"], written["max_tokens"]) == ("image", "digit-3", "")


def test_typing_leaves_the_fields_alone(fields, starter):
    text, form = starter
    values = fields.values(replace(form, name="other"))
    answers = new.on_form(fields, text, form, *values)
    assert all(skipped(answer) for answer in answers[-len(fields.components()) :])


def test_cost_shows_runs_bytes_and_time(sqlite_store, starter):
    text, _ = starter
    panel = new_experiment.cost_panel(new_experiment.cost_of(sqlite_store, drafts.read_draft(text)))
    assert "<b>2</b><span>runs" in panel
    assert "MB" in panel
    assert "rough" in panel


def test_cost_waits_for_a_valid_draft(sqlite_store):
    assert new_experiment.cost_of(sqlite_store, drafts.read_draft("name: n")) is None


def test_queue_button_queues_the_grid_once_and_links_to_it(sqlite_store, starter):
    text, _ = starter
    result = new.on_queue(sqlite_store, text)
    assert "2 runs are queued" in result
    assert 'href="/experiment?id=1"' in result
    assert "No dispatcher is running" in result
    assert count_runs(sqlite_store) == 2


def test_queue_notice_is_quiet_when_a_dispatcher_is_alive(sqlite_store, starter):
    dispatcher_beat(sqlite_store, "here:1:a", {})
    assert "No dispatcher" not in new.on_queue(sqlite_store, starter[0])


@pytest.mark.parametrize(
    "text", ["", "name: [x", "name: n\nmodel: minilm-l6\nvary: {mechanism: [telepathy]}"]
)
def test_nothing_is_queued_while_something_is_left_to_fix(sqlite_store, text):
    result = new.on_queue(sqlite_store, text)
    assert "Not queued" in result
    assert new.verdict_of(sqlite_store, text)[0]
    assert count_runs(sqlite_store) == 0


def test_a_disk_that_is_too_small_is_told_before_queueing(sqlite_store, starter, monkeypatch):
    def tiny(spec, store):
        return Estimate(
            1, 10, 10, 1.0, "rough", [], ["stored_bytes must fit the free disk of 5 bytes; got 10"]
        )

    monkeypatch.setattr(new_experiment, "estimate", tiny)
    result = new.on_queue(sqlite_store, starter[0])
    cost = new.verdict_of(sqlite_store, starter[0])[1]
    assert "Not queued" in result
    assert "free disk" in cost
    assert count_runs(sqlite_store) == 0


def test_clone_fills_the_page_from_a_stored_experiment(sqlite_store, fields, starter):
    new.on_queue(sqlite_store, starter[0])
    text, *_ = new.on_first(sqlite_store, fields, {"clone": "1"})
    notice = new.on_load(sqlite_store, "?clone=1")[0]
    assert "A copy of experiment 1" in notice
    stored = get_experiment(sqlite_store, 1)
    assert stored is not None
    spec = drafts.read_draft(text).spec
    assert spec is not None
    assert spec.hash() == stored.spec_hash


@pytest.mark.parametrize("wanted", ["99", "x", "-1", HOSTILE, "9" * 40])
def test_a_clone_of_nothing_says_so(sqlite_store, fields, wanted):
    text, *_ = new.on_first(sqlite_store, fields, {"clone": wanted})
    notice = new.on_load(sqlite_store, f"?{urlencode({'clone': wanted})}")[0]
    assert "There is no experiment" in notice
    assert "<script>" not in notice
    assert text == drafts.starter()


def changed(store, fields, text, agreed, *values, clicks=None, query=""):
    """The YAML that is answered (None where it stays), what both sides agree on, and the components."""
    answer, now, *rest = new.on_edit(store, fields, query, clicks, None, text, agreed, *values)
    assert answer["on"] == text
    return answer["text"], now, rest[1 + len(fields.folds()) :]


def test_the_first_answer_shows_the_address_and_every_later_one_the_side_that_was_edited(
    sqlite_store, fields, starter
):
    text, form = starter
    values = fields.values(form)
    first, agreed, written = changed(
        sqlite_store, fields, text, None, *values, query="?mechanism=sliding_window"
    )
    assert "sliding_window" in first
    assert not all(skipped(value) for value in written)

    agreed = new.Agreed(text, form)
    new_text, now, written = changed(sqlite_store, fields, text, agreed, *values)
    assert (new_text, now.text) == (None, text)
    assert all(skipped(value) for value in written)

    edited = text.replace("repeats: 5", "repeats: 11")
    new_text, now, written = changed(sqlite_store, fields, edited, agreed, *values)
    assert (new_text, now.text, now.form.repeats) == (None, edited, "11")
    assert [value for value in written if not skipped(value)] == ["11"]

    typed = fields.values(replace(form, seed="7"))
    new_text, now, written = changed(sqlite_store, fields, edited, agreed, *typed)
    assert "repeats: 11" in new_text
    assert "seed: 7" in new_text
    assert (now.form.repeats, now.form.seed) == ("11", "7")
    assert [value for value in written if not skipped(value)] == ["11"]


def test_what_the_form_was_given_while_the_yaml_was_broken_is_not_lost(sqlite_store, fields, starter):
    text, form = starter
    agreed = new.Agreed(text, form)
    values = fields.values(replace(form, seed="7"))
    new_text, agreed, _ = changed(sqlite_store, fields, "name: [x", agreed, *fields.values(form))
    assert new_text is None
    new_text, agreed, _ = changed(sqlite_store, fields, "name: [x", agreed, *values)
    assert new_text is None
    mended, _, _ = changed(sqlite_store, fields, text, agreed, *values)
    assert "seed: 7" in mended
    rewritten, _, _ = changed(sqlite_store, fields, "name: [x", agreed, *values, clicks=["rewrite"])
    assert "seed: 7" in rewritten


def test_implementations_no_machine_has_are_marked_with_the_reason(sqlite_store):
    survey = [{"name": "triton", "label": "", "available": False, "reason": f"needs a GPU {HOSTILE}"}]
    node = {"host": "here", "environment": {"implementations": survey}}
    dispatcher_beat(sqlite_store, "here:1:a", {"nodes": [node]})
    _, missing, implementations = new.on_load(sqlite_store, "")
    assert ("triton (not here)", "triton") in implementations["choices"]
    assert "needs a GPU" in missing
    assert "<script>" not in missing


def test_recent_experiments_are_escaped_and_link_on(sqlite_store):
    text = f"name: {HOSTILE!r}\nmodel: minilm-l6\ninput: {{text: banks}}\nvary: {{mechanism: [multi_head]}}"
    new.on_queue(sqlite_store, text)
    strip = new_experiment.recent_list(sqlite_store)
    assert "<script>" not in strip
    assert 'href="/experiment?id=1"' in strip
    assert 'href="/?clone=1"' in strip
    assert "1 queued" in strip


def test_recent_list_is_drawn_only_when_something_changed(sqlite_store, starter):
    seen = revision(sqlite_store)
    assert all(skipped(answer) for answer in new.on_tick(sqlite_store, "", seen))
    new.on_queue(sqlite_store, starter[0])
    strip, now = new.on_tick(sqlite_store, "", seen)
    assert "Alice" in strip
    assert now != seen
    assert len(list_experiments(sqlite_store).rows) == 1


def test_upload_puts_the_text_into_the_form_and_keeps_no_copy(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Banks of the river.")
    text, source, notice = new.on_upload("text", str(path))
    assert (text, source, notice) == ("Banks of the river.", "text", "")
    assert not path.exists()


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"x" * 1_000_001], ids=["zero bytes", "binary", "too large"]
)
def test_bad_upload_leaves_the_text_and_says_why(tmp_path, data):
    path = tmp_path / "<b>.txt"
    path.write_bytes(data)
    text, source, notice = new.on_upload("text", str(path))
    assert skipped(text)
    assert skipped(source)
    assert "file: must" in notice
    assert "<b>" not in notice


def chosen(fields, starter, kind):
    """What the page answers once another kind of experiment is chosen: the YAML and what is shown."""
    text, form = starter
    new_text, shown, _, *rest = new.on_form(fields, text, form, *fields.values(replace(form, kind=kind)))
    return new_text, shown, named_folds(fields, rest[: len(fields.folds())])


def test_choosing_to_serve_writes_a_workload_that_can_be_queued(sqlite_store, fields, starter):
    text, shown, folds = chosen(fields, starter, SERVE)
    spec = drafts.read_draft(text).spec
    assert spec is not None
    assert spec.serving is not None
    assert spec.serving.cache_bytes == 16 << 20
    assert [point.parameters["cache"] for point in spec.points()] == ["contiguous", "paged"]
    assert shown.mechanisms == ("multi_head",), "what the engine cannot serve is dropped"
    opened = {name for name, fold in folds.items() if fold["visible"]}
    assert {"serve", "serving.token_budget", "text", "offer:grouped_query"} <= opened
    assert not opened & {"frontier", "lengths", "repeat", "record", "offer:linear", "serving.workload.trace"}
    assert new.verdict_of(sqlite_store, text)[0] == ""


def test_choosing_a_frontier_and_going_back_restores_the_experiment(sqlite_store, fields, starter):
    text, shown, folds = chosen(fields, starter, FRONTIER)
    spec = drafts.read_draft(text).spec
    assert spec is not None
    assert spec.frontier is not None
    assert spec.record == ("memory",)
    assert folds["frontier"]["visible"]
    assert not folds["text"]["visible"]
    back = replace(starter[1], kind=RUN, sections=shown.sections)
    again, *_ = new.on_form(fields, text, shown, *fields.values(back))
    assert drafts.read_draft(again).spec == drafts.read_draft(starter[0]).spec


@pytest.mark.parametrize(
    ("section", "field", "words"),
    [
        ("token_budget: 0", "serving.token_budget", "must be greater than or equal to 1, got 0"),
        ("num_blocks: 4", "serving.cache_bytes", "exactly one of cache_bytes and num_blocks"),
        ("max_length: 7", "serving.max_length", "must be at most 7 tokens a request here"),
    ],
)
def test_a_broken_rule_stands_beside_its_field_until_it_is_mended(
    sqlite_store, fields, starter, section, field, words
):
    text, *_ = chosen(fields, starter, SERVE)
    broken = text.replace("  cache_bytes:", f"  {section}\n  cache_bytes:")
    told, *answers = new.on_change(sqlite_store, fields, broken, frozenset())
    assert field in told
    beside = dict(zip(fields.told(), answers[-len(fields.told()) :], strict=True))
    assert words in beside[field]["info"]
    assert all(skipped(update) for name, update in beside.items() if name not in told)
    told, *answers = new.on_change(sqlite_store, fields, text, told)
    beside = dict(zip(fields.told(), answers[-len(fields.told()) :], strict=True))
    assert not told
    assert beside[field]["info"] == ""


def test_an_uploaded_trace_fills_its_field_and_is_whole_in_the_queue(sqlite_store, fields, starter, tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n3,7,2\n1.5,9,4\n")
    name, process, notice = new.on_upload("trace", str(file))
    assert (process, notice) == (TRACE, "")
    text, form, _ = chosen(fields, starter, SERVE)
    with_trace = replace(form, sections={**form.sections, PROCESS: process, TRACE_FILE: name})
    text, *_ = new.on_form(fields, text, form, *fields.values(with_trace))
    assert f"trace: {name}" in text
    spec = drafts.read_draft(text).spec
    assert spec is not None
    assert spec.serving is not None
    assert spec.serving.workload.trace == ((0.0, 9, 4), (1.5, 7, 2))
    again = drafts.read_draft(drafts.clone(spec.to_dict()))
    assert f"trace: {name}" in again.text
    assert again.spec is not None
    assert again.spec.hash() == spec.hash()


def test_a_trace_that_cannot_be_read_names_its_line(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n1,0,4\n")
    _, _, notice = new.on_upload("trace", str(file))
    assert "line 2" in notice
    assert "trace.csv" in notice


def test_a_trace_is_asked_for_beside_its_field(sqlite_store, fields, starter):
    text, form, _ = chosen(fields, starter, SERVE)
    waiting = replace(form, sections={**form.sections, PROCESS: TRACE})
    text, *_ = new.on_form(fields, text, form, *fields.values(waiting))
    told, *_ = new.on_change(sqlite_store, fields, text, frozenset())
    assert told == {TRACE_FILE}


def test_why_implementations_are_missing_is_a_list_that_is_folded_away():
    told = new_experiment.unavailable_line({"triton": "needs a <GPU>", "fla": "not installed"})
    assert told.startswith("<details")
    assert "why 2 of them" in told.partition("</summary>")[0]
    assert told.count("<li>") == 2
    assert "needs a &lt;GPU&gt;" in told
    assert new_experiment.unavailable_line({}) == ""
