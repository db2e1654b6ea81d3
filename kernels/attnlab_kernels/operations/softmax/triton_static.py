"""Every form of our softmax kernels that their launchers can choose, for the static panel.

Needs no triton: ``static_facts`` compiles a case, in a process without TRITON_INTERPRET. Each kernel appears in its
largest form (window, padding, sinks), and once more with soft cap, ALiBi and bias where it has them.
"""

from __future__ import annotations

from typing import Any, Literal

from attnlab_kernels.operations.softmax import triton_hopper
from attnlab_kernels.operations.softmax.triton_config import (
    Config,
    choose_config,
    choose_key_config,
    choose_query_config,
)
from attnlab_kernels.static_facts import StaticCase

Dtype = Literal["bf16", "fp32"]
BLOCK_DIMS = (16, 32, 64, 128, 256)
# of queries and of values, padded: DIFF's values are twice as wide, DeepSeek's heads have 192 and 128 dimensions
UNEQUAL = ((64, 128), (256, 128))
# query rows that stand for the launcher's three classes
ROW_COUNTS = (4096, 64, 16)
ELEMENT_SIZE: dict[Dtype, int] = {"bf16": 2, "fp32": 4}
FORWARD = "attnlab_kernels.operations.softmax.triton_kernel"
BACKWARD = "attnlab_kernels.operations.softmax.triton_backward_kernel"
WRITE = "attnlab_kernels.operations.paged.kernel"
# a few bytes of stack are where the compiler keeps an address, not a tile
SPILL_BOUND = 32
_TYPES = {
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "ranges_ptr": "*i32",
    "limits_ptr": "*i32",
    "reach_ptr": "*i32",
    "slopes_ptr": "*fp32",
    "sinks_ptr": "*fp32",
    "starts_q_ptr": "*i32",
    "starts_k_ptr": "*i32",
    "table_ptr": "*i32",
    "scale": "fp32",
    "qk_scale": "fp32",
    "softcap": "fp32",
}
_MODIFIED = {"HAS_SOFTCAP": True, "HAS_ALIBI": True, "HAS_BIAS": True}
_PLAIN = dict.fromkeys(_MODIFIED, False)
_DOCUMENTS = {"HAS_LEFT": False, "HAS_RIGHT": False, "HAS_RANGES": False, "HAS_LIMITS": True}
# what a call asks for, the words of the tables of tiles for it, and the kernels' flags
Kind = tuple[str, dict[str, bool], dict[str, Any]]
KINDS: tuple[Kind, ...] = (
    ("", {}, {}),
    ("modified", {"modified": True}, _MODIFIED),
    ("documents", {"limited": True}, _DOCUMENTS),
    ("documents modified", {"modified": True, "limited": True}, _DOCUMENTS | _MODIFIED),
)
_PAGED = {"PACK": 8, "PAGE": 16, "VARLEN": True, "HAS_RANGES": False}


def cases(capability: int) -> list[StaticCase]:
    """All of them for sm_``capability``; fp16 uses the tiles of bf16."""
    made = [forward_case(*choice) for choice in launchable(capability)]
    for dtype, size in ELEMENT_SIZE.items():
        for block_d in BLOCK_DIMS:
            for rows in ROW_COUNTS:
                config = choose_config(block_d, size, rows, capability, paged=True)
                made.append(forward_case(dtype, block_d, config, "paged", _PAGED))
                for name, chosen, flags in KINDS[1:]:
                    config = choose_config(block_d, size, rows, capability, **chosen)
                    made.append(forward_case(dtype, block_d, config, name, flags))
            made += backward_cases(dtype, (block_d, block_d), capability)
            made += small_cases(dtype, block_d)
        for dims in UNEQUAL:
            config = choose_config(max(dims), size, ROW_COUNTS[0], capability)
            made.append(forward_case(dtype, dims[0], config, block_dv=dims[1]))
            made += backward_cases(dtype, dims, capability, KINDS[:1])
    if capability == 90:
        made += [
            hopper_case(block_d, causal) for block_d in triton_hopper.HEAD_DIMS for causal in (False, True)
        ]
    return list({(case.kernel, case.form): case for case in made}.values())


def launchable(capability: int) -> list[tuple[Dtype, int, Config]]:
    """Every (dtype, padded head dimension, tile) that the plain forward can choose."""
    return list(
        dict.fromkeys(
            (dtype, block_d, choose_config(block_d, size, rows, capability))
            for dtype, size in ELEMENT_SIZE.items()
            for block_d in BLOCK_DIMS
            for rows in ROW_COUNTS
        )
    )


