"""Forms of the FP8 kernel for the static panel: head dimensions, blocks and what it writes, from Hopper on."""

from __future__ import annotations

from attnlab_kernels.operations.fp8.triton_forward import BLOCK_SIZES, KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase

# (D, Dv, rows of a scale): values wider than queries, and narrower as DeepSeek's 192 and 128 padded
UNEQUAL = ((64, 128, 64), (256, 128, 64))


def cases(capability: int) -> list[StaticCase]:
    """None for Ampere, which has no eight-bit floats."""
    if capability < 90:
        return []
    equal = [(dim, dim, block) for dim in (32, 64, 128, 256) for block in BLOCK_SIZES]
    forms = [form for form in (*equal, *UNEQUAL) if form != (256, 256, 128)]
    return [forward_case(dtype, *form) for dtype in ("bf16", "fp32") for form in forms]


def forward_case(dtype: str, dim: int, value_dim: int, block_size: int) -> StaticCase:
    """With a window and padding; ``dtype`` is that of the outputs."""
    config = choose_config(max(dim, value_dim), block_size)
    wide = "" if value_dim == dim else f"Dv {value_dim}, "
    types = {f"scale_{name}_ptr": "*fp32" for name in "qkv"}
    types |= {f"{name}_ptr": "*fp8e4nv" for name in "qkv"}
    return StaticCase(
        kernel="fp8 forward",
        form=f"e4m3 to {dtype} D {dim}, {wide}scales of {block_size}",
        module=KERNELS,
        function="fp8_forward_kernel",
        dtype=dtype,
        types=types | {"lse_ptr": "*fp32", "ranges_ptr": "*i32", "qk_scale": "fp32"},
        constants={
            "D": dim,
            "DV": value_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SCALE_ROWS": block_size,
            "BLOCK_D": dim,
            "BLOCK_DV": value_dim,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            "HAS_RANGES": True,
            "EMULATED": False,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        spill_bound=32,
        typical=(dim, value_dim, block_size) == (128, 128, 128),
    )
