"""What our launchers start on a card is what the static panel compiles: the same tiles, neither more nor fewer.

Nothing runs: tensors are on torch's meta device and say that they are on a card, and a stand-in for each module of
kernels keeps what it is launched with. Two unequal head dimensions take the tile of the wider and hold less: the panel
has two such pairs of the plain softmax kernels and of FP8's, besides all equal ones.
"""

from __future__ import annotations

import sys
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnlab_kernels.masks import Causal, Documents, Mask
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.differential import triton_backward as differential_backward
from attnlab_kernels.operations.differential import triton_forward as differential
from attnlab_kernels.operations.differential.reference import Pair
from attnlab_kernels.operations.expert_projection import triton_grouped
from attnlab_kernels.operations.expert_projection.reference import Routing
from attnlab_kernels.operations.fp8 import triton_forward as fp8
from attnlab_kernels.operations.latent import triton_absorbed as latent
from attnlab_kernels.operations.linear import triton_chunked as linear
from attnlab_kernels.operations.linear.reference import LinearSums
from attnlab_kernels.operations.map_pooling import triton_maps as maps
from attnlab_kernels.operations.neighborhood import triton_backward as neighborhood_backward
from attnlab_kernels.operations.neighborhood import triton_forward as neighborhood
from attnlab_kernels.operations.paged import api as paged
from attnlab_kernels.operations.paged import write
from attnlab_kernels.operations.softmax import triton_backward, triton_forward, triton_hopper
from attnlab_kernels.operations.softmax.support import PLAIN, Modifiers
from attnlab_kernels.operations.sparse import triton_lists as sparse
from attnlab_kernels.patterns import Local
from attnlab_kernels.static_facts import CAPABILITIES, StaticCase
from attnlab_kernels.static_kernels import REGISTRY, cases

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (16, 32, 64, 128, 256)
HALF = (torch.bfloat16, torch.float16)
# (function, half or single, sizes of the tile, warps, flags that choose a tile)
Launch = tuple[str, str, tuple[tuple[str, int], ...], int, tuple[bool, ...]]


