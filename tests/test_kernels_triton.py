"""Our Triton kernel without a GPU: right under the interpreter, and compiled for three generations of cards.

Both need a fresh process, because triton decides at import whether a kernel is interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from attnlab_kernels.masks import Causal
from attnlab_kernels.operations.softmax.api import supports
from attnlab_kernels.static_facts import BLOCK_SHARED

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "words", "least"),
    [
        (("softmax",), "triton or maximum or gqa or newest", 200),
        (("modifiers", "triton_laws"), "triton_laws or (triton and (everything or sinks))", 45),
    ],
    ids=["attend", "modifiers, gradients, packed, paged"],
)
def test_the_kernels_obey_every_law_under_the_interpreter(files, words, least, tmp_path):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    report = tmp_path / "report.xml"
    paths = [str(HERE / f"test_kernels_{name}.py") for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", words, *paths]
    subprocess.run(
        [*command, f"--junitxml={report}"],
        cwd=HERE.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
        timeout=280,
    )
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.attrib["tests"]) > least
    assert int(suite.attrib["skipped"]) == 0


COMPILE = """
import json, sys
from dataclasses import asdict
from attnlab_kernels.operations.softmax.triton_static import forward_case, launchable
from attnlab_kernels.static_facts import compile_case
capability = int(sys.argv[1])
for dtype, block_d, config in launchable(capability):
    case = forward_case(dtype, block_d, config)
    facts = compile_case(case, capability)
    print(json.dumps([dtype, block_d, asdict(config), case.spill_bound, asdict(facts)]), flush=True)
"""
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", BLOCK_SHARED)
def test_every_tile_the_launcher_can_choose_compiles_without_spilling(capability):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=280,
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) >= 20
    assert {row[1] for row in rows} == {16, 32, 64, 128, 256}
    for dtype, block_d, config, spill_bound, facts in rows:
        where = f"sm_{capability} {dtype} D={block_d} {config}: {facts}"
        assert facts["stack_bytes"] <= spill_bound, where
        assert facts["local_bytes"] == 0, where
        assert 0 < facts["registers"] <= 255, where
        assert facts["registers"] * 32 * config["num_warps"] <= 65536, where
        assert facts["shared_bytes"] <= BLOCK_SHARED[capability], where
        # a tile of fewer than 64 rows is too short for the newer instructions
        if dtype == "bf16" and config["block_m"] >= 64:
            assert MATRIX_INSTRUCTION[capability] in facts["matrix_instructions"], where
        elif dtype == "bf16":
            assert facts["matrix_instructions"], where


COMPILE_NEWER = """
import json, sys
from dataclasses import asdict
from attnlab_kernels.operations.softmax.triton_static import cases
from attnlab_kernels.static_facts import compile_case
capability = int(sys.argv[1])
wanted = ("gradient", "modified", "paged", "documents", "join", "delta")
for case in cases(capability):
    if " D 128," in case.form and case.dtype == "bf16" and any(word in case.kernel for word in wanted):
        facts = compile_case(case, capability)
        print(json.dumps([case.kernel, case.form, case.tensor_cores, case.spill_bound, asdict(facts)]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", BLOCK_SHARED)
def test_backward_paged_documents_and_modified_kernels_compile_within_the_card(capability):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE_NEWER, str(capability)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=280)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) >= 14
    for kernel, form, tensor_cores, spill_bound, facts in rows:
        where = f"sm_{capability} {kernel} {form}: {facts}"
        assert facts["stack_bytes"] <= spill_bound, where
        assert facts["shared_bytes"] <= BLOCK_SHARED[capability], where
        assert facts["blocks_per_core"] >= 1, where
        assert bool(facts["matrix_instructions"]) == tensor_cores, where
        if "key gradient" in kernel and "modified" not in kernel and "documents" not in kernel:
            assert MATRIX_INSTRUCTION[capability] in facts["matrix_instructions"], where


READ_HOPPER = """
import json
from dataclasses import asdict, replace
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnlab_kernels.operations.softmax import triton_hopper_kernel
from attnlab_kernels.operations.softmax.triton_static import hopper_case
from attnlab_kernels.static_facts import _signature, compile_case
kernel = triton_hopper_kernel.softmax_hopper_kernel
for causal, warps in ((False, 4), (True, 4), (True, 8)):
    case = replace(hopper_case(128, causal), num_warps=warps)
    source = ASTSource(kernel, **_signature(kernel.arg_names, case))
    options = {"num_warps": warps, "num_stages": case.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    split = "ttg.warp_specialize" in made.asm["ttgir"], "setmaxnreg" in made.asm["ptx"]
    print(json.dumps([warps, split, asdict(compile_case(case, 90))]))
"""


@pytest.mark.slow
def test_the_hopper_kernel_really_has_producer_warps_and_tma_and_only_with_four_warps():
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", READ_HOPPER]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=280)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == [4, 4, 8]
    for warps, split, facts in rows:
        # a request that the compiler drops in silence: what it made is read, not believed
        assert split == [warps == 4] * 2, facts
        assert facts["warps"] == (12 if warps == 4 else 8)
        assert facts["tma_loads"] >= 3
        assert facts["matrix_count"].get("HGMMA", 0) >= 8
        assert facts["stack_bytes"] == 0


def in_process(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return result.stdout


SAY_SUPPORT = """
import torch
from attnlab_kernels.operations.softmax.api import supports
q = torch.zeros(1, 2, 8, 16, dtype=torch.{dtype})
print(supports("triton", q, q, q, need_grad={grad}).reason)
"""


@pytest.mark.parametrize(
    ("dtype", "grad", "says"),
    [
        ("bfloat16", False, "silently wrong in bfloat16"),
        ("float64", False, "needs float32, float16, bfloat16"),
        ("float32", True, "simulated by Triton's interpreter"),
        ("float32", False, "simulated by Triton's interpreter"),
    ],
)
def test_the_interpreter_refuses_what_it_gets_wrong(dtype, grad, says):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    assert says in in_process(SAY_SUPPORT.format(dtype=dtype, grad=grad), TRITON_INTERPRET="1")


def test_without_a_gpu_and_without_the_interpreter_it_is_refused_with_the_way_out():
    q = torch.zeros(1, 2, 8, 16)
    support = supports("triton", q, q, q, mask=Causal())
    assert not support
    assert "needs an NVIDIA GPU" in support.reason
    assert "TRITON_INTERPRET=1" in support.reason


def test_with_triton_blocked_everything_else_works_and_the_reason_says_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from attnlab_kernels import attend, supports, Causal, MultiHeadAttention\n"
        "q = torch.randn(1, 2, 8, 16)\n"
        "for name in ('eager', 'sdpa_math', 'sdpa_flash'):\n"
        "    attend(q, q, q, mask=Causal(), implementation=name)\n"
        "MultiHeadAttention(hidden_size=16, num_heads=2)(torch.randn(1, 3, 16))\n"
        "print(supports('triton', q, q, q).reason)\n"
    )
    assert "pip install triton" in in_process(code)
