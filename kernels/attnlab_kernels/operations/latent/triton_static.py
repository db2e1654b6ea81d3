"""Forms of the latent kernels for the static panel: DeepSeek's rank of 512 and a small one."""

from __future__ import annotations

from attnlab_kernels.operations.latent.triton_absorbed import KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase


def cases(capability: int) -> list[StaticCase]:
    """The split kernel for two ranks, and the merge."""
    return [split_case(dtype, rank) for dtype in ("bf16", "fp32") for rank in (128, 512)] + [
        merge_case("bf16")
    ]


def split_case(dtype: str, rank: int) -> StaticCase:
    """Causal, 64 rotary dimensions."""
    config = choose_config(rank, 4 if dtype == "fp32" else 2)
    return StaticCase(
        kernel="latent decode",
        form=f"{dtype} rank {rank} + 64, tile {config.block_m} x {config.block_n}",
        module=KERNELS,
        function="latent_decode_kernel",
        dtype=dtype,
        types={"out_ptr": "*fp32", "lse_ptr": "*fp32", "ranges_ptr": "*i32", "qk_scale": "fp32"},
        constants={
            "R": rank,
            "DR": 64,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": rank,
            "BLOCK_DR": 64,
            "HAS_LEFT": False,
            "HAS_RIGHT": True,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=dtype == "bf16",
        spill_bound=0 if dtype == "bf16" else 256,
        typical=rank == 512,
    )


def merge_case(dtype: str) -> StaticCase:
    """The merge of the splits."""
    return StaticCase(
        kernel="latent merge",
        form=f"{dtype} rank 512",
        module=KERNELS,
        function="latent_merge_kernel",
        dtype=dtype,
        types={"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "lse_ptr": "*fp32"},
        constants={"R": 512, "BLOCK_R": 512},
        num_warps=4,
        num_stages=1,
        tensor_cores=False,
    )
