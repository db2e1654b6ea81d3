"""Every form of our softmax kernel that its launcher can choose, for the static panel.

Needs no triton: ``static_facts`` compiles a case, in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Literal

from attnlab_kernels.operations.softmax.triton_forward import Config, choose_config
from attnlab_kernels.static_facts import StaticCase

Dtype = Literal["bf16", "fp32"]
BLOCK_DIMS = (16, 32, 64, 128, 256)
# query rows that stand for the launcher's three classes
ROW_COUNTS = (4096, 64, 16)


def cases(capability: int) -> list[StaticCase]:
    """The forward with a window and padding (its largest form) in every tile for sm_``capability``."""
    return [forward_case(*choice) for choice in launchable(capability)]


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


def forward_case(dtype: Dtype, block_d: int, config: Config) -> StaticCase:
    """The kernel for one head dimension, a power of two; the value dimension is the same."""
    return StaticCase(
        kernel="softmax forward",
        form=f"{dtype} D {block_d}, tile {config.block_m} x {config.block_n}",
        module="attnlab_kernels.operations.softmax.triton_kernel",
        function="forward_kernel",
        dtype=dtype,
        types={"lse_ptr": "*fp32", "ranges_ptr": "*i32", "qk_scale": "fp32"},
        constants={
            "D": block_d,
            "DV": block_d,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_d,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            "HAS_RANGES": True,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
    )
