"""What the compiler makes of a Triton kernel for a card that is not here: registers, spills, instructions.

Needs triton and no GPU. These are facts about code, never about time. Run it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)
# shared memory that one block may ask for, and that a multiprocessor has: A100, H100, B200
BLOCK_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CORE_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
CORE_REGISTERS, CORE_WARPS, CORE_BLOCKS = 65536, 64, 32
MATRIX_PTX = ("mma.sync", "wgmma", "tcgen05.mma")

_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_MATRIX = re.compile(r"^(UTC\w*MMA|[A-Z]{1,2}GMMA|[HQIBDO]MMA)\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class StaticCase:
    """One kernel in one form that its launcher can start."""

    kernel: str
    """what a table calls it"""
    form: str
    """dtype, sizes and tile, in words"""
    module: str
    function: str
    dtype: str
    """triton's name of the numbers behind pointers that ``types`` does not mention: bf16, fp16, fp32"""
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    types: dict[str, str] = field(default_factory=dict)
    """argument -> triton type, where it is neither ``*dtype`` (names in _ptr) nor i32"""
    tensor_cores: bool = True
    """whether the launcher expects the card's matrix instructions in it"""
    spill_bound: int = 0
    """bytes of stack that are tolerated"""
    typical: bool = True
    """whether it stands for its kernel where not every form is compiled"""


@dataclass(frozen=True)
class StaticFacts:
    """One compiled kernel. ``stack_bytes`` above 0 means that registers were spilled."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    warps: int
    """of a launched block; more than asked for where the compiler split off a producer"""
    blocks_per_core: int
    occupancy: float
    """resident warps over the 64 that a multiprocessor can hold"""
    matrix_instructions: tuple[str, ...]
    """as in PTX"""
    matrix_count: dict[str, int]
    """as in the machine code: HMMA (Ampere), HGMMA (Hopper), UTCHMMA (Blackwell), QGMMA and UTCQMMA for FP8"""
    tma_loads: int
    exponentials: int


def compile_case(case: StaticCase, capability: int) -> StaticFacts:
    """Compile a case for sm_``capability`` (80, 90 or 100) and read the machine code.

    Raises:
        RuntimeError: this process interprets kernels, or the wheel's tools say nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = import_module(case.module)
    if module.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled")
    kernel: Any = getattr(module, case.function)
    source = ASTSource(kernel, **_signature(kernel.arg_names, case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    instructions = [name for name in MATRIX_PTX if name in compiled.asm["ptx"]]
    warps, shared = int(compiled.metadata.num_warps), int(compiled.metadata.shared)
    return read_cubin(compiled.asm["cubin"], capability, warps, shared, tuple(instructions))


def read_cubin(
    cubin: bytes, capability: int, warps: int, shared: int, instructions: tuple[str, ...] = ()
) -> StaticFacts:
    """The facts of machine code, whoever compiled it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _USAGE.search(_tool("cuobjdump", "--dump-resource-usage", file.name))
        code = _tool("nvdisasm", "-c", file.name)
    if usage is None:
        raise RuntimeError("cuobjdump reported no resource usage")
    registers, stack, _, local = map(int, usage.groups())
    opcodes = Counter(_OPCODE.findall(code))
    matrix: Counter[str] = Counter()
    for name, count in opcodes.items():
        found = _MATRIX.match(name)
        if found:
            matrix[found.group(1)] += count
    blocks = resident_blocks(registers, warps, shared, capability)
    return StaticFacts(
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        shared_bytes=shared,
        warps=warps,
        blocks_per_core=blocks,
        occupancy=blocks * warps / CORE_WARPS,
        matrix_instructions=instructions,
        matrix_count=dict(sorted(matrix.items())),
        tma_loads=_count(opcodes, "UTMALDG"),
        exponentials=_count(opcodes, "MUFU.EX2"),
    )


def resident_blocks(registers: int, warps: int, shared: int, capability: int) -> int:
    """Blocks that one multiprocessor holds at once, by registers, warps, shared memory and the limit of 32.

    NVIDIA, "CUDA C++ Programming Guide", compute capabilities: registers come in units of 256 a warp, shared memory in
    units of 128 bytes and 1 KiB a block for the system.
    """
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = CORE_REGISTERS // max(1, warp_registers) // warps
    by_shared = CORE_SHARED[capability] // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, CORE_WARPS // warps, CORE_BLOCKS)


def _count(opcodes: Counter[str], start: str) -> int:
    return sum(count for name, count in opcodes.items() if name.startswith(start))


def _signature(names: list[str], case: StaticCase) -> dict[str, Any]:
    types: dict[str, str] = {}
    for name in names:
        if name in case.constants:
            types[name] = "constexpr"
        elif name in case.types:
            types[name] = case.types[name]
        else:
            types[name] = f"*{case.dtype}" if name.endswith("_ptr") else "i32"
    unknown = (set(case.constants) | set(case.types)) - set(names)
    if unknown:
        raise ValueError(
            f"{case.kernel} has no argument {', '.join(sorted(unknown))}; it has {', '.join(names)}"
        )
    aligned = [name for name in names if name.endswith("_ptr") or name.startswith("stride")]
    return {
        "signature": types,
        "constexprs": {(names.index(name),): value for name, value in case.constants.items()},
        "attrs": {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout
