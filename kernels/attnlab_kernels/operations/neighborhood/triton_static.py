"""Forms of the neighborhood kernels for the static panel: forward and both gradients on one and two axes."""

from __future__ import annotations

from attnlab_kernels.operations.neighborhood import triton_backward
from attnlab_kernels.operations.neighborhood.triton_forward import (
    KERNELS,
    Config,
    choose_config,
    choose_gradient_config,
)
from attnlab_kernels.static_facts import StaticCase

TABLES = ("first_y", "count_y", "first_x", "count_x")


def cases(capability: int) -> list[StaticCase]:
    """Every padded head dimension on one and two axes, every pixel visible."""
    made: list[StaticCase] = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for axes in (1, 2):
            for dim in (16, 32, 64, 128, 256):
                made.append(window_case("forward", dtype, axes, dim, choose_config(axes, dim, size)))
                config = choose_gradient_config(axes, dim, size)
                made += [
                    window_case(f"{kind} gradient", dtype, axes, dim, config) for kind in ("query", "key")
                ]
    return made


def window_case(kind: str, dtype: str, axes: int, dim: int, config: Config) -> StaticCase:
    """One kernel in its largest form."""
    types = {f"{name}_ptr": "*i32" for name in TABLES}
    types |= {"lse_ptr": "*fp32", "visible_ptr": "*u8", "qk_scale": "fp32"}
    if kind != "forward":
        types |= {"delta_ptr": "*fp32", "scale": "fp32"}
    return StaticCase(
        kernel=f"neighborhood {kind}",
        form=f"{dtype} {axes}-D, D {dim}, tile {config.tile_y} x {config.tile_x}",
        module=KERNELS if kind == "forward" else triton_backward.KERNELS,
        function=f"neighborhood_{kind.replace(' ', '_')}_kernel",
        dtype=dtype,
        types=types,
        constants={
            "D": dim,
            "DV": dim,
            "TILE_Y": config.tile_y,
            "TILE_X": config.tile_x,
            "BLOCK_N": config.block_n,
            "BLOCK_D": dim,
            "BLOCK_DV": dim,
            "HAS_VISIBLE": True,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
        spill_bound=64 if dtype == "bf16" and dim == 256 else 32,
        typical=axes == 2 and dim == 64,
    )
