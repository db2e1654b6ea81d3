"""The static panel that is shipped: of the code that is here, and every row within its bounds."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from attnlab_kernels import static_kernels
from attnlab_kernels.static_facts import BLOCK_SHARED, CAPABILITIES, StaticCase
from attnlab_kernels.static_kernels import REGISTRY, case_key, cases

LARGEST_BOUND = 32
# 256 dimensions and the rows of a window, or float32 sums for two keys and values of 256, lie in registers at once
LARGEST_BOUND_OF = {"differential key gradient": 96} | {
    f"neighborhood {kind}": 64 for kind in ("forward", "query gradient", "key gradient")
}


@pytest.fixture(scope="module")
def panel() -> dict[str, Any]:
    return json.loads(resources.files("attnlab_kernels").joinpath("static_panel.json").read_text())


def keys(panel: dict[str, Any], listed: Any) -> dict[str, StaticCase]:
    compiler = panel["versions"]["triton"]
    return {
        case_key(case, capability, compiler): case
        for capability in CAPABILITIES
        for _, case in listed(capability)
    }


def ours(panel: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in panel["rows"] if row["operation"] in REGISTRY]


def test_the_shipped_panel_is_of_these_kernels_in_these_forms(panel):
    every, shipped = keys(panel, cases), {row["key"] for row in ours(panel)}
    stale = [f"{row['kernel']}: {row['form']}" for row in ours(panel) if row["key"] not in every]
    again = "compile them: python -m attnlab_kernels.static_kernels --every-form --resume static_panel.json"
    assert not stale, again
    assert not every.keys() - shipped, again


def test_every_compiled_form_is_within_its_bound_of_spills_and_the_card(panel):
    by_key = keys(panel, cases)
    assert ours(panel)
    for row in ours(panel):
        where = f"sm_{row['capability']} {row['kernel']}, {row['form']}: {row['facts']} {row['error']}"
        facts, case = row["facts"], by_key[row["key"]]
        assert row["error"] is None, where
        assert facts["stack_bytes"] <= row["spill_bound"], where
        assert facts["local_bytes"] == 0, where
        assert 0 < facts["registers"] <= 255, where
        assert facts["shared_bytes"] <= BLOCK_SHARED[row["capability"]], where
        assert facts["blocks_per_core"] >= 1, where
        assert not case.tensor_cores or case.dtype != "bf16" or facts["matrix_count"], where


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_form_has_a_bound_above_the_one_that_is_stated(capability):
    for _, case in cases(capability):
        assert case.spill_bound <= LARGEST_BOUND_OF.get(case.kernel, LARGEST_BOUND), case.kernel


def test_a_key_changes_with_the_code_and_not_with_a_comment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = '"""A module."""\nimport math\n\n\ndef half(x):\n    """Halve."""\n    return x / 2\n'

    def code(name: str, text: str) -> str:
        Path(tmp_path / f"{name}.py").write_text(text)
        return static_kernels.code_of(name)

    first = code("first_form", source)
    assert code("commented", source.replace("Halve.", "Divide.").replace("x / 2", "x / 2  # two")) == first
    assert code("changed", source.replace("x / 2", "x / 3")) != first


def test_a_walk_that_was_cut_off_is_taken_up_and_loses_nothing(monkeypatch):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    made: list[str] = []
    monkeypatch.setattr(static_kernels.static_flash4, "installed", lambda: None)
    monkeypatch.setattr(static_kernels, "_attempt", lambda make: {"facts": len(made), "error": None})
    saved: list[dict[str, Any]] = []

    def walk(known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        keep = lambda kernel: kernel.startswith("sparse")  # noqa: E731
        return static_kernels.walk((90,), keep=keep, tell=made.append, known=known, save=saved.append)

    whole = walk({})
    assert len(whole["rows"]) == len(made) == len(saved)
    cut = {row["key"]: row for row in saved[2]["rows"]}
    made.clear()
    again = walk(cut)
    assert len(made) == len(whole["rows"]) - 3
    assert [row["key"] for row in again["rows"]] == [row["key"] for row in whole["rows"]]
    made.clear()
    assert walk({row["key"]: row for row in whole["rows"]})["rows"] == whole["rows"]
    assert not made


def test_a_walk_without_flash_attn_4_keeps_the_rows_of_one_that_had_it(monkeypatch):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    monkeypatch.setattr(static_kernels.static_flash4, "installed", lambda: None)
    row = {"key": "k", "operation": "flash-attn 4", "kernel": "flash-attn 4 forward"} | {
        "facts": {},
        "error": None,
    }
    kept = static_kernels.walk((90,), keep=lambda kernel: False, known={"k": row})
    assert (kept["rows"], kept["notes"]) == ([row], [])
    assert static_kernels.walk((90,), keep=lambda kernel: False)["notes"]
