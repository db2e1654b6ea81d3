"""Forms of the map kernels for the static panel."""

from __future__ import annotations

from typing import Any

from attnlab_kernels.operations.map_pooling.triton_maps import KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase

CELLS = (8, 64, 256)


def cases(capability: int) -> list[StaticCase]:
    """Rows, columns and three sizes of cells, for every padded head dimension, with a window."""
    found = []
    for dtype in ("bf16", "fp32"):
        for dim in (16, 32, 64, 128, 256):
            found.append(_case("map rows", "map_row_kernel", dtype, dim, {}, ("out",)))
            found.append(_case("map columns", "map_column_kernel", dtype, dim, {}, ("sum", "max")))
            found += [pool_case(dtype, dim, cell) for cell in CELLS]
    return found


def pool_case(dtype: str, dim: int, cell: int) -> StaticCase:
    """Square cells."""
    config = choose_config(dim, _size(dtype))
    sides = {"CELL_M": cell, "CELL_N": cell}
    sides |= {"PATCH_M": max(cell, config.block_m), "PATCH_N": max(cell, config.block_n)}
    return _case(
        "map pooling", "map_pool_kernel", dtype, dim, sides, ("max", "mean"), f", cells {cell} x {cell}"
    )


def _case(
    kernel: str,
    function: str,
    dtype: str,
    dim: int,
    more: dict[str, Any],
    outputs: tuple[str, ...],
    words: str = "",
) -> StaticCase:
    config = choose_config(dim, _size(dtype))
    return StaticCase(
        kernel=kernel,
        form=f"{dtype} D {dim}{words}",
        module=KERNELS,
        function=function,
        dtype=dtype,
        types={f"{name}_ptr": "*fp32" for name in ("lse", *outputs)}
        | {"ranges_ptr": "*i32", "qk_scale": "fp32"},
        constants={
            "D": dim,
            "BLOCK_D": dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            **more,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
        spill_bound=32,
        typical=dim == 128 and more.get("CELL_M", 64) == 64,
    )


def _size(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2
