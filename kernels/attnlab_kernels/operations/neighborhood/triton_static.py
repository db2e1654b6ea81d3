"""Forms of the neighborhood kernel for the static panel: one and two axes."""

from __future__ import annotations

from attnlab_kernels.operations.neighborhood.triton_forward import KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase


def cases(capability: int) -> list[StaticCase]:
    """Three head dimensions on one and two axes."""
    return [
        forward_case(dtype, axes, dim)
        for dtype in ("bf16", "fp32")
        for axes in (1, 2)
        for dim in (32, 64, 128)
    ]


def forward_case(dtype: str, axes: int, dim: int) -> StaticCase:
    """Every pixel visible."""
    config = choose_config(axes, dim, 4 if dtype == "fp32" else 2)
    tables = ("first_y", "count_y", "first_x", "count_x")
    return StaticCase(
        kernel="neighborhood forward",
        form=f"{dtype} {axes}-D, D {dim}, tile {config.tile_y} x {config.tile_x}",
        module=KERNELS,
        function="neighborhood_forward_kernel",
        dtype=dtype,
        types={f"{name}_ptr": "*i32" for name in tables}
        | {"lse_ptr": "*fp32", "visible_ptr": "*u8", "qk_scale": "fp32"},
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
        spill_bound=0 if dtype == "bf16" else 64,
        typical=axes == 2 and dim == 64,
    )
