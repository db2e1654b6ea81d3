"""A needle stands in the haystack where the spec says, and a run measures who retrieves it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from attnlab.problems import SpecError
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_storage import results
from attnlab_storage.database import Store

WORDS = ["lorem", "ipsum", "dolor", "sit", "the", "code", "is", "gold", "which", "?", "<unk>"]


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small random Llama that reads words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("models") / "worded"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def spec_of(model: str, depth: float = 0.5, length: int = 24, **changes: Any) -> dict[str, Any]:
    needle = {"sentence": "the code is gold", "depth": depth, "question": "which code ?"}
    return {
        "name": "needle",
        "model": model,
        "input": {"text": "lorem ipsum dolor sit", "repeat": True, "needle": needle},
        "vary": {"mechanism": ["multi_head"], "sequence_length": [length]},
        "record": ["statistics"],
    } | changes


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 6), (1.0, 13)])
def test_the_needle_stands_at_its_depth_and_is_the_answer(
    sqlite_store: Store, worded: str, depth: float, place: int
) -> None:
    experiment = run_here(sqlite_store, parse_spec(spec_of(worded, depth)))
    (run,) = results.runs_of(sqlite_store, experiment_id=experiment)
    assert (run.state, run.reason) == ("succeeded", None)
    given = results.run_input(sqlite_store, run.id)
    assert given is not None
    words = ["lorem", "ipsum", "dolor", "sit"] * 4
    hidden = ["the", "code", "is", "gold"]
    wanted = [*words[:place], *hidden, *words[place:13], "which", "code", "?", *hidden]
    assert given.key_tokens == wanted
    assert len(wanted) == 24
    assert (given.detail or {})["needle"] == {"keys": [place, place + 4], "answer": [20, 24], "depth": depth}
    for name in ("needle_mass", "retrieval"):
        rows = results.measurements(sqlite_store, run.id, name)
        assert len(rows) == 2
        assert all(0 <= row.value <= 1 for row in rows)
    assert results.measurements(sqlite_store, run.id, "needle_mass")[0].value > 0


@pytest.mark.parametrize(
    ("length", "repeat", "says"),
    [(11, True, "must be at least 12 for this needle, got 11"), (24, False, "must be at most 15 for this text")],
)  # fmt: skip
def test_a_haystack_that_does_not_fit_is_refused(
    sqlite_store: Store, worded: str, length: int, repeat: bool, says: str
) -> None:
    values = spec_of(worded, length=length)
    values["input"]["repeat"] = repeat
    experiment = run_here(sqlite_store, parse_spec(values))
    (run,) = results.runs_of(sqlite_store, experiment_id=experiment)
    assert run.state == "failed"
    assert says in (run.reason or "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"input": {"synthetic": "random", "needle": {"sentence": "x"}}},
            "input.needle must have a haystack",
        ),
        ({"vary": {"mechanism": ["multi_head"]}}, "input.needle needs vary.sequence_length"),
        ({"phase": "decode"}, "phase must be prefill with input.needle"),
        ({"input": {"text": "x", "needle": {"sentence": "x", "depth": 2}}}, "input.needle.depth"),
        ({"input": {"text": "x", "needle": {"sentence": "x", "color": 2}}}, "sentence"),
    ],
)
def test_a_needle_that_cannot_be_hidden_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec(spec_of("smollm2-135m") | changes)
    assert says in str(refused.value).replace(":", "")


def test_a_spec_with_a_needle_reads_back() -> None:
    spec = parse_spec(spec_of("smollm2-135m"))
    assert parse_spec(spec.to_dict()) == spec
    assert parse_spec(spec.to_yaml()).hash() == spec.hash()
