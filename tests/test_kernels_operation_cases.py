"""The cases that ``benchmarks/operations.py`` builds: what was asked for, and nothing beside it."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "operation_cases.py"


@pytest.fixture(scope="module")
def benchmark():
    found = importlib.util.spec_from_file_location("operation_cases", PATH)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # its dataclasses look themselves up
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


def options(words: list[str] | None) -> argparse.Namespace:
    return argparse.Namespace(lengths=[256], heads=1, head_dim=4, dtype="float32", flex=False, cases=words)


@pytest.mark.parametrize(("words", "count"), [(["decoding"], 1), (["full", "linear"], 2), (["no such"], 0)])
def test_only_the_cases_that_were_asked_for_are_built(benchmark, words, count, monkeypatch):
    made: list[int] = []
    draw = torch.randn

    def listened(size, **given):
        made.append(size[2])
        return draw(size, **given)

    monkeypatch.setattr(benchmark.torch, "randn", listened)
    names = [case.name for case in benchmark.cases(options(words), torch.device("cpu"))]
    assert len(names) == count
    assert all(any(word in name for word in words) for name in names)
    assert len(made) == 3 * count  # q, k and v of each


def test_every_case_agrees_with_its_baseline(benchmark):
    torch.manual_seed(0)
    names = set()
    with torch.no_grad():
        for case in benchmark.cases(options(None), torch.device("cpu")):
            want = case.theirs[case.right]()
            found = case.ours["auto"]()
            torch.testing.assert_close(
                found, want, atol=1e-5, rtol=1e-5, msg=lambda text, case=case: f"{case.name}: {text}"
            )
            names.add(case.name)
    assert len(names) == 15
