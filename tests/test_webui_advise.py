"""The Advise page and command without a browser: what they say, and what they refuse."""

import html
import json
import re

import pytest
from typer.testing import CliRunner

from attnlab.advise import Answers, ModelShape, advise
from attnlab.documents import read_document
from attnlab_storage.listing import count_runs
from attnlab_webui import advise_view, new_experiment
from attnlab_webui.advise_query import Asked, asked_of, default_asked
from attnlab_webui.cli import app
from attnlab_webui.commands import advise as command
from attnlab_webui.pages import advise as page

LATENCY = Asked(Answers("serving", 4096, "latency"), ModelShape(2, 8, 2, 16, "float16", 4096, 5), "cpu")


@pytest.fixture
def attnlab():
    return lambda *arguments, stdin=None: CliRunner().invoke(app, list(arguments), input=stdin)


def test_an_address_says_everything_that_was_asked(sqlite_store):
    query = dict(pair.split("=") for pair in LATENCY.query().split("&"))
    assert asked_of(query, default_asked(sqlite_store)) == LATENCY


def test_fields_show_what_was_asked_and_read_it_back(sqlite_store):
    assert page.read_fields(sqlite_store, tuple(page.field_values(LATENCY))) == LATENCY


def test_only_the_follow_up_of_the_goal_counts_and_shows(sqlite_store):
    values = page.field_values(Asked(Answers("vision", 8192, task="video")))
    assert page.read_fields(sqlite_store, tuple(values)).answers == Answers("vision", 8192, task="video")
    shown = page.on_answer(sqlite_store, *values)
    assert [update["visible"] for update in shown[-3:]] == [False, True, False]


@pytest.mark.parametrize("goal", [None, "<script>"])
def test_an_address_that_cannot_be_read_is_said_and_the_page_still_works(sqlite_store, goal):
    shown = page.on_load(sqlite_store, {"goal": goal} if goal else {"heads": "<script>", "goal": "edge"})
    assert "cannot be read" in shown[12]
    assert not [part for part in shown if isinstance(part, str) and "<script>" in part]
    assert "at-part" in shown[13]


def test_an_address_without_the_follow_up_asks_it_and_an_answer_brings_the_advice(sqlite_store):
    shown = page.on_load(sqlite_store, {"goal": "vision", "context": "4k"})
    fields, words = shown[:12], shown[12]
    assert fields[:4] == ["vision", "memory", None, "novel"]
    assert "What is the task? Choose an answer" in html.unescape(words)
    assert "at-notice-info" in words
    assert shown[13:16] == ["", "", ""]
    assert [update["visible"] for update in shown[-3:]] == [False, True, False]
    assert shown[16] == {"interactive": False, "__type__": "update"}
    fields[2] = "video"
    answered = page.on_answer(sqlite_store, *fields)
    assert answered[0] == ""
    assert "at-part" in answered[1]


def test_a_field_that_breaks_a_rule_is_named_and_nothing_can_be_queued(sqlite_store):
    values = page.field_values(LATENCY)
    values[page.NAMES.index("kv_heads")] = 3
    shown = page.on_answer(sqlite_store, *values)
    assert "kv_heads must divide heads (8)" in shown[0]
    assert shown[4] == {"interactive": False, "__type__": "update"}
    assert "kv_heads must divide" in page.on_queue(sqlite_store, *values)
    assert count_runs(sqlite_store) == 0


def test_the_experiment_of_an_advice_is_queued(sqlite_store):
    told = page.on_queue(sqlite_store, *page.field_values(LATENCY))
    assert "6 runs are queued" in told
    assert count_runs(sqlite_store) == 6


def test_new_experiment_opens_with_the_advised_one(sqlite_store):
    query = {"advice": "1"} | dict(pair.split("=") for pair in LATENCY.query().split("&"))
    text, notice = new_experiment.first_text(sqlite_store, query)
    assert read_document(text) == LATENCY.advice().experiment
    assert "fewer key heads" in notice
    _, notice = new_experiment.first_text(sqlite_store, query | {"scarce": "<b>"})
    assert "cannot be read" in notice
    assert "<b>" not in notice


def test_the_page_shows_parts_reason_avoided_bytes_and_sources():
    found = LATENCY.advice()
    text = html.unescape(
        advise_view.recommendation(found) + advise_view.cache_panel(found) + advise_view.sources(found)
    )
    assert found.leaf.reason in text
    for avoid in found.leaf.avoid:
        assert avoid.why in text
    assert "5.2 MB" in text  # grouped-query: 2 layers x 2 x 2 heads x 16 x 2 bytes x 4096 tokens x 5
    assert "https://arxiv.org/abs/2305.13245" in text
    assert re.findall(r"width:(100\.00)%", text)


def test_the_row_of_the_reader_is_marked():
    table = advise_view.lengths_table(LATENCY.advice())
    assert table.count("←") == 1
    assert "<b>4K to 16K</b> ←" in table


def test_the_command_prints_one_document(attnlab):
    result = attnlab("advise", "--goal", "training", "--context", "64k", "--shape", "qwen2.5-7b", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["mechanisms"] == ["grouped_query", "sparse"]
    assert document["shape"]["kv_heads"] == 4
    assert document["shape"]["context"] == 65536


def test_the_command_says_it_in_words(attnlab):
    result = attnlab("advise", "--goal", "serving", "--scarce", "batch", "--heads", "16", "--kv-heads", "2")
    assert result.exit_code == 0, result.stderr
    for words in ("PagedAttention", "Chunked prefill", "12.50%", "Not so:", "vary:", "16 heads over 2"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "goal must be one of training"),
        (("--goal", "serving"), "scarce must be one of memory"),
        (("--goal", "edge", "--shape", "gpt-9"), "--shape must be a known model"),
        (("--goal", "edge", "--scale", "tpu"), "--scale must be cpu, gpu or auto"),
        (("--goal", "training", "--context", "long"), "context must be a number of tokens"),
        (("--goal", "edge", "--kv-heads", "5"), "kv_heads must divide heads (32)"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(attnlab, arguments, words):
    result = attnlab("advise", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr


def test_on_a_terminal_every_question_is_asked(monkeypatch):
    answers = iter([2, 3])
    monkeypatch.setattr(command.typer, "prompt", lambda *args, **options: next(answers))
    assert command.ask(Answers()) == Answers("serving", scarce="long_context")
    answers = iter([1, "64k"])
    assert advise(command.ask(Answers())).leaf.key == "training/32k_to_128k"
