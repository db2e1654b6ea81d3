"""A run in a terminal: its figures, how sure they are and what has to be known of them."""

from typing import Any

import pytest

from attnlab.describe import run_document
from attnlab_webui.commands.run_words import run_words


@pytest.fixture
def document(traced) -> dict[str, Any]:
    return run_document(traced.store, traced.run_ids[0])


def line(words: str, name: str) -> str:
    (found,) = [row for row in words.splitlines() if row.startswith(f"{name} ")]
    return found.removeprefix(name).strip()


def test_a_time_stands_beside_its_interval(document):
    whole, attention = run_words(document), document["attention_latency_ms"]
    assert line(whole, "attention") == "0.25 ms median, 95 % 0.2 to 0.3"
    few = attention | {"samples": attention["samples"][:2]}
    assert line(run_words(document | {"attention_latency_ms": few}), "attention") == "0.25 ms median"


def test_what_disturbed_a_time_is_said(document):
    assert "conditions" not in run_words(document)
    detail = {"conditions": {"disturbed": ["other processes kept 1.4 of 2 cores busy"]}}
    disturbed = document | {"latency_ms": document["latency_ms"] | {"detail": detail}}
    assert line(run_words(disturbed), "conditions") == "disturbed: other processes kept 1.4 of 2 cores busy"


def test_a_withheld_speed_says_why(document):
    hidden = document | {"latency_ms": None, "speed_withheld": "incorrect: off by 0.1"}
    words = run_words(hidden)
    assert (line(words, "state"), line(words, "latency")) == ("incorrect", "-")
    assert line(words, "withheld") == "incorrect: off by 0.1"


def test_a_served_run_shows_rates_and_waits_in_the_place_of_a_latency(document):
    serving = {
        "output_tokens_per_second": {"value": 412.34},
        "time_to_first_token": {"value": 31.5},
        "inter_token_latency": {"value": 4.25},
    }
    words = run_words(document | {"serving": serving})
    assert line(words, "tokens written") == "412 a second"
    assert (line(words, "first token"), line(words, "between tokens")) == ("31.5 ms", "4.25 ms")
    assert "latency " not in words


def test_a_search_shows_the_longest_that_fits(document):
    found = {"fits": 12_288, "memory_bytes": 2_000_000_000}
    assert line(run_words(document | {"frontier": found}), "longest") == "12,288 tokens fit 2.0 GB"
