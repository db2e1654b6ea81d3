"""What the compiler makes of our Triton kernel for a card that is not here: registers, spills, shared memory.

Needs triton and no GPU. These are facts about code, never about time. Run it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attnlab_kernels.operations.softmax.triton_forward import Config, choose_config

Dtype = Literal["bf16", "fp16", "fp32"]
BLOCK_DIMS = (16, 32, 64, 128, 256)
# query rows that stand for the launcher's three classes
ROW_COUNTS = (4096, 64, 16)
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma")


@dataclass(frozen=True)
class StaticFacts:
    """One compiled kernel. ``stack_bytes`` above 0 means that registers were spilled."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]


def launchable(capability: int) -> list[tuple[Dtype, int, Config]]:
    """Every (dtype, padded head dimension, tile) that the launcher can choose; fp16 uses the tiles of bf16."""
    kinds: list[tuple[Dtype, int]] = [("bf16", 2), ("fp32", 4)]
    return list(
        dict.fromkeys(
            (dtype, block_d, choose_config(block_d, size, rows, capability))
            for dtype, size in kinds
            for block_d in BLOCK_DIMS
            for rows in ROW_COUNTS
        )
    )


def compile_forward(capability: int, dtype: Dtype, block_d: int, config: Config) -> StaticFacts:
    """Compile the kernel with a window and padding (its largest form) for sm_``capability``.

    Args:
        capability: 80, 90 or 100.
        block_d: head dimension, a power of two; the value dimension is the same.

    Raises:
        RuntimeError: this process interprets kernels, or the wheel's tools say nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attnlab_kernels.operations.softmax import triton_kernel

    if triton_kernel.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled")
    kernel: Any = triton_kernel.forward_kernel
    source = ASTSource(kernel, **_signature(kernel.arg_names, dtype, block_d, config))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return StaticFacts(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=int(compiled.metadata.shared),
        matrix_instructions=tuple(name for name in INSTRUCTIONS if name in compiled.asm["ptx"]),
    )


def _signature(names: list[str], dtype: Dtype, block_d: int, config: Config) -> dict[str, Any]:
    fixed = {
        "D": block_d,
        "DV": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_d,
        "HAS_LEFT": True,
        "HAS_RIGHT": True,
        "HAS_RANGES": True,
    }
    pointers = {"lse_ptr": "*fp32", "ranges_ptr": "*i32"}
    types: dict[str, str] = {}
    for name in names:
        if name in fixed:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = pointers.get(name, f"*{dtype}")
        else:
            types[name] = "fp32" if name == "qk_scale" else "i32"
    aligned = [name for name in names if name.endswith("_ptr") or name.startswith("stride")]
    return {
        "signature": types,
        "constexprs": {(names.index(name),): value for name, value in fixed.items()},
        "attrs": {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {text!r}")
    return dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, found.groups()), strict=True))