class OnCard(TorchFunctionMode):
    """Tensors of the meta device say that they are on a card; those asked for on a card are made there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answers = {"device": torch.device("cuda", 0), "is_cuda": True}
        asked = getattr(getattr(func, "__self__", None), "__name__", "")
        if getattr(func, "__name__", "") == "__get__" and asked in answers:
            return answers[asked]
        given = {name: _meta(value) for name, value in (kwargs or {}).items()}
        return func(*map(_meta, args), **given)


def _meta(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) and value.type == "cuda" else value


class Kernels:
    """Stands for a module of kernels."""

    INTERPRETED = False

    def __init__(self, launches: set[tuple[Launch, int | None]]) -> None:
        self.launches = launches

    def __getattr__(self, function: str) -> Any:
        def launch(*arguments: Any, num_warps: int, num_stages: int | None = None, **constants: Any) -> None:
            tensors = [part for part in arguments if isinstance(part, Tensor)]
            half = "half" if any(part.dtype in HALF for part in tensors) else "single"
            key = (function, half, _sizes(constants), num_warps, _flags(constants))
            self.launches.add((key, num_stages))

        return _Grid(launch)


class _Grid:
    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size >= 1 for size in grid)
        return self.launch


def _sizes(constants: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    kept = ("BLOCK_", "TILE_", "CHUNK", "SCALE_ROWS")
    return tuple(sorted((name, value) for name, value in constants.items() if name.startswith(kept)))


def _flags(constants: dict[str, Any]) -> tuple[bool, ...]:
    modified = any(constants.get(f"HAS_{name}") for name in ("SOFTCAP", "ALIBI", "BIAS"))
    return (
        modified,
        bool(constants.get("HAS_LIMITS")),
        bool(constants.get("PAGE")),
        bool(constants.get("LOGITS")),
    )


def form(case: StaticCase) -> Launch:
    half = "half" if case.dtype in ("bf16", "fp16") else "single"
    return case.function, half, _sizes(case.constants), case.num_warps, _flags(case.constants)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_softmax(dtype: torch.dtype, dim: int) -> None:
    for rows, (mask, modifiers) in product((16, 64, 4096), product(MASKED, (PLAIN, CAPPED))):
        q, k = empty(1, 1, rows, dim, dtype=dtype), empty(1, 1, 4096, dim, dtype=dtype)
        triton_forward.forward(q, k, k, mask=mask, scale=0.1, modifiers=modifiers)
        if rows == 64:
            call = {"mask": mask, "scale": 0.1, "softcap": modifiers.softcap}
            triton_backward.backward(q, k, k, q, empty(1, 1, rows), q, **call)
    pool = empty(8, 16, 1, dim, dtype=dtype)
    for rows in (16, 64, 4096):
        starts = (empty(2, dtype=torch.int32), empty(1, dtype=torch.int32))
        size = triton_forward.Size(1, rows, 4096, 1)
        given = (empty(rows, 1, dim, dtype=dtype), pool, pool, empty(1, 8, dtype=torch.int32), starts, size)
        paged._run_triton(*given, Causal(), 0.1, PLAIN)
    write._launch(empty(3, 1, dim, dtype=dtype), pool, empty(3, dtype=torch.int64))
    if dim in UNEQUAL:
        q, k, v = (empty(1, 1, 4096, width, dtype=dtype) for width in (dim, dim, UNEQUAL[dim]))
        triton_forward.forward(q, k, v, mask=Causal(), scale=0.1)
        triton_backward.backward(q, k, v, v, empty(1, 1, 4096), v, mask=Causal(), scale=0.1, softcap=None)


# dimensions of queries -> of values that take other blocks
UNEQUAL = {64: 128, 256: 128}
MASKED: tuple[Mask, ...] = (Causal(), Documents([4096]))
CAPPED = Modifiers(softcap=2.0)


def launch_hopper(dtype: torch.dtype, dim: int) -> None:
    if dtype in HALF and dim in triton_hopper.HEAD_DIMS and torch.cuda.get_device_capability() == (9, 0):
        q = empty(1, 1, 128, dim, dtype=dtype)
        triton_hopper.run(q, q, q, mask=Causal(), scale=0.1)


def launch_fp8(dtype: torch.dtype, dim: int) -> None:
    # queries are padded to 32 at least, so that 16 are unequal
    if dim == 16 or torch.cuda.get_device_capability() < (9, 0):
        return
    q = empty(1, 1, 128, dim, dtype=dtype)
    call = {"mask": Causal(), "scale": 0.1, "rotated": False}
    for block in fp8.BLOCK_SIZES:
        if fp8.supports(q, q, bias=None, block_size=block):
            fp8.run(q, q, q, **call, block_size=block)
    if dim in UNEQUAL:
        fp8.run(q, q, empty(1, 1, 128, UNEQUAL[dim], dtype=dtype), **call, block_size=64)


def launch_linear(dtype: torch.dtype, width: int) -> None:
    for chunk in linear.CHUNKS if width == 64 else (max(linear.CHUNKS),):
        q = empty(1, 1, 128, width, dtype=dtype).requires_grad_()
        past = LinearSums(empty(1, 1, width, width), empty(1, 1, width))
        made = linear.run(q, q, q, causal=True, past=past, chunk=chunk)
        made.numerator.sum().backward()


def launch_differential(dtype: torch.dtype, dim: int) -> None:
    for value_dim in {64: (64, 128), 128: (128, 256)}.get(dim, (dim,)):
        if (dim, value_dim) == (128, 256) and dtype in HALF:
            continue
        q = Pair(*(empty(1, 1, 128, dim, dtype=dtype).requires_grad_() for _ in range(2)))
        v, weight = empty(1, 1, 128, value_dim, dtype=dtype), empty(1, 1, 128)
        if not differential.supports(q, q, v, weight, bias=None, need_grad=True):
            continue
        differential.forward(q, q, v, weight, mask=Causal(), scale=0.1)
        out, _ = differential_backward.run_with_gradient(q, q, v, weight, mask=Causal(), scale=0.1)
        out.float().sum().backward()


def launch_neighborhood(dtype: torch.dtype, dim: int) -> None:
    for axes in (1, 2):
        one = (1,) * axes
        grid = neighborhood.Grid.of(Neighborhood((9,) * axes, (3,) * axes, one, one, (False,) * axes))
        q = empty(1, 1, 9**axes, dim, dtype=dtype).requires_grad_()
        out, _ = neighborhood_backward.run_with_gradient(q, q, q, grid, 0.1, None)
        out.float().sum().backward()


def launch_latent(dtype: torch.dtype, dim: int) -> None:
    for rank in {dim, 512}:
        nope, rope = empty(1, 4, 1, rank, dtype=dtype), empty(1, 4, 1, 64, dtype=dtype)
        keys = empty(1, 256, rank, dtype=dtype), empty(1, 256, 64, dtype=dtype)
        latent.run(nope, rope, *keys, mask=Causal(), scale=0.1)


def launch_maps(dtype: torch.dtype, dim: int) -> None:
    q, lse = empty(1, 1, 128, dim, dtype=dtype), empty(1, 1, 128)
    maps.statistics(q, q, lse, mask=Causal(), scale=0.1)
    maps.pool(q, q, lse, mask=Causal(), scale=0.1, cell=(64, 64))


def launch_sparse(dtype: torch.dtype, dim: int) -> None:
    q = empty(1, 1, 64, dim, dtype=dtype).requires_grad_()
    sparse.run(q, q, q, Local(window=8, causal=False)).output.float().sum().backward()


def launch_experts(dtype: torch.dtype, dim: int) -> None:
    routing = Routing(empty(1, 8, 2, 1), empty(1, 8, 2, 1, dtype=torch.int64), empty(1, 8, 2, 3))
    triton_grouped.project_in(empty(1, 8, dim, dtype=dtype), empty(2, 3, dim, 16, dtype=dtype), routing)


LAUNCHES = {
    "softmax": (launch_softmax, launch_hopper),
    "fp8": (launch_fp8,),
    "linear": (launch_linear,),
    "differential": (launch_differential,),
    "neighborhood": (launch_neighborhood,),
    "latent": (launch_latent,),
    "expert_projection": (launch_experts,),
    "map_pooling": (launch_maps,),
    "sparse": (launch_sparse,),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("operation", REGISTRY)
def test_the_panel_has_the_tiles_that_are_launched_and_no_others(operation, capability, monkeypatch):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    launches: set[tuple[Launch, int | None]] = set()
    listed = [case for name, case in cases(capability) if name == operation]
    modules = {case.module for case in listed} | {sparse.SOFTMAX_BACKWARD}
    for module in modules:
        monkeypatch.setitem(sys.modules, module, Kernels(launches))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pair = divmod(capability, 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: pair)
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: card)
    with OnCard():
        for launch in LAUNCHES[operation]:
            for dtype, dim in product(DTYPES, DIMS):
                launch(dtype, dim)
    forms = {form(case): case.num_stages for case in listed}
    started = {key for key, _ in launches if operation != "sparse" or key[0] != "softmax_delta_kernel"}
    assert started == set(forms)
    # a kernel without a product has nothing to stage and names no number
    assert all(stages in (None, forms[key]) for key, stages in launches if key in forms)


@pytest.mark.parametrize(
    ("dtype", "dim", "runs"),
    [(torch.bfloat16, 256, True), (torch.float32, 128, True), (torch.float32, 200, False)],
)
def test_float32_queries_whose_sums_would_spill_are_refused_by_the_differential_kernel(
    dtype, dim, runs, monkeypatch
):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    with OnCard():
        q, v = empty(1, 1, 8, dim, dtype=dtype), empty(1, 1, 8, 256, dtype=dtype)
        pair = Pair(q, q)
        support = differential.supports(pair, pair, v, empty(1, 1, 8), bias=None, need_grad=True)
    assert support.ok == runs
    assert runs or "float32 queries to 128 dimensions in registers; got 200" in support.reason
