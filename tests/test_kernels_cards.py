"""What launchers owe to a card that is not here: its own memory, its grids, its device, and no copy in every launch."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import attnlab_kernels
from attnlab_kernels.masks import Causal, Documents, Full, Mask, Padding
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations import triton_platform
from attnlab_kernels.operations.differential import triton_forward as differential
from attnlab_kernels.operations.differential.reference import Pair
from attnlab_kernels.operations.fp8 import triton_forward as fp8
from attnlab_kernels.operations.latent import triton_absorbed as latent
from attnlab_kernels.operations.linear import triton_chunked as linear
from attnlab_kernels.operations.map_pooling import triton_maps as maps
from attnlab_kernels.operations.neighborhood import triton_forward as neighborhood
from attnlab_kernels.operations.softmax import flex, sdpa, triton_backward, triton_forward
from attnlab_kernels.operations.softmax.api import attend, supports
from attnlab_kernels.operations.softmax.packed import triton_supports
from attnlab_kernels.operations.softmax.support import PLAIN, Support
from attnlab_kernels.operations.sparse import triton_lists as sparse
from attnlab_kernels.operations.triton_platform import GRID_LIMITS, load_kernels
from attnlab_kernels.patterns import Local
from attnlab_kernels.static_kernels import REGISTRY

CONSUMER_SHARED = 99 * 1024
"""a block's shared memory on cards of 8.6, 8.9, 12.0 and 12.1; NVIDIA, "CUDA C++ Programming Guide\""""
COPIES = (torch.tensor, torch.from_numpy, Tensor.to, Tensor.cuda, Tensor.item, Tensor.tolist, Tensor.cpu)


class OnCard(TorchFunctionMode):
    """Tensors of the meta device say that they are on the second card; those asked for there are made on meta."""

    def __init__(self, forbidden: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.forbidden = forbidden

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = getattr(getattr(func, "__self__", None), "__name__", "")
        answers = {"device": torch.device("cuda", 1), "is_cuda": True}
        if getattr(func, "__name__", "") == "__get__" and asked in answers:
            return answers[asked]
        if func in self.forbidden and not _of_a_type(func, args, kwargs or {}):
            raise AssertionError(f"{func.__name__} in a launch")
        given = {name: _meta(value) for name, value in (kwargs or {}).items()}
        return func(*map(_meta, args), **given)


def _of_a_type(func: Any, args: Any, kwargs: Any) -> bool:
    """``tensor.to(dtype)`` stays where it is."""
    return func == Tensor.to and not any(isinstance(one, torch.device) for one in (*args, *kwargs.values()))


def _meta(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) and value.type == "cuda" else value


class Kernels:
    """Stands for a module of Triton kernels: it keeps what was started and on which card."""

    INTERPRETED = False

    def __init__(self) -> None:
        self.started: list[tuple[str, tuple[int, ...], int]] = []
        self.card = 0

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_kernel"):
            raise AttributeError(name)
        return _Kernel(self, name)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.card = self.card, device.index
        try:
            yield
        finally:
            self.card = before


class _Kernel:
    def __init__(self, kernels: Kernels, name: str) -> None:
        self.kernels, self.name = kernels, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **named: self.kernels.started.append((self.name, grid, self.kernels.card))

    def __call__(self) -> None:
        raise AssertionError("a kernel is launched over a grid")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made = Kernels()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_platform, "import_module", lambda name: made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: card)
    monkeypatch.setattr(torch.cuda, "device", made.on)
    return made


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def softmax(batch: int = 2, heads: int = 4, mask: Mask | None = None) -> None:
    q, lse = empty(batch, heads, 64, 64), empty(batch, heads, 64, dtype=torch.float32)
    rules = {"mask": mask or Causal(), "scale": 0.1}
    triton_forward.forward(q, q, q, modifiers=PLAIN, **rules)
    triton_backward.backward(q, q, q, q, lse, q, **rules)


