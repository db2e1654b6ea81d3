"""Forms of the FP8 kernel for the static panel: head dimensions and blocks, from Hopper on."""

from __future__ import annotations

from attnlab_kernels.operations.fp8.triton_forward import BLOCK_SIZES, KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase


def cases(capability: int) -> list[StaticCase]:
    """None for Ampere, which has no eight-bit floats."""
    if capability < 90:
        return []
    forms = [(dim, block) for dim in (32, 64, 128, 256) for block in BLOCK_SIZES]
    return [forward_case(*form) for form in forms if form != (256, 128)]


def forward_case(dim: int, block_size: int) -> StaticCase:
    """With a window and padding, bfloat16 outputs."""
    config = choose_config(dim, block_size)
    types = {f"scale_{name}_ptr": "*fp32" for name in "qkv"}
    types |= {f"{name}_ptr": "*fp8e4nv" for name in "qkv"}
    return StaticCase(
        kernel="fp8 forward",
        form=f"e4m3 D {dim}, scales of {block_size}",
        module=KERNELS,
        function="fp8_forward_kernel",
        dtype="bf16",
        types=types | {"lse_ptr": "*fp32", "ranges_ptr": "*i32", "qk_scale": "fp32"},
        constants={
            "D": dim,
            "DV": dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SCALE_ROWS": block_size,
            "BLOCK_D": dim,
            "BLOCK_DV": dim,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            "HAS_RANGES": True,
            "EMULATED": False,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        spill_bound=32,
        typical=dim == 128 and block_size == 128,
    )
