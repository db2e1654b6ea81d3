"""Forms of the differential kernels for the static panel: values twice as wide as queries, as in the paper."""

from __future__ import annotations

from typing import Any

from attnlab_kernels.operations.differential import triton_backward
from attnlab_kernels.operations.differential.triton_forward import KERNELS, Config, choose_config
from attnlab_kernels.static_facts import StaticCase

ROWS = ("weight", "lse1", "lse2")


def cases(capability: int) -> list[StaticCase]:
    """Three head dimensions, with a window and two keys: forward, forward for training, both gradients."""
    made: list[StaticCase] = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for dim in (32, 64, 128):
            made += [forward_case(dtype, dim, capability, keep) for keep in (False, True)]
            for kind, choose in (
                ("query", triton_backward.choose_query_config),
                ("key", triton_backward.choose_key_config),
            ):
                made.append(gradient_case(kind, dtype, dim, choose(dim, 2 * dim, size)))
    return made


def forward_case(dtype: str, dim: int, capability: int, keep_second: bool = False) -> StaticCase:
    """Queries of ``dim``, values of ``2 dim``."""
    config = choose_config(dim, 2 * dim, 4 if dtype == "fp32" else 2, capability)
    name = "differential forward" + (" for training" if keep_second else "")
    constants = {"SHARED_KEY": False, "KEEP_SECOND": keep_second}
    return _case(name, KERNELS, "difference_forward_kernel", (*ROWS, "second"), dtype, dim, config, constants)


def gradient_case(kind: str, dtype: str, dim: int, config: Config) -> StaticCase:
    """The kernel of the gradients of queries, or of keys and values."""
    function = f"difference_{kind}_gradient_kernel"
    rows = (*ROWS, "delta1", "delta2")
    return _case(
        f"differential {kind} gradient", triton_backward.KERNELS, function, rows, dtype, dim, config, {}
    )


def _case(
    kernel: str,
    module: str,
    function: str,
    rows: tuple[str, ...],
    dtype: str,
    dim: int,
    config: Config,
    constants: dict[str, Any],
) -> StaticCase:
    types = {f"{name}_ptr": "*fp32" for name in rows} | {"ranges_ptr": "*i32", "qk_scale": "fp32"}
    return StaticCase(
        kernel=kernel,
        form=f"{dtype} D {dim}, Dv {2 * dim}, tile {config.block_m} x {config.block_n}",
        module=module,
        function=function,
        dtype=dtype,
        types=types if "forward" in kernel else types | {"scale": "fp32"},
        constants={
            "D": dim,
            "DV": 2 * dim,
            "BLOCK_D": dim,
            "BLOCK_DV": 2 * dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            **constants,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
        spill_bound=32 if dtype == "bf16" else 64,
        typical=dim == 64,
    )