def differences(mask: Mask | None = None) -> None:
    q, weight = Pair(empty(2, 4, 64, 64), empty(2, 4, 64, 64)), empty(2, 4, 64, dtype=torch.float32)
    differential.forward(q, q, q.first, weight, mask=mask or Causal(), scale=0.1)


def latents(mask: Mask | None = None) -> None:
    latent.run(
        empty(2, 4, 64, 64),
        empty(2, 4, 64, 32),
        empty(2, 64, 64),
        empty(2, 64, 32),
        mask=mask or Full(),
        scale=1.0,
    )


def statistics(mask: Mask | None = None) -> None:
    q, lse = empty(2, 4, 64, 64), empty(2, 4, 64, dtype=torch.float32)
    maps.statistics(q, q, lse, mask=mask or Causal(), scale=0.1)
    maps.pool(q, q, lse, mask=mask or Causal(), scale=0.1, cell=(16, 16))


def patterns() -> None:
    q = empty(1, 4, 64, 64)
    sparse.run(q, q, q, Local(window=8, causal=True))


def windows() -> None:
    q = empty(1, 4, 9, 9, 64)
    one = (1, 1)
    neighborhood.run(q, q, q, Neighborhood((9, 9), (3, 3), one, one, (False, False)))


PADDED = Padding(((0, 60), (3, 64)))
LAUNCHES: dict[str, Callable[[], None]] = {
    "softmax": softmax,
    "softmax padded": lambda: softmax(mask=Causal() & PADDED),
    "softmax documents": lambda: softmax(mask=Documents([10, 54])),
    "differential": differences,
    "differential padded": lambda: differences(PADDED),
    "latent": latents,
    "latent padded": lambda: latents(PADDED),
    "maps": statistics,
    "maps padded": lambda: statistics(PADDED),
    "sparse": patterns,
    "neighborhood": windows,
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_start_on_the_card_of_their_tensors_not_on_the_current_one(name, kernels):
    with OnCard():
        LAUNCHES[name]()
    assert kernels.started
    assert {card for _, _, card in kernels.started} == {1}
    assert kernels.card == 0


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_second_launch_waits_for_no_copy_so_that_a_graph_can_hold_it(name, kernels):
    with OnCard():
        LAUNCHES[name]()
    first = list(kernels.started)
    with OnCard(COPIES):
        LAUNCHES[name]()
    assert kernels.started == first * 2


def test_a_grid_that_no_card_starts_is_refused_in_words(kernels):
    loaded = load_kernels("kernels")
    for grid in ((GRID_LIMITS[0] + 1,), (1, GRID_LIMITS[1] + 1), (1, 1, GRID_LIMITS[2] + 1)):
        with pytest.raises(ValueError, match="some_kernel starts at most"):
            loaded.some_kernel[grid]()
    loaded.some_kernel[GRID_LIMITS]()
    assert len(kernels.started) == 1


def many(batch: int) -> dict[str, Support]:
    """Every operation's verdict of 16 heads."""
    q = empty(batch, 16, 32, 64)
    none = {"bias": None, "dropout": 0.0}
    pair, weight = Pair(q, q), empty(batch, 16, 32, dtype=torch.float32)
    grid = Neighborhood((32,), (3,), (1,), (1,), (False,))
    return {
        "softmax": supports("triton", q, q, q, mask=Causal()),
        "hopper": supports("triton_hopper", q, q, q, mask=Causal()),
        "fp8": fp8.supports(q, q, bias=None, block_size=64),
        "linear": linear.supports(q, q, q, causal=True, chunk=64),
        "differential": differential.supports(pair, pair, q, weight, bias=None, need_grad=False),
        "neighborhood": neighborhood.supports(q, q, grid, need_windows=False, **none),
        "maps": maps.supports(q, q, bias=None, cell=None),
        "sparse": sparse.supports(q, q, q, **none),
    }


def test_more_heads_than_a_launch_has_programs_for_are_refused_before_it(kernels):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    with OnCard():
        assert all(many(4095).values())
        for name, support in many(4096).items():
            assert not support, name
            assert "65,535 heads of a batch; got 4096 x 16" in support.reason, name
        # packed tokens are no batch
        tokens = empty(70_000, 16, 64)
        assert triton_supports(tokens, tokens, tokens, PLAIN, 0.1)


@pytest.mark.parametrize(
    ("card", "tiles"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 103),
        ((12, 0), 80),
        ((12, 1), 80),
    ],
)
def test_a_card_takes_the_tiles_of_those_with_its_shared_memory(card, tiles, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: card)
    with OnCard():
        assert triton_forward.capability_of(empty(1)) == tiles


