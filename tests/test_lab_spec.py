"""A spec is read whole or refused with every problem named: argument, rule, value and choices."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnlab.bundled import BUNDLED, is_fetched
from attnlab.problems import SpecError
from attnlab.spec import MAX_RUNS, MAX_TEXT_BYTES, ExperimentSpec, RunPoint, parse_spec

GOOD: dict[str, Any] = {
    "name": "window-vs-full",
    "model": "someone/something",
    "input": {"text": "one two three four"},
    "vary": {"mechanism": ["multi_head", {"sliding_window": {"window_size": 7}}]},
}
MODULE: dict[str, Any] = {
    "name": "bare",
    "module": {"dim": 64, "num_heads": 4},
    "vary": {"mechanism": "multi_head", "sequence_length": 33},
}


def changed(base: dict[str, Any] = GOOD, /, **changes: Any) -> dict[str, Any]:
    """A spec with some fields replaced; `vary__dtype` reaches inside, None removes."""
    values = yaml.safe_load(yaml.safe_dump(base))
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = values
        for part in outer:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return values


def problems(source: Any, **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(source, **options)
    return str(caught.value)


def test_the_grid_is_every_combination_with_the_mechanism_slowest() -> None:
    spec = parse_spec(changed(vary__sequence_length=[2, 3], vary__dtype=["float32", "bfloat16"]))
    points = [(p.mechanism, p.sequence_length, p.dtype) for p in spec.points()]
    assert points == [
        (mechanism, length, dtype)
        for mechanism in ("multi_head", "sliding_window")
        for length in (2, 3)
        for dtype in ("float32", "bfloat16")
    ]


def test_a_point_holds_all_that_tells_a_run_apart() -> None:
    point = parse_spec(changed(MODULE, vary__mechanism=[{"grouped_query": {"num_kv_heads": 2}}])).points()[0]
    assert point == RunPoint(
        mechanism="grouped_query",
        parameters={"num_kv_heads": 2},
        implementation="auto",
        sequence_length=33,
        dtype="float32",
        batch_size=1,
        phase="prefill",
        model="module 64x4",
        kind="bench",
        gpus=0,
    )


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (["maps"], "inspect"),
        (["maps", "statistics", "accuracy"], "inspect"),
        (["timing"], "bench"),
        ("memory", "bench"),
    ],
)
def test_runs_that_measure_time_or_memory_are_benches(record: Any, kind: str) -> None:
    assert {point.kind for point in parse_spec(changed(record=record)).points()} == {kind}


@pytest.mark.parametrize("base", [GOOD, MODULE])
def test_a_spec_survives_yaml_and_dict(base: dict[str, Any]) -> None:
    spec = parse_spec(base)
    assert parse_spec(spec.to_yaml()) == spec
    assert parse_spec(spec.to_dict()) == spec
    assert parse_spec(spec.to_yaml()).to_yaml() == spec.to_yaml()


def test_layers_survive_yaml() -> None:
    spec = parse_spec(changed(layers=[3, 1, 1]))
    assert spec.layers == (1, 3)
    assert parse_spec(spec.to_yaml()) == spec


def test_text_with_every_kind_of_line_survives_yaml() -> None:
    text = "first\n\n  indented: yes\n# no comment\ttab\n'quote' \"double\" <script>\n\n"
    assert parse_spec(parse_spec(changed(input__text=text)).to_yaml()).input.text == text


def test_equal_experiments_hash_alike_whatever_their_name() -> None:
    first = parse_spec(GOOD)
    assert parse_spec(changed(name="other")).hash() == first.hash()
    assert parse_spec(changed(vary__implementation=["auto"])).hash() == first.hash()
    assert parse_spec(changed(seed=1)).hash() != first.hash()
    assert parse_spec(changed(input__text="one two three")).hash() != first.hash()


def test_single_values_need_no_list() -> None:
    assert parse_spec(changed(vary__dtype="bfloat16")).vary.dtype == ("bfloat16",)


def test_every_problem_is_reported_at_once() -> None:
    text = problems(
        changed(
            vary__mechanism=["multi_haed", {"sliding_window": {"window_size": 0}}],
            vary__dtype=["float23"],
            repeats=0,
            colour="red",
        )
    )
    for part in ("vary.mechanism[0]", "vary.mechanism[1]", "vary.dtype[0]", "repeats", "colour"):
        assert part in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vary__mechanism": ["multi_haed"]}, ("did you mean 'multi_head'?", "choices: ", "'multi_haed'")),
        ({"vary__mechanism": [{"sliding_window": {"window_size": 0}}]}, ("window_size", "at least 1", "0")),
        ({"vary__mechanism": [{"sliding_window": {"windowsize": 4}}]}, ("windowsize", "window_size")),
        ({"vary__mechanism": [{"a": {}, "b": {}}]}, ("must be a name or {name:",)),
        ({"vary__mechanism": []}, ("vary.mechanism", "at least one value", "empty grid")),
        ({"vary__mechanism": ["flash", "flash"]}, ("vary.mechanism", "same value twice")),
        ({"vary__implementation": ["sdpa_flsh"]}, ("did you mean 'sdpa_flash'?", "banded")),
        ({"vary__dtype": ["float64"]}, ("vary.dtype", "float64 is for bare modules")),
        ({"vary__sequence_length": [0]}, ("vary.sequence_length[0]", "greater than or equal to 1")),
        ({"vary__sequence_length": ["512"]}, ("vary.sequence_length[0]", "integer", "'512'")),
        ({"vary__batch_size": [True]}, ("vary.batch_size[0]", "integer")),
        ({"vary__mechansm": ["flash"]}, ("vary.mechansm", "not a field", "did you mean 'mechanism'?")),
        ({"phase": "decoding"}, ("phase", "prefill, decode, train")),
        ({"record": ["map"]}, ("record[0]", "did you mean 'maps'?")),
        ({"layers": [-1]}, ("layers", "zero-based", "[-1]")),
        ({"layers": "first"}, ("layers", "'first'")),
        ({"layers": []}, ("layers", "[]")),
        ({"name": ""}, ("name",)),
        ({"vary": None}, ("vary", "must be given")),
        ({"model": None}, ("exactly one of model and module", "neither")),
        ({"module": {"dim": 8, "num_heads": 2}}, ("exactly one of model and module", "both")),
        ({"model": "smollm"}, ("model", "'smollm'", "did you mean 'smollm2-135m'?", "rxnmapper")),
        ({"model": "/no/such/folder"}, ("model", "'/no/such/folder'", "local folder")),
        ({"input__text": " \n "}, ("input.text", "empty")),
        ({"input__text": None}, ("input", "exactly one of text, file, image, audio and synthetic", "none")),
        ({"input__synthetic": "random"}, ("input", "exactly one of", "text and synthetic")),
        (
            {"input__text": "é" * (MAX_TEXT_BYTES // 2 + 1)},
            ("input.text", f"{MAX_TEXT_BYTES} bytes", "1000002"),
        ),
        ({"input__repeat": True}, ("input.repeat", "needs vary.sequence_length")),
        (
            {"input": {"synthetic": "random", "repeat": True}, "vary__sequence_length": [64]},
            ("input.repeat: is for text input", "drawn to the length", "got true", "choices: false"),
        ),
        ({"input__file": "/etc/passwd", "input__text": None}, ("input.file", "command line", "/etc/passwd")),
        ({"resources__gpus": -1}, ("resources.gpus",)),
        ({"seed": 1.5}, ("seed", "integer")),
    ],
)
def test_what_is_wrong_is_said_with_the_choices(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    text = problems(changed(**changes))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"module__num_heads": 5}, ("module.num_heads", "must divide dim (64)", "5", "4, 8")),
        ({"module__num_kv_heads": 3}, ("module.num_kv_heads", "must divide num_heads (4)", "3", "1, 2, 4")),
        ({"vary__mechanism": [{"grouped_query": {"num_kv_heads": 3}}]}, ("num_kv_heads", "divide", "3")),
        ({"vary__sequence_length": None}, ("vary.sequence_length", "must be given for a bare module")),
        ({"input": {"text": "words"}}, ("input", "synthetic input only", "text")),
        ({"input": {"repeat": True}}, ("input.repeat: is for text input", "got true", "choices: false")),
        ({"input": {"max_tokens": 9}}, ("input.max_tokens: is for text input", "length of the run", "got 9")),
        ({"layers": [1]}, ("layers", "one layer")),
        (
            {"vary__sequence_length": [1 << 20], "vary__batch_size": [5]},
            ("batch_size x sequence_length", "5242880"),
        ),
    ],
)
def test_bare_modules_have_rules_of_their_own(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    text = problems(changed(MODULE, **changes))
    for part in parts:
        assert part in text


def test_a_grid_too_large_is_refused_with_its_size() -> None:
    text = problems(changed(vary__sequence_length=list(range(1, MAX_RUNS + 2))))
    assert f"at most {MAX_RUNS} runs, got {2 * (MAX_RUNS + 1)}" in text


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("name: [1, 2\nmodel: x", ("must be YAML", "line 2")),
        ("name: a\n\tmodel: x", ("must be YAML", "line 2", "column 1")),
        ("name: a\nname: b", ("must be YAML", "'name' is given twice", "line 2")),
        ("a: &x [1]\nb: *x", ("aliases", "line 2")),
        ("- 1", ("must be a mapping", "name, model")),
        ("", ("must be a mapping",)),
        ("a: !!python/object:os.system x", ("must be YAML", "line 1")),
        ("[" * 5000, ("must be YAML",)),
        ("when: 2024-13-45", ("must be YAML", "month")),
        (b"\xff\xfe\x00", ("UTF-8", "byte 0")),
        ("x" * 2_000_001, ("at most 2000000 bytes", "2000001")),
    ],
)
def test_broken_documents_name_the_line(source: Any, parts: tuple[str, ...]) -> None:
    text = problems(source)
    for part in parts:
        assert part in text


def test_a_problem_is_data_too() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(changed(vary__dtype=["float23"]))
    (problem,) = caught.value.problems
    assert problem.to_dict() == {
        "argument": "vary.dtype[0]",
        "rule": "must be one of the choices",
        "value": "'float23'",
        "choices": ["float32", "float16", "bfloat16", "float64"],
        "suggestion": "float32",
    }


@pytest.mark.parametrize("value", ["{rule}", "%s {0}", "<script>alert(1)</script>", "x" * 5000, "\u202e"])
def test_hostile_values_stay_values(value: str) -> None:
    text = problems(changed(phase=value))
    assert "phase: must be one of the choices" in text
    assert len(text) < 400


def test_a_file_is_read_relative_to_where_the_spec_lies(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("from a file", encoding="utf-8")
    source = changed(input={"file": "text.txt"})
    spec = parse_spec(source, folder=tmp_path)
    assert (spec.input.text, spec.input.file) == ("from a file", None)
    (tmp_path / "bytes").write_bytes(b"\xff\xff")
    assert "UTF-8" in problems(changed(input={"file": "bytes"}), folder=tmp_path)
    assert "No such file" in problems(changed(input={"file": "none.txt"}), folder=tmp_path)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)
    assert "input.file: must be at most 1000000 bytes" in problems(
        changed(input={"file": "huge"}), folder=tmp_path
    )
    (tmp_path / "empty").touch()
    assert "input.text: must not be empty" in problems(changed(input={"file": "empty"}), folder=tmp_path)


def test_what_the_models_config_says_holds(tmp_path: Path) -> None:
    config = '{"num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 8}'
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    base = changed(model=str(tmp_path))
    assert "layers: must be at most 2" in problems(changed(base, layers=[3]))
    assert "context" in problems(changed(base, vary__sequence_length=[9]))
    assert "context" in problems(changed(base, input__max_tokens=9))
    long = problems(changed(base, input__text="w " * 9))
    assert "input.text: must be at most 8 tokens" in long
    assert "got at least 9 tokens" in long
    assert "divide the 6 heads" in problems(
        changed(base, vary__mechanism=[{"grouped_query": {"num_kv_heads": 4}}])
    )
    assert parse_spec(changed(base, input__text="w " * 9, input__max_tokens=8, layers=[0, 2]))


@pytest.mark.model
@pytest.mark.model
def test_the_text_is_counted_where_the_tokenizer_is() -> None:
    if not is_fetched("rxnmapper"):
        pytest.skip("rxnmapper is not fetched: attnlab models fetch rxnmapper")
    base = changed(model="rxnmapper", input__text=BUNDLED["rxnmapper"].sample)
    assert {point.sequence_length for point in parse_spec(base).points()} == {23}
    assert {point.sequence_length for point in parse_spec(changed(base, input__max_tokens=9)).points()} == {9}
    text = problems(changed(base, vary__sequence_length=[24]))
    assert "at most the text's 23 tokens" in text
    assert "input.repeat" in text
    assert parse_spec(changed(base, vary__sequence_length=[24], input__repeat=True))
    assert "got 602 tokens" in problems(changed(base, input__text="C" * 600))


def test_reading_specs_needs_no_torch() -> None:
    code = (
        "import sys; from attnlab.spec import parse_spec; from attnlab import bundled, inputs;"
        f"parse_spec({GOOD!r}).points();"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_spec_cannot_be_changed() -> None:
    spec = parse_spec(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]
    assert isinstance(spec, ExperimentSpec)
