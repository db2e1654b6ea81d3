"""Forms of the grouped product for the static panel."""

from __future__ import annotations

from attnlab_kernels.operations.expert_projection.triton_grouped import KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase


def cases(capability: int) -> list[StaticCase]:
    """One form a dtype."""
    return [grouped_case(dtype) for dtype in ("bf16", "fp32")]


def grouped_case(dtype: str) -> StaticCase:
    """One tile serves every width."""
    config = choose_config(4 if dtype == "fp32" else 2)
    places = {f"{name}_ptr": "*i64" for name in ("order", "group", "start", "stop")}
    return StaticCase(
        kernel="expert projection",
        form=f"{dtype} tile {config.block_m} x {config.block_n} x {config.block_k}",
        module=KERNELS,
        function="expert_projection_kernel",
        dtype=dtype,
        types=places | {"gate_ptr": "*fp32", "out_ptr": "*fp32"},
        constants={
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
    )
