"""Forms of the differential kernels for the static panel: the paper's, and the largest of each tile."""

from __future__ import annotations

from typing import Any

from attnlab_kernels.operations.differential import triton_backward
from attnlab_kernels.operations.differential.triton_forward import KERNELS, Config, choose_config
from attnlab_kernels.static_facts import StaticCase

ROWS = ("weight", "lse1", "lse2")
# of queries, of values: the paper's values are twice as wide, and a tile goes by the wider
DIMS = ((64, 128), *((dim, dim) for dim in (16, 32, 64, 128)))
WIDEST = {"bf16": (256, 256), "fp32": (128, 256)}


def cases(capability: int) -> list[StaticCase]:
    """With a window and two keys: forward, forward for training, both gradients."""
    made: list[StaticCase] = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for dims in (*DIMS, WIDEST[dtype]):
            made += [forward_case(dtype, dims, capability, keep) for keep in (False, True)]
            for kind, choose in (
                ("query", triton_backward.choose_query_config),
                ("key", triton_backward.choose_key_config),
            ):
                made.append(gradient_case(kind, dtype, dims, choose(*dims, size)))
    return made


def forward_case(dtype: str, dims: tuple[int, int], capability: int, keep_second: bool = False) -> StaticCase:
    """``dims`` of queries and of values."""
    config = choose_config(*dims, 4 if dtype == "fp32" else 2, capability)
    name = "differential forward" + (" for training" if keep_second else "")
    constants = {"SHARED_KEY": False, "KEEP_SECOND": keep_second}
    return _case(
        name, KERNELS, "difference_forward_kernel", (*ROWS, "second"), dtype, dims, config, constants
    )


def gradient_case(kind: str, dtype: str, dims: tuple[int, int], config: Config) -> StaticCase:
    """The kernel of the gradients of queries, or of keys and values."""
    function = f"difference_{kind}_gradient_kernel"
    rows = (*ROWS, "delta1", "delta2")
    return _case(
        f"differential {kind} gradient", triton_backward.KERNELS, function, rows, dtype, dims, config, {}
    )


def _case(
    kernel: str,
    module: str,
    function: str,
    rows: tuple[str, ...],
    dtype: str,
    dims: tuple[int, int],
    config: Config,
    constants: dict[str, Any],
) -> StaticCase:
    dim, value_dim = dims
    types = {f"{name}_ptr": "*fp32" for name in rows} | {"ranges_ptr": "*i32", "qk_scale": "fp32"}
    return StaticCase(
        kernel=kernel,
        form=f"{dtype} D {dim}, Dv {value_dim}, tile {config.block_m} x {config.block_n}",
        module=module,
        function=function,
        dtype=dtype,
        types=types if "forward" in kernel else types | {"scale": "fp32"},
        constants={
            "D": dim,
            "DV": value_dim,
            "BLOCK_D": dim,
            "BLOCK_DV": value_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            **constants,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
        spill_bound=96 if "key" in kernel and dims == WIDEST["fp32"] else 32,
        typical=dims == (64, 128),
    )
