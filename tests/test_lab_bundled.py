"""Bundled models arrive verified and whole, or not at all."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from attnlab import bundled, convert
from attnlab.bundled import BUNDLED, FetchError, describe_model, fetch, is_fetched, local_folder, model_folder
from attnlab.inputs import count_tokens, encode_text, open_tokenizer, token_strings

NAME = "rxnmapper"


@pytest.fixture
def empty_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder in place of the user's."""
    monkeypatch.setenv("ATTNLAB_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def pip_gives(monkeypatch: pytest.MonkeyPatch, members: dict[str, str]) -> None:
    """Let pip deliver a small wheel with these members, and pin its sha256."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "pip" not in command:
            return real(command, **options)
        wheel = Path(command[command.index("--dest") + 1]) / "rxnmapper-0.4.3-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in members.items():
                archive.writestr(zipfile.ZipInfo(name), text)
        return subprocess.CompletedProcess(command, 0, "", "")

    real = subprocess.run
    monkeypatch.setattr(bundled.subprocess, "run", run)
    monkeypatch.setattr(bundled, "_verify", lambda model, wheel: None)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_wheel_with_another_hash_is_refused(empty_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bundled._verify
    pip_gives(monkeypatch, {"rxnmapper/x": "not it"})
    monkeypatch.setattr(bundled, "_verify", real)
    with pytest.raises(FetchError, match=rf"sha256 .* must be {BUNDLED[NAME].sha256}, got"):
        fetch(NAME, progress=lambda line: None)
    assert left_over(empty_models) == []


def test_what_pip_says_is_passed_on(empty_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 1, "", "WARNING: a\n\nERROR: No matching distribution\n")
    monkeypatch.setattr(bundled.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(
        FetchError, match=r"rxnmapper: pip could not download rxnmapper==0.4.3: .*No matching"
    ):
        fetch(NAME, progress=lambda line: None)
    assert left_over(empty_models) == []


def test_pip_is_asked_for_the_pinned_wheel_alone(empty_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        requirement = Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")
        asked.append((command, requirement))
        return subprocess.CompletedProcess(command, 1, "", "stop")

    monkeypatch.setattr(bundled.subprocess, "run", run)
    with pytest.raises(FetchError):
        fetch(NAME, progress=lambda line: None)
    (command, requirement), *_ = asked
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert requirement == f"rxnmapper==0.4.3 --hash=sha256:{BUNDLED[NAME].sha256}\n"


@pytest.mark.parametrize("evil", ["../evil", "/tmp/evil", "rxnmapper/models/../../../evil"])
def test_no_member_leaves_the_folder(evil: str, empty_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = BUNDLED[NAME].source
    pip_gives(monkeypatch, {f"{source}/config.json": "{}", evil: "x", f"{source}/../{evil}": "x"})
    seen: list[list[str]] = []

    def stop(_model: Any, folder: Path, _finished: Path) -> None:
        seen.append(left_over(folder))
        raise FetchError("stopped")

    monkeypatch.setattr(bundled, "_convert", stop)
    with pytest.raises(FetchError, match="stopped"):
        fetch(NAME, progress=lambda line: None)
    assert seen == [["config.json"]]
    assert not any(path.name == "evil" for path in empty_models.parent.rglob("*"))
    assert left_over(empty_models) == []


def test_a_conversion_that_fails_leaves_nothing(empty_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_gives(monkeypatch, {f"{BUNDLED[NAME].source}/config.json": "{}"})
    with pytest.raises(FetchError, match=r"rxnmapper: conversion failed: .*pytorch_model.bin"):
        fetch(NAME, progress=lambda line: None)
    assert not is_fetched(NAME)
    assert left_over(empty_models) == []


def test_a_half_copy_is_not_taken_for_the_model(empty_models: Path) -> None:
    folder = model_folder(NAME)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert not is_fetched(NAME)
    assert local_folder(NAME) is None
    marker = {"wheel_sha256": BUNDLED[NAME].sha256, "conversion": bundled.CONVERSION - 1}
    (folder / bundled.MARKER).write_text(json.dumps(marker), encoding="utf-8")
    assert not is_fetched(NAME)


def test_an_older_conversion_is_replaced_whole(empty_models: Path, tmp_path: Path) -> None:
    folder, finished = model_folder(NAME), tmp_path / "finished"
    folder.mkdir(parents=True)
    (folder / "old").touch()
    finished.mkdir()
    marker = {"wheel_sha256": BUNDLED[NAME].sha256, "conversion": bundled.CONVERSION}
    (finished / bundled.MARKER).write_text(json.dumps(marker), encoding="utf-8")
    bundled._publish(NAME, finished, folder)
    assert left_over(folder) == [bundled.MARKER]
    # a second one that finishes later changes nothing and raises nothing
    finished.mkdir()
    bundled._publish(NAME, finished, folder)
    assert is_fetched(NAME)


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match="unknown bundled model 'gpt5'; choices: smollm2-135m, minilm-l6, rxnmapper"
    ):
        fetch("gpt5")


@pytest.mark.model
@pytest.mark.parametrize("name", BUNDLED)
def test_the_table_agrees_with_the_converted_config(name: str) -> None:
    if not is_fetched(name):
        pytest.skip(f"{name} is not fetched: attnlab models fetch {name}")
    told, read = BUNDLED[name].facts, describe_model(str(model_folder(name)))
    assert read is not None
    for field in ("layers", "heads", "kv_heads", "head_dim", "hidden", "context", "causal"):
        assert getattr(read, field) == getattr(told, field), field
    size = sum(path.stat().st_size for path in model_folder(name).iterdir())
    assert size == pytest.approx(BUNDLED[name].disk_bytes, rel=0.1)


@pytest.mark.model
def test_a_converted_folder_holds_no_pickle_and_says_its_hash() -> None:
    if not is_fetched(NAME):
        pytest.skip(f"{NAME} is not fetched: attnlab models fetch {NAME}")
    folder = model_folder(NAME)
    assert left_over(folder) == ["attnlab.json", "config.json", "model.safetensors", "tokenizer.json"]
    marker = json.loads((folder / "attnlab.json").read_text(encoding="utf-8"))
    weights = (folder / "model.safetensors").read_bytes()
    assert marker["weights_sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.model
def test_fetching_again_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_fetched(NAME):
        pytest.skip(f"{NAME} is not fetched: attnlab models fetch {NAME}")
    monkeypatch.setattr(bundled.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    lines: list[str] = []
    assert fetch(NAME, progress=lines.append) == model_folder(NAME)
    assert lines == [f"{NAME}: already in {model_folder(NAME)}"]


def test_smiles_are_cut_into_atoms_and_bonds() -> None:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "C",
        "c",
        "Cl",
        "(",
        ")",
        "=",
        "O",
        ">>",
        "1",
        "[NH3+]",
        "%12",
    ]
    tokenizer = convert._smiles_tokenizer(words)
    tokens = encode_text(tokenizer, "C(=O)Cl>>c1[NH3+]%12[Xe]")
    assert tokens.strings == (
        "[CLS]", "C", "(", "=", "O", ")", "Cl", ">>", "c", "1", "[NH3+]", "%12", "[UNK]", "[SEP]",
    )  # fmt: skip


def test_cutting_keeps_the_special_tokens_at_the_end() -> None:
    tokenizer = convert._smiles_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "O"])
    whole = encode_text(tokenizer, "CCOOC")
    assert (whole.strings, whole.cut) == (("[CLS]", "C", "C", "O", "O", "C", "[SEP]"), 0)
    cut = encode_text(tokenizer, "CCOOC", 4)
    assert (cut.strings, cut.cut) == (("[CLS]", "C", "C", "[SEP]"), 3)
    longer = encode_text(tokenizer, "CCOOC", 99)
    assert longer == whole
    repeated = encode_text(tokenizer, "CO", 7, repeat=True)
    assert (repeated.strings, repeated.cut) == (("[CLS]", "C", "O", "C", "O", "C", "[SEP]"), 0)


@pytest.mark.model
def test_tokens_of_bytes_say_what_they_are() -> None:
    if not is_fetched("smollm2-135m"):
        pytest.skip("smollm2-135m is not fetched: attnlab models fetch smollm2-135m")
    tokenizer = open_tokenizer(model_folder("smollm2-135m"))
    assert tokenizer is not None
    text = "The animal\n naïve 𓀀 <script>"
    strings = token_strings(tokenizer, tokenizer.encode(text).ids)
    assert strings[:3] == ("The", " animal", "\n")
    assert any(part.startswith("<0x") for part in strings)
    rebuilt = b"".join(
        bytes.fromhex("".join(part[1:-1].split("><0x")).replace("0x", ""))
        if part.startswith("<0x")
        else part.encode()
        for part in strings
    )
    assert rebuilt.decode() == text
    assert count_tokens("smollm2-135m", text) == len(strings)


def test_a_model_that_is_nowhere_is_not_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert describe_model("nobody/nothing") is None
    assert describe_model(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    assert describe_model(str(tmp_path)) is None


def test_a_hub_id_is_described_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--thing"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    config = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_positions": 64,
        "architectures": ["GPT2LMHeadModel"],
    }
    (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
    facts = describe_model("some/thing")
    assert facts is not None
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim, facts.context, facts.causal) == (
        2,
        4,
        4,
        8,
        64,
        True,
    )


@pytest.mark.model
@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("name", BUNDLED)
def test_another_user_may_read_the_weights(name: str) -> None:
    if not is_fetched(name):
        pytest.skip(f"{name} is not fetched: attnlab models fetch {name}")
    for path in model_folder(name).iterdir():
        assert path.stat().st_mode & stat.S_IROTH, path.name
