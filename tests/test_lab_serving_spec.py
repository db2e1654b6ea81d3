"""The serving section of a spec: what it means, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnlab.estimate import estimate
from attnlab.problems import SpecError
from attnlab.serving.workload import Request, TraceError, draw_requests, read_trace
from attnlab.spec import ExperimentSpec, parse_spec

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:49.5000000,10,1
"""


def document(**changed: Any) -> dict[str, Any]:
    serving = {
        "workload": {
            "requests": 9,
            "prompt_tokens": {"distribution": "uniform", "high": 20},
            "output_tokens": 5,
        },
        "num_blocks": 40,
    }
    base = {"name": "s", "module": {"dim": 16, "num_heads": 2}, "vary": {"mechanism": "multi_head"}}
    return base | {"phase": "serving", "serving": serving | changed}


def drawn(spec: ExperimentSpec) -> list[Request]:
    assert spec.serving is not None
    return draw_requests(spec.serving.workload, 0)


def problems(spec: dict[str, Any], **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec, **options)
    return str(caught.value)


def test_a_spec_is_its_own_document_and_a_run_is_a_mechanism_and_a_cache():
    given = document() | {
        "vary": {"mechanism": ["multi_head", "multi_head_latent"], "cache": ["contiguous", "paged"]}
    }
    spec = parse_spec(given)
    assert parse_spec(spec.to_dict()) == spec == parse_spec(spec.to_yaml())
    points = [
        (point.mechanism, point.parameters["cache"], point.batch_size, point.kind) for point in spec.points()
    ]
    names = ("multi_head", "multi_head_latent")
    assert points == [(name, cache, 32, "bench") for name in names for cache in ("contiguous", "paged")]
    longest = max(request.tokens for request in drawn(spec))
    assert {point.sequence_length for point in spec.points()} == {longest}
    assert (spec.repeats, spec.record) == (3, ("timing", "accuracy"))
    assert estimate(spec).runs == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_blocks": None},
            "serving.cache_bytes: exactly one of cache_bytes and num_blocks must be given, got neither",
        ),
        ({"cache_bytes": 4096}, "got both"),
        ({"num_blocks": 1}, "serving.num_blocks: must be at most 16 tokens a request here, and request"),
        ({"max_length": 7}, "serving.max_length: must be at most 7 tokens a request here"),
        ({"token_budget": 0}, "serving.token_budget: must be greater than or equal to 1, got 0"),
        (
            {"blocks": 3},
            "serving.blocks: is not a field of a spec, got 'blocks' (did you mean 'num_blocks'?)",
        ),
        ({"workload": {"requests": 3}}, "serving.workload.prompt_tokens: must be given, or a trace"),
        (
            {"workload": {"requests": 3, "prompt_tokens": 3, "output_tokens": 3, "arrivals": "poisson"}},
            "serving.workload.arrivals.rate: must be given for poisson",
        ),
        (
            {"workload": {"requests": 3, "prompt_tokens": {"low": 3}, "output_tokens": 3}},
            "serving.workload.prompt_tokens.low: is not of fixed, got 3; choices: tokens",
        ),
        (
            {"workload": {"requests": 4096, "prompt_tokens": 2000, "output_tokens": 1}, "num_blocks": 9999},
            "serving.workload: all requests together may have at most 4194304 tokens, got 8192000",
        ),
    ],
)
def test_what_is_wrong_is_said(change, words):
    assert words in problems(document(**change))


def test_what_belongs_to_other_phases_is_refused():
    wrong = document() | {
        "vary": {
            "mechanism": ["sliding_window"],
            "sequence_length": 8,
            "batch_size": 2,
            "implementation": "flex",
        },
        "record": ["maps"],
    }
    said = problems(wrong)
    for words in (
        "vary.mechanism[0]: must be one that the engine serves (pages are vary.cache), got 'sliding_window'",
        "vary.sequence_length: must not be given in phase serving",
        "vary.batch_size: must not be given in phase serving",
        "vary.implementation: must read a paged cache, got 'flex'",
        "record: is not recorded in phase serving, got 'maps'",
    ):
        assert words in said
    assert "phase: must be serving with a serving section" in problems(document() | {"phase": "decode"})
    given = {key: value for key, value in document().items() if key != "serving"}
    assert "serving: must be given with phase serving" in problems(given)


def test_a_request_beyond_the_models_context_is_refused():
    given = document(num_blocks=9999) | {"model": "smollm2-135m", "input": {"synthetic": "random"}}
    given = {key: value for key, value in given.items() if key != "module"}
    assert parse_spec(given).points()[0].model == "smollm2-135m"
    given["serving"]["workload"]["prompt_tokens"] = 8190
    assert "serving.workload: must be at most 8192 tokens a request here" in problems(given)


def test_the_public_azure_trace_is_read_with_its_own_columns(tmp_path: Path):
    rows = read_trace(AZURE)
    assert [row[1:] for row in rows] == [(374, 44), (10, 1), (396, 109)]
    assert [row[0] for row in rows] == pytest.approx([0, 2.81941, 4.314579])
    one = '{"arrival_s": 5, "prompt_tokens": 3, "output_tokens": 2}'
    lines = one + '\n\n{"arrival_s": 4.5, "prompt_tokens": 1, "output_tokens": 1}'
    assert read_trace(lines) == ((0.0, 1, 1), (0.5, 3, 2))
    (tmp_path / "trace.csv").write_text(AZURE)
    workload = {"trace": "trace.csv", "requests": 2, "time_scale": 0.5, "length_scale": 0.1}
    spec = parse_spec(document(workload=workload), folder=tmp_path)
    assert parse_spec(spec.to_dict()) == spec
    assert [request[2:] for request in drawn(spec)] == [(38, 5), (1, 1)]
    assert [request.arrival for request in drawn(spec)] == pytest.approx([0.0, 1.409705])
    assert "serving.workload.trace: files are read by the command line" in problems(
        document(workload=workload)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold at least one request"),
        ("arrival_s,prompt_tokens\n1,2\n", r"line 2: needs a column output_tokens \(or GeneratedTokens\)"),
        (
            "arrival_s,prompt_tokens,output_tokens\nsoon,2,3\n",
            "line 2: arrival_s must be seconds or a date and time",
        ),
        (
            "arrival_s,prompt_tokens,output_tokens\n1,0,3\n",
            "line 2: prompt_tokens must be a whole number from 1",
        ),
        ('{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}', "line 1: arrival_s must be finite"),
        ('{"arrival_s": 1,', "line 1: must be a JSON object"),
    ],
)
def test_a_trace_that_cannot_be_read_says_the_line(text, words):
    with pytest.raises(TraceError, match=words):
        read_trace(text)


def test_repeating_the_text_is_refused_where_prompts_do_it_anyway():
    text = {"model": "smollm2-135m", "input": {"text": "The river bank.", "repeat": True}}
    given = {key: value for key, value in document().items() if key != "module"} | text
    assert "input.repeat: has no effect in phase serving" in problems(given)
    assert parse_spec(given | {"input": {"text": "The river bank."}}).phase == "serving"
