"""Forms of the differential kernel for the static panel: values twice as wide as queries, as in the paper."""

from __future__ import annotations

from attnlab_kernels.operations.differential.triton_forward import KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase


def cases(capability: int) -> list[StaticCase]:
    """Three head dimensions, with a window and two keys."""
    return [forward_case(dtype, dim) for dtype in ("bf16", "fp32") for dim in (32, 64, 128)]


def forward_case(dtype: str, dim: int) -> StaticCase:
    """Queries of ``dim``, values of ``2 dim``."""
    config = choose_config(dim, 2 * dim, 4 if dtype == "fp32" else 2)
    wide = ("weight", "lse1", "lse2")
    return StaticCase(
        kernel="differential forward",
        form=f"{dtype} D {dim}, Dv {2 * dim}",
        module=KERNELS,
        function="difference_forward_kernel",
        dtype=dtype,
        types={f"{name}_ptr": "*fp32" for name in wide} | {"ranges_ptr": "*i32", "qk_scale": "fp32"},
        constants={
            "D": dim,
            "DV": 2 * dim,
            "BLOCK_D": dim,
            "BLOCK_DV": 2 * dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            "SHARED_KEY": False,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
        spill_bound=0 if dtype == "bf16" else 64,
        typical=dim == 64,
    )
