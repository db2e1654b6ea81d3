"""Forms of the latent kernels for the static panel: every padded rank to DeepSeek's 512."""

from __future__ import annotations

from attnlab_kernels.operations.latent.triton_absorbed import KERNELS, choose_config
from attnlab_kernels.static_facts import StaticCase

RANKS = (16, 32, 64, 128, 256, 512)


def cases(capability: int) -> list[StaticCase]:
    """The split kernel and the merge for every rank."""
    return [
        make(dtype, rank) for make in (split_case, merge_case) for dtype in ("bf16", "fp32") for rank in RANKS
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
        spill_bound=32,
        typical=rank == 512,
    )


def merge_case(dtype: str, rank: int) -> StaticCase:
    """The merge of the splits."""
    return StaticCase(
        kernel="latent merge",
        form=f"{dtype} rank {rank}",
        module=KERNELS,
        function="latent_merge_kernel",
        dtype=dtype,
        types={"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "lse_ptr": "*fp32"},
        constants={"R": rank, "BLOCK_R": rank},
        num_warps=4,
        num_stages=3,
        tensor_cores=False,
        typical=rank == 512,
    )
