"""What a run records as the kernels that ran tells one implementation from another, so no fallback can hide."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from attnlab.probes.timing import kernels_that_ran
from attnlab_kernels.masks import Causal, Window
from attnlab_kernels.operations.softmax.api import attend

OPERATIONS = Path(__file__).parent.parent / "kernels/attnlab_kernels/operations"
FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
# what must be among the names, and what must not
MARKS = {
    "eager": ("aten::bmm", "scaled_dot_product"),
    "sdpa_math": ("aten::_scaled_dot_product_attention_math", FUSED),
    "sdpa_flash": (FUSED, "attention_math"),
    "flex": ("FlexAttention", "scaled_dot_product"),
    "banded": (FUSED, "attention_math"),
}


@pytest.mark.parametrize("name", MARKS)
def test_the_names_recorded_on_a_cpu_identify_the_implementation(name):
    q, k = torch.randn(1, 4, 256, 32), torch.randn(1, 2, 256, 32)
    mask = Window(31) if name == "banded" else Causal()
    names = kernels_that_ran(lambda: attend(q, k, k, mask=mask, implementation=name), torch.device("cpu"))
    there, absent = MARKS[name]
    assert any(there in entry for entry in names), names
    assert not any(absent in entry for entry in names), names


def test_no_two_triton_kernels_of_ours_share_a_name_in_a_profile():
    names: list[str] = []
    for path in sorted(OPERATIONS.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names += [
                    node.name for mark in node.decorator_list if ast.unparse(mark).startswith("triton.jit")
                ]
    assert len(names) >= 17
    assert len(set(names)) == len(names)