def forward_case(
    dtype: Dtype,
    block_d: int,
    config: Config,
    kind: str = "",
    flags: dict[str, Any] | None = None,
    block_dv: int | None = None,
) -> StaticCase:
    """The forward for one head dimension, a power of two; by default the value dimension is the same."""
    own = {"PACK": 1, "PAGE": 0, "VARLEN": False, "HAS_SINKS": True}
    constants = _shape((block_d, block_dv or block_d), config) | own | (flags or {})
    return _case(
        f"softmax forward{kind and ' ' + kind}", FORWARD, "softmax_forward_kernel", dtype, config, constants
    )


def backward_cases(
    dtype: Dtype, dims: tuple[int, int], capability: int, kinds: tuple[Kind, ...] = KINDS
) -> list[StaticCase]:
    """dQ, and dK with dV, of every kind of call; ``dims`` of queries and of values."""
    size, block_d = ELEMENT_SIZE[dtype], max(dims)
    made = []
    for kind, chosen, flags in kinds:
        for name in ("query", "key"):
            config = (
                choose_key_config(block_d, size, capability, **chosen)
                if name == "key"
                else choose_query_config(block_d, size, capability, "modified" in chosen)
            )
            made.append(
                _case(
                    f"softmax {name} gradient{kind and ' ' + kind}",
                    BACKWARD,
                    f"softmax_{name}_gradient_kernel",
                    dtype,
                    config,
                    _shape(dims, config) | flags,
                )
            )
    return made


def small_cases(dtype: Dtype, block_d: int) -> list[StaticCase]:
    """What multiplies nothing: the join of shares, delta, and the write into a pool."""
    side = Config(16, 16, 4, 1)
    rows = {"DV": block_d, "BLOCK_M": 16, "BLOCK_DV": block_d}
    types = {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "lse_ptr": "*fp32", "rows_total": "i32"}
    page = {"D": block_d, "BLOCK_D": block_d, "PAGE": 16}
    write = Config(1, 1, 1 if block_d <= 128 else 4, 1)
    return [
        _case("softmax join of shares", FORWARD, "softmax_merge_kernel", dtype, side, rows, types, False),
        _case(
            "softmax delta",
            BACKWARD,
            "softmax_delta_kernel",
            dtype,
            side,
            rows,
            {"delta_ptr": "*fp32"},
            False,
        ),
        _case("paged write", WRITE, "paged_write_kernel", dtype, write, page, {"slots_ptr": "*i64"}, False),
    ]


def hopper_case(block_d: int, causal: bool) -> StaticCase:
    """The Hopper forward, with a mask in its loop where it is causal."""
    config = triton_hopper.CONFIG
    tile = {"D": block_d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    flags = {"CAUSAL": causal, "MASKED": causal}
    types = {"lse_ptr": "*fp32", "qk_scale": "fp32"}
    kind = " causal" if causal else ""
    name = f"softmax forward for Hopper{kind}"
    return _case(name, triton_hopper.KERNELS, "softmax_hopper_kernel", "bf16", config, tile | flags, types)


def _shape(dims: tuple[int, int], config: Config) -> dict[str, Any]:
    return {
        "D": dims[0],
        "DV": dims[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": dims[0],
        "BLOCK_DV": dims[1],
        "HAS_LEFT": True,
        "HAS_RIGHT": True,
        "HAS_RANGES": True,
        "HAS_LIMITS": False,
        **_PLAIN,
    }


def _case(
    kernel: str,
    module: str,
    function: str,
    dtype: Dtype,
    config: Config,
    constants: dict[str, Any],
    types: dict[str, str] | None = None,
    tensor_cores: bool = True,
) -> StaticCase:
    if types is None:
        unused = ("delta_ptr", "scale", "reach_ptr")
        if module == BACKWARD:
            unused = ("sinks_ptr", "starts_q_ptr", "starts_k_ptr", "table_ptr")
            unused += ("reach_ptr",) if "query" in function else ()
        types = {name: kind for name, kind in _TYPES.items() if name not in unused}
    dim = constants.get("BLOCK_D") or constants.get("BLOCK_DV") or constants["D"]
    wide = constants.get("BLOCK_DV", dim)
    return StaticCase(
        kernel=kernel,
        form=f"{dtype} D {dim}{f', Dv {wide}' if wide != dim else ''}, tile {config.block_m} x {config.block_n}",
        module=module,
        function=function,
        dtype=dtype,
        types=types,
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores=tensor_cores and dtype == "bf16",
        spill_bound=SPILL_BOUND,
    )
