"""The Triton kernels of the operations without a GPU: right under the interpreter, compiled without spilling.

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

from attnlab_kernels.static_facts import BLOCK_SHARED, CAPABILITIES, StaticCase, compile_case, resident_blocks
from attnlab_kernels.static_kernels import cases

FOLDER = Path(__file__).parent
LAWS = sorted(FOLDER.glob("test_kernels_triton_[!o]*.py"))
MATRIX_INSTRUCTIONS = {
    80: {"HMMA"},
    90: {"HMMA", "HGMMA", "QGMMA"},
    100: {"HMMA", "UTCHMMA", "UTCQMMA", "UTCMMA"},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", [*LAWS, FOLDER / "test_kernels_map_pooling.py"], ids=lambda path: path.stem)
def test_the_kernels_obey_every_law_under_the_interpreter(path, tmp_path):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    report = tmp_path / "report.xml"
    command = [*("-m", "pytest", "-q", "-p", "no:cacheprovider"), f"--junitxml={report}"]
    subprocess.run(
        [sys.executable, *command, str(path), "-k", "triton"],
        cwd=FOLDER.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
        timeout=280,
    )
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.attrib["tests"]) >= 8
    assert int(suite.attrib["skipped"]) == 0


# one form of each kernel: the walk over all of them is `attnlab kernels --static`
COMPILE = """
import json
from dataclasses import asdict
from attnlab_kernels.static_facts import compile_case
from attnlab_kernels.static_kernels import typical_cases
for operation, case in typical_cases(90):
    if operation != "softmax":
        print(json.dumps([asdict(case), asdict(compile_case(case, 90))]), flush=True)
"""


@pytest.mark.slow
def test_a_typical_form_of_every_kernel_fits_a_hopper_card():
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=280,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for case, facts in rows:
        where = f"{case['kernel']} {case['form']}: {facts}"
        assert facts["stack_bytes"] <= case["spill_bound"], where
        assert facts["local_bytes"] == 0, where
        assert facts["shared_bytes"] <= BLOCK_SHARED[90], where
        assert facts["blocks_per_core"] >= 1, where
        if case["tensor_cores"]:
            assert set(facts["matrix_count"]) & MATRIX_INSTRUCTIONS[90], where


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_has_typical_forms_and_every_form_a_name_of_its_own(capability):
    listed = list(cases(capability))
    names = [(operation, case.kernel, case.form) for operation, case in listed]
    assert len(set(names)) == len(names)
    kernels = {(operation, case.kernel) for operation, case in listed}
    assert {(operation, case.kernel) for operation, case in listed if case.typical} == kernels


def test_occupancy_follows_the_scarcest_resource():
    assert resident_blocks(registers=255, warps=8, shared=1024, capability=90) == 1
    assert resident_blocks(registers=32, warps=4, shared=0, capability=90) == 16
    assert resident_blocks(registers=32, warps=4, shared=100 * 1024, capability=80) == 1
    assert resident_blocks(registers=32, warps=1, shared=0, capability=100) == 32


def test_an_argument_that_a_kernel_lacks_is_named():
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    case = StaticCase(
        kernel="linear state",
        form="wrong",
        module="attnlab_kernels.operations.linear.triton_kernel",
        function="linear_state_kernel",
        dtype="bf16",
        constants={"BLOCK": 16},
        num_warps=4,
        num_stages=2,
    )
    with pytest.raises(ValueError, match="has no argument BLOCK"):
        compile_case(case, 90)