def test_the_tiles_of_sm_80_fit_the_consumer_cards_that_take_them():
    panel = json.loads(resources.files("attnlab_kernels").joinpath("static_panel.json").read_text())
    rows = [row for row in panel["rows"] if row["capability"] == 80 and row["operation"] in REGISTRY]
    assert len(rows) > 100
    for row in rows:
        assert row["facts"]["shared_bytes"] <= CONSUMER_SHARED, f"{row['kernel']}: {row['form']}"


def kernel_sources() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(Path(attnlab_kernels.__file__).parent.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.args.args:
                yield path.name, node


def test_no_kernel_asks_a_number_that_it_was_given_for_a_method():
    """Triton makes a constant of a number that is 1 at the launch, and a constant has no ``to``."""
    found = list(kernel_sources())
    assert len(found) > 20
    for file, kernel in found:
        numbers = {
            one.arg for one in kernel.args.args if one.annotation is None and not one.arg.endswith("_ptr")
        }
        for node in ast.walk(kernel):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id not in numbers, f"{file}:{node.lineno} {node.value.id}.{node.attr}"


@pytest.mark.parametrize(("dims", "able"), [((16, 16), True), ((13, 13), False), ((64, 8), False)])
def test_flex_refuses_the_head_dimensions_that_its_kernel_cannot_multiply(dims, able, kernels):
    with OnCard():
        q, v = empty(1, 2, 64, dims[0]), empty(1, 2, 64, dims[1])
        support = supports("flex", q, q, v, mask=Causal())
    assert bool(support) == able
    assert able or "from 16" in support.reason


@pytest.mark.parametrize("size", [(199, 200), (64, 66), (64, 64)])
def test_cudnn_is_never_handed_a_part_with_one_key(size, kernels, monkeypatch):
    """PyTorch refuses one key, and judges the whole call; a causal call with one past key has it apart."""
    monkeypatch.setattr(sdpa, "_ask_torch", lambda backend, q, k, v, note="": Support(k.shape[2] != 1, note))
    with OnCard():
        q, k = empty(1, 2, size[0], 64), empty(1, 2, size[1], 64)
        support = supports("sdpa_cudnn", q, k, k, mask=Causal())
    assert bool(support) == (size[1] - size[0] != 1)
    assert support or "single key" in support.reason


def test_flex_is_compiled_for_every_shape_and_never_falls_back_unfused(monkeypatch):
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", _with(torch.compile, backend=backend))
    monkeypatch.setattr(flex, "_unfused", None)
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1):
            for tokens in (16, 32):
                q = torch.randn(1, 1, tokens, 16)
                out, aux = flex._compiled()(q, q, q, return_aux=flex.torch_flex.AuxRequest(lse=True))
                want = attend(q, q, q, implementation="eager")
                torch.testing.assert_close(out, want.output, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(aux.lse, want.lse, atol=1e-5, rtol=1e-5)
    finally:
        flex._compiled.cache_clear()
        torch._dynamo.reset()
    assert len(made) == 2


def _with(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return lambda *given, **named: function(*given, **named | fixed)
