"""flash-attn 4 on the static panel: its forward, compiled by its own CuTe DSL for cards that need not be here.

It compiles for tensors without data, for the target that the environment names, in a process of its own. What it asks
for at launch is not in the machine code: its shared memory, and so its occupancy, are not told.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from attnlab_kernels.static_facts import MATRIX_PTX, read_cubin

OPERATION = "flash-attn 4"
KERNEL = "flash-attn 4 forward"
# capability -> (target, multiprocessors of A100, H100, B200)
TARGETS = {80: ("sm_80", 108), 90: ("sm_90a", 132), 100: ("sm_100a", 148)}
SECONDS = 600
_BLOCK = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_CHILD = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from flash_attn.cute.interface import flash_attn_func

with FakeTensorMode():
    shape = (1, 1024, 8, int(sys.argv[1]))
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    flash_attn_func(q, k, v, causal=sys.argv[2] == "causal")
"""


@dataclass(frozen=True)
class Form:
    """Head dimension and mask, bfloat16."""

    dim: int
    mask: str
    """full or causal"""


FORMS = tuple(Form(dim, mask) for dim in (64, 128) for mask in ("full", "causal"))


def installed() -> str | None:
    """The version, or None."""
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return None


def absence() -> str:
    """Why it has no rows, and the way to have them; empty where it is installed."""
    return "" if installed() else f"{OPERATION} is not installed: pip install --pre flash-attn-4"


def names(form: Form, capability: int) -> dict[str, Any]:
    """What its row is called; nobody set a bound of spills for it."""
    return {
        "operation": OPERATION,
        "kernel": KERNEL,
        "form": f"bf16 D {form.dim}, {form.mask}, version {installed()}",
        "capability": capability,
        "dtype": "bf16",
        "spill_bound": None,
        "num_warps": None,
        "num_stages": None,
    }


def compile_form(form: Form, capability: int) -> dict[str, Any]:
    """``StaticFacts`` as a dict, with None for shared memory and occupancy.

    Raises:
        RuntimeError: flash-attn 4 did not compile; with the last line of what it said.
    """
    target, cores = TARGETS[capability]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "FLASH_ATTENTION_FAKE_TENSOR": "1",
            "FLASH_ATTENTION_ARCH": f"sm_{capability}",
            "FLASH_ATTENTION_NUM_SMS": str(cores),
            "CUTE_DSL_ARCH": target,
            "CUTE_DSL_KEEP_PTX": "1",
            "CUTE_DSL_KEEP_CUBIN": "1",
            "CUTE_DSL_DUMP_DIR": folder,
        }
        command = [sys.executable, "-c", _CHILD, str(form.dim), form.mask]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        found = sorted(Path(folder).glob("*.cubin"), key=lambda path: path.stat().st_size)
        if not found:
            words = done.stderr.strip().splitlines() or ["it left no machine code"]
            raise RuntimeError(words[-1])
        code = found[-1].with_suffix(".ptx").read_text()
        threads = _BLOCK.search(code)
        if threads is None:
            raise RuntimeError("its PTX names no block of threads")
        instructions = tuple(name for name in MATRIX_PTX if name in code)
        facts = read_cubin(found[-1].read_bytes(), capability, int(threads[1]) // 32, 0, instructions)
    return asdict(facts) | {"shared_bytes": None, "blocks_per_core": None, "occupancy": None}
