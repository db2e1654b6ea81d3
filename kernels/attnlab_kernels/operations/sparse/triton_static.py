"""Forms of the block list kernels for the static panel: forward and both gradients, with a band and ranges."""

from __future__ import annotations

from attnlab_kernels.operations.softmax.triton_config import Config
from attnlab_kernels.operations.sparse.triton_lists import (
    KERNELS,
    choose_config,
    choose_key_config,
    choose_query_config,
)
from attnlab_kernels.static_facts import StaticCase

WIDE = ("lse", "delta", "dq", "dk", "dv")
WORDS = ("rows", "spans", "columns", "masks", "ranges")
BACKWARD_ONLY = {
    "forward": ("delta", "dq", "dk", "dv"),
    "query gradient": ("dk", "dv"),
    "key gradient": ("dq",),
}
CHOICES = {
    "forward": choose_config,
    "query gradient": choose_query_config,
    "key gradient": choose_key_config,
}


def cases(capability: int) -> list[StaticCase]:
    """Every padded head dimension of every kernel; fp16 uses the tiles of bf16."""
    return [
        case(kernel, dtype, dim, choose(dim, size))
        for kernel, choose in CHOICES.items()
        for dtype, size in (("bf16", 2), ("fp32", 4))
        for dim in (16, 32, 64, 128, 256)
    ]


def case(kernel: str, dtype: str, dim: int, config: Config) -> StaticCase:
    """The kernel in its largest form."""
    types = {f"{name}_ptr": "*fp32" for name in WIDE if name not in BACKWARD_ONLY[kernel]}
    types |= {f"{name}_ptr": "*i32" for name in WORDS} | {"keep_ptr": "*u8", "qk_scale": "fp32"}
    return StaticCase(
        kernel=f"sparse {kernel}",
        form=f"{dtype} D {dim}, tile {config.block_m} x {config.block_n}",
        module=KERNELS,
        function=f"sparse_{kernel.replace(' ', '_')}_kernel",
        dtype=dtype,
        types=types if kernel == "forward" else types | {"scale": "fp32"},
        constants={
            "D": dim,
            "DV": dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": dim,
            "BLOCK_DV": dim,
            "HAS_LEFT": True,
            "HAS_RIGHT": True,
            "HAS_RANGES": True,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
        spill_bound=32,
        typical=dim == 64,
    )
