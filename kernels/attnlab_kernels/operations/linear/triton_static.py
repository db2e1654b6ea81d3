"""Forms of the linear attention kernels for the static panel: both kernels, forward and gradients."""

from __future__ import annotations

from typing import Any

from attnlab_kernels.operations.linear.triton_chunked import CHUNKS, FULL, KERNELS, MAX_WIDTH, choose_config
from attnlab_kernels.static_facts import StaticCase

# (width, chunk): every block in the longest chunk, the widest walked in blocks, and every chunk of the default width
SIZES = (
    *((width, max(CHUNKS)) for width in (16, 32, 64, MAX_WIDTH)),
    *((64, chunk) for chunk in CHUNKS[:-1]),
)
# (name, WEIGHT, DENOMINATOR, REVERSE) of a reading
READINGS = (("output", 0, True, False), ("query gradient", 1, False, False), ("key gradient", 2, False, True))


def cases(capability: int) -> list[StaticCase]:
    """Every block and every chunk; inner and outer width are equal."""
    found = []
    for dtype in ("bf16", "fp32"):
        for width, chunk in SIZES:
            found.append(state_case(dtype, chunk, width))
            found += [reading_case(dtype, chunk, width, *reading) for reading in READINGS]
    return found


def state_case(dtype: str, chunk: int, width: int) -> StaticCase:
    """The pass over the chunks."""
    names = ("weight", "state", "norm", "past_state", "past_norm", "last_state", "last_norm")
    return _case(
        "linear state",
        "linear_state_kernel",
        dtype,
        chunk,
        width,
        names,
        {"REVERSE": True, "HAS_WEIGHT": True},
    )


def reading_case(
    dtype: str, chunk: int, width: int, name: str, weight: int, denominator: bool, reverse: bool
) -> StaticCase:
    """The reading of one chunk."""
    flags = {"REVERSE": reverse, "DENOMINATOR": denominator, "WEIGHT": weight, "WIDE": dtype != "bf16"}
    names = ("state", "norm", "weight", "denominator")
    return _case(f"linear {name}", "linear_output_kernel", dtype, chunk, width, names, flags)


def _case(
    kernel: str,
    function: str,
    dtype: str,
    chunk: int,
    width: int,
    wide: tuple[str, ...],
    flags: dict[str, Any],
) -> StaticCase:
    config = choose_config(width, width, 4 if dtype == "fp32" else 2)
    return StaticCase(
        kernel=kernel,
        form=f"{dtype} width {width}, chunk {chunk}",
        module=KERNELS,
        function=function,
        dtype=dtype,
        types={f"{name}_ptr": "*fp32" for name in wide},
        constants={
            "E": width,
            "F": width,
            "CHUNK": chunk,
            "BLOCK_E": config.block_e,
            "BLOCK_F": config.block_f,
            "PRECISION": FULL if dtype == "fp32" else "tf32",
            **flags,
        },
        typical=(width, chunk) == (64, 64),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        spill_bound=32,
    )
