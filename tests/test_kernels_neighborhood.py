"""Neighborhood attention: a slow definition, natten, and the laws of windows that shift but never shrink."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab_kernels import (
    MECHANISMS,
    Causal,
    Full,
    Neighborhood,
    NeighborhoodAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    Padding,
    Window,
)
from attnlab_kernels.neighborhood import NeighborhoodError, window_limits
from attnlab_kernels.operations.neighborhood.api import neighborhood_attend
from attnlab_kernels.operations.neighborhood.reference import run, visited_pairs
from attnlab_kernels.operations.softmax.api import Unsupported

SHAPES = [
    Neighborhood((41,), (7,), (1,), (1,), (False,)),
    Neighborhood((23,), (4,), (3,), (1,), (False,)),
    Neighborhood((37,), (5,), (2,), (3,), (False,)),
    Neighborhood((37,), (5,), (2,), (1,), (True,)),
    Neighborhood((19,), (6,), (1,), (4,), (True,)),
    Neighborhood((11,), (11,), (1,), (1,), (False,)),
    Neighborhood((9, 13), (3, 5), (1, 1), (1, 1), (False, False)),
    Neighborhood((11, 7), (3, 2), (2, 3), (2, 1), (False, False)),
    Neighborhood((9, 10), (3, 4), (1, 2), (1, 1), (True, False)),
    Neighborhood((5, 6, 7), (3, 2, 3), (1, 2, 2), (1, 1, 1), (True, False, False)),
]


def axis_keys(query: int, length: int, kernel: int, dilation: int, stride: int, causal: bool) -> set[int]:
    """The definition in words: of my residue class, the ``kernel`` keys nearest to my leader that exist."""
    line = list(range(query % dilation, length, dilation))
    place = line.index(query)
    group = [p for p in range(len(line)) if p // stride == place // stride]
    if causal:
        full_group_end = place // stride * stride + stride - 1
        last = min(full_group_end, len(line) - 1)
        return {line[p] for p in range(len(line)) if last - kernel < p <= place}
    leader = min(group[0] + stride // 2, len(line) - 1)
    # distance to the window's middle; an even window reaches one further back
    nearest = sorted(range(len(line)), key=lambda p: (abs(p - leader + (0.5 if kernel % 2 == 0 else 0)), p))
    return {line[p] for p in nearest[:kernel]}


def slow_mask(where: Neighborhood) -> torch.Tensor:
    axes = list(zip(where.space, where.kernel_size, where.dilation, where.stride, where.causal, strict=True))
    pixels = list(product(*map(range, where.space)))
    mask = torch.zeros(len(pixels), len(pixels), dtype=torch.bool)
    for row, pixel in enumerate(pixels):
        keys = [axis_keys(place, *axis) for place, axis in zip(pixel, axes, strict=True)]
        for col, other in enumerate(pixels):
            mask[row, col] = all(place in allowed for place, allowed in zip(other, keys, strict=True))
    return mask


def tensors(where: Neighborhood, dtype=torch.float32, value_dim: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, *where.space, dim, generator=generator, dtype=dtype) for dim in (4, 4, value_dim)
    ]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(2, -2)


@pytest.fixture(params=SHAPES, ids=lambda where: f"{where.space}-{where.kernel_size}-{where.dilation}")
def where(request) -> Neighborhood:
    return request.param


def test_the_windows_are_those_of_the_definition(where):
    mask = slow_mask(where).numpy()
    pixels = np.arange(where.size)
    assert (where.allowed(pixels, pixels) == mask).all()
    assert where.count() == mask.sum()
    assert all(where.neighbors(row).tolist() == np.flatnonzero(mask[row]).tolist() for row in pixels)


def test_tiles_equal_dense_attention_under_the_definitions_mask(where):
    q, k, v = tensors(where)
    got = run(q, k, v, where, need_windows=True)
    mask = slow_mask(where)
    want = functional.scaled_dot_product_attention(flat(q), flat(k), flat(v), attn_mask=mask)
    torch.testing.assert_close(flat(got.output), want, atol=2e-6, rtol=0)
    scores = (flat(q) @ flat(k).transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(got.lse.flatten(2), scores.logsumexp(-1), atol=2e-6, rtol=0)
    assert got.windows is not None
    assert got.windows.shape[-1] == where.slots
    torch.testing.assert_close(got.windows.sum(-1), torch.ones(2, 3, *where.space), atol=2e-6, rtol=0)


def test_every_window_has_k_keys_and_a_corner_shifts():
    first, count = window_limits(10, 5)
    assert count.tolist() == [5] * 10
    assert first.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]
    assert window_limits(6, 4)[0].tolist() == [0, 0, 0, 1, 2, 2]
    assert window_limits(9, 4, stride=3)[0].tolist() == [0, 0, 0, 2, 2, 2, 5, 5, 5]
    assert window_limits(5, 3, causal=True)[1].tolist() == [1, 2, 3, 3, 3]


@pytest.mark.filterwarnings("ignore")  # natten calls torch by names that are going away
def test_equals_natten(where, apart):
    natten = pytest.importorskip("natten", reason="natten is not installed")
    call = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(where.space)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, *where.space, 16, generator=generator) for _ in range(3))
    with torch.no_grad():
        want = call(
            *(part.movedim(1, -2).contiguous() for part in (q, k, v)),
            kernel_size=where.kernel_size,
            dilation=where.dilation,
            stride=where.stride,
            is_causal=where.causal,
        )
    torch.testing.assert_close(run(q, k, v, where).output, want.movedim(-2, 1), atol=1e-6, rtol=0)


def test_relative_positions_follow_the_shifted_window(where):
    q, k, v = tensors(where)
    sizes = [2 * kernel - 1 for kernel in where.kernel_size]
    table = torch.randn(3, *sizes, generator=torch.Generator().manual_seed(1))
    mask, bias = slow_mask(where), torch.zeros(3, where.size, where.size)
    pixels = list(product(*map(range, where.space)))
    for row, col in mask.nonzero().tolist():
        steps = [
            (there - here) // dilation + kernel - 1
            for here, there, dilation, kernel in zip(
                pixels[row], pixels[col], where.dilation, where.kernel_size, strict=True
            )
        ]
        assert all(0 <= step < size for step, size in zip(steps, sizes, strict=True))
        bias[:, row, col] = table[(slice(None), *steps)]
    bias = bias.masked_fill(~mask, -torch.inf)
    want = functional.scaled_dot_product_attention(flat(q), flat(k), flat(v), attn_mask=bias)
    torch.testing.assert_close(flat(run(q, k, v, where, bias=table).output), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("where", [SHAPES[2], SHAPES[8]], ids=["1d", "2d"])
def test_gradients_equal_those_of_dense_attention(where):
    table = torch.randn(3, *(2 * kernel - 1 for kernel in where.kernel_size), dtype=torch.float64)
    inputs = [part.requires_grad_() for part in (*tensors(where, torch.float64), table)]
    got = torch.autograd.grad(
        run(inputs[0], inputs[1], inputs[2], where, bias=inputs[3]).output.square().sum(), inputs
    )
    rows = np.arange(where.size)
    steps = [
        np.clip(part, 0, 2 * k - 2)
        for part, k in zip(where.offsets(rows[:, None], rows[None]), where.kernel_size, strict=True)
    ]
    bias = table[(slice(None), *(torch.from_numpy(step) for step in steps))]
    bias = bias.masked_fill(~slow_mask(where), -torch.inf)
    dense = functional.scaled_dot_product_attention(*map(flat, inputs[:3]), attn_mask=bias)
    want = torch.autograd.grad(dense.square().sum(), inputs)
    torch.testing.assert_close(got, want)


def test_gradients_are_those_of_finite_differences():
    where = Neighborhood((5, 4), (3, 2), (1, 2), (1, 1), (False, True))
    q, k, v = (part[:1, :1].clone().requires_grad_() for part in tensors(where, torch.float64, 2))
    table = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(1, 5, 4, dtype=torch.bool)
    visible[0, 1, :] = False

    def forward(q, k, v, table):
        return run(q, k, v, where, bias=table, visible=visible).output

    assert torch.autograd.gradcheck(forward, (q, k, v, table), fast_mode=True)


class LargestStorage(TorchDispatchMode):
    """Numbers in the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize(
    ("where", "factor"),
    [
        (Neighborhood((2048,), (31,), (1,), (1,), (False,)), 2.1),
        (Neighborhood((2048,), (31,), (7,), (1,), (True,)), 2.1),
        (Neighborhood((48, 40), (7, 7), (2, 1), (1, 1), (False, False)), 4.1),
    ],
    ids=["1d", "dilated causal", "2d"],
)
def test_the_cost_follows_the_windows(where, factor):
    assert where.count() <= visited_pairs(where) <= factor * where.count()
    q = torch.randn(1, 1, *where.space, 8)
    with torch.no_grad(), LargestStorage() as largest:
        run(q, q, q, where)
    assert largest.numbers <= max(q.numel(), 64 * 256)


@pytest.mark.parametrize("table", [True, False])
def test_fused_tiles_equal_the_reference(where, table):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, *where.space, 8, generator=generator) for _ in range(3))
    shape = (2, *(2 * kernel - 1 for kernel in where.kernel_size))
    bias = torch.randn(shape, generator=generator) if table else None
    want = run(q, k, v, where, bias=bias)
    got = neighborhood_attend(q, k, v, where, bias=bias, implementation="fused").result
    torch.testing.assert_close(got.output, want.output, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.lse, want.lse, atol=2e-6, rtol=0)


def test_fused_tiles_have_the_gradients_of_the_reference(where):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = torch.randn(4, 1, 2, *where.space, 4, generator=generator, dtype=torch.float64)
    inputs = [part.requires_grad_() for part in (q, k, v)]
    got, want = (
        torch.autograd.grad(
            (neighborhood_attend(q, k, v, where, implementation=name).result.output * weights).sum(), inputs
        )
        for name in ("fused", "tiled")
    )
    torch.testing.assert_close(got, want)


class FusedCalls(TorchDispatchMode):
    """Calls of the flash tile, and the (query, key) pairs that they visit."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention_for_cpu" in str(func):
            q, k = args[:2]
            self.calls += 1
            self.pairs += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return func(*args, **(kwargs or {}))


def test_a_picture_of_64_by_64_is_nine_fused_calls_that_visit_a_twentieth_of_its_pairs():
    where = Neighborhood((64, 64), (7, 7), (1, 1), (1, 1), (False, False))
    q = torch.randn(1, 1, 64, 64, 8)
    with torch.no_grad(), FusedCalls() as seen:
        ran = neighborhood_attend(q, q, q, where)
    assert ran.implementation == "fused"
    assert seen.calls == 9
    assert seen.pairs == visited_pairs(where) <= 4096**2 / 20


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dropout": 0.5}, "drops no probabilities"),
        ({"need_windows": True}, "never keeps windows"),
        ({"visible": torch.ones(1, 9, dtype=torch.bool)}, "never hides pixels"),
        ({"v": torch.zeros(1, 1, 9, 3)}, "Dv equal to D; got D = 4 and Dv = 3"),
        ({"bias": torch.zeros(1, 5, requires_grad=True)}, "no gradient for a bias"),
    ],
)
def test_what_fused_tiles_cannot_do_the_reference_does_and_says_so(changes, says):
    where = Neighborhood((9,), (3,), (1,), (1,), (False,))
    call = {name: torch.zeros(1, 1, 9, 4) for name in "qkv"} | changes
    ran = neighborhood_attend(**call, neighborhood=where)
    assert ran.implementation == "tiled"
    assert says in ran.reason
    with pytest.raises(Unsupported, match=says):
        neighborhood_attend(**call, neighborhood=where, implementation="fused")


def make(kind=NeighborhoodAttention, seed: int = 0, **changes) -> NeighborhoodAttention:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"d_model": 12, "num_heads": 3, "kernel_size": 3} | changes
    return kind(**arguments).eval()


def image(*space: int) -> torch.Tensor:
    return torch.randn(2, *space, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        (NeighborhoodAttention1D, (11,)),
        (NeighborhoodAttention2D, (7, 5)),
        (NeighborhoodAttention3D, (3, 4, 5)),
    ],
)
@pytest.mark.parametrize("table", [True, False])
def test_the_map_times_the_values_is_the_output_before_the_projection(kind, space, table):
    module, x = make(kind, relative_position_bias=table), image(*space)
    if module.position_table is not None:
        torch.nn.init.normal_(module.position_table)
    result = module(x, output_attentions=True, return_dict=True)
    size = int(np.prod(space))
    assert result.attentions.shape == (2, 3, size, 3 ** len(space))
    value = module.v_proj(x).detach().view(2, size, 3, 4)[1, :, 2].numpy()
    heads = result.aux["heads"][1, 2].detach().numpy()
    weights = module.effective_map(x, head=2, batch=1)
    tile = weights.tile(slice(None), slice(None))
    np.testing.assert_allclose(tile @ value, heads, atol=2e-6)
    np.testing.assert_allclose(weights.row_sums(), np.ones(size), atol=2e-6)
    for row in (0, size // 2, size - 1):
        keys, window = weights.window(row)
        np.testing.assert_allclose(window, result.attentions[1, 2, row].numpy(), atol=2e-6)
        np.testing.assert_allclose(window @ value[keys], heads[row], atol=2e-6)
        assert weights.image(row).shape == space
        np.testing.assert_array_equal(weights.image(row).ravel(), tile[row])
        assert np.count_nonzero(tile[row]) == 3 ** len(space)
    np.testing.assert_array_equal(weights.tile(slice(2, 9), slice(1, 6)), tile[2:9, 1:6])


@pytest.mark.parametrize(("height", "width"), [(4, 3), (20, 9), (60, 60), (1, 1)])
@pytest.mark.parametrize("causal", [(True, False), (False, False)])
def test_a_pixel_is_the_largest_weight_or_the_mean_under_it(height, width, causal, monkeypatch):
    monkeypatch.setattr("attnlab_kernels.neighborhood.BLOCK_CELLS", 200)
    module = make(NeighborhoodAttention2D, causal=causal, dilation=2, relative_position_bias=True)
    keep = torch.ones(2, 7, 6, dtype=torch.bool)
    keep[0, :5, ::2] = False
    weights = module.effective_map(image(7, 6), head=1, attention_mask=keep)
    rows, cols = slice(3, 42), slice(1, 40)
    tile = weights.tile(rows, cols)
    edges = [[39 * part // count for part in range(count + 1)] for count in (min(height, 39), min(width, 39))]
    for reduce, fold in (("max", np.max), ("mean", np.mean)):
        want = [[fold(tile[a:b, c:d]) for c, d in pairwise(edges[1])] for a, b in pairwise(edges[0])]
        got = weights.pool(rows, cols, height, width, reduce)
        np.testing.assert_allclose(got, want, atol=1e-7)
    assert (weights.row_sums() == 0).any()


def test_the_guides_call_works():
    names: dict[str, Any] = {}
    exec(MECHANISMS["neighborhood"].snippet, names)
    assert names["output"].shape == (1, 16, 16, 256)


def test_a_flat_image_with_its_shape_equals_the_image():
    module, x = make(NeighborhoodAttention2D), image(4, 7)
    want = module(x)[0]
    got = module(x.flatten(1, 2), spatial_shape=(4, 7))[0]
    assert torch.equal(got.view_as(want), want)
    assert torch.equal(make()(x)[0], want)
    with pytest.raises(ValueError, match="must have 2 axes"):
        module(x.flatten(1, 2))


def test_a_later_pixel_changes_nothing_on_a_causal_axis_only():
    module, x = make(causal=(True, False), kernel_size=(3, 3)), image(7, 7)
    before = module(x)[0]
    x[:, 4, 3] += 3
    change = (module(x)[0] - before).abs().amax(dim=(0, 3))
    touched = change > 1e-6
    assert not touched[:4].any()
    assert touched[4:7, 2:5].all()
    assert touched.sum() == 9


def test_a_window_over_everything_is_full_attention():
    module, x = make(kernel_size=9), image(9)
    q, k, v = (
        part(x).unflatten(-1, (3, 4)).transpose(1, 2)
        for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    full = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x)[0], module.o_proj(full), atol=2e-6, rtol=0)


def test_hidden_pixels_have_no_say_and_dead_rows_are_zero():
    module, x = make(NeighborhoodAttention2D), image(6, 5)
    keep = torch.ones(2, 6, 5, dtype=torch.long)
    keep[1, :4] = 0
    x[1, :4, 2] = torch.nan
    result = module(x, attention_mask=keep.flatten(1), output_attentions=True, return_dict=True)
    heads = result.aux["heads"].view(2, 3, 6, 5, 4)
    alive = heads[1, :, 4:]
    assert alive.isfinite().all()
    assert not heads[1, :, :3, :1].any()
    assert torch.isneginf(result.lse.view(2, 3, 6, 5)[1, :, :3, :1]).all()
    weights = module.effective_map(x, head=0, batch=1, attention_mask=keep)
    np.testing.assert_allclose(weights.window(29)[1], result.attentions[1, 0, 29].numpy(), atol=2e-6)


def test_dead_rows_have_finite_gradients():
    module, x = make(), image(9).requires_grad_()
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :5] = False
    module(x, attention_mask=keep)[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_half_types_run_in_their_own_dtype():
    module, x = make(NeighborhoodAttention2D), image(7, 5)
    want = module(x)[0]
    got = module.to(torch.bfloat16)(x.bfloat16())[0]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.03


def test_dropout_acts_in_training_only():
    module, x = make(dropout=0.5), image(40)
    quiet = module(x)[0]
    assert torch.equal(module(x)[0], quiet)
    assert (module.train()(x)[0] - quiet).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 0}, "kernel_size and dilation must be at least 1"),
        ({"kernel_size": 3, "stride": 4}, "stride must be between 1 and kernel_size"),
        ({"kernel_size": (3, 3), "dims": 3}, "axes must be 1, 2 or 3 and agree"),
        ({"kernel_size": (3, 3), "dilation": (1, 1, 1)}, "dilation must be one number or 2"),
        ({"relative_position_bias": True}, "relative_position_bias needs the number of axes"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"implementation": "flex"}, "implementation must be one of auto, fused, natten, tiled"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_an_image_smaller_than_the_window_is_refused():
    with pytest.raises(
        NeighborhoodError, match=r"must fit into every axis; got \(3, 3\) \* \(2, 2\) over \(9, 5\)"
    ):
        make(dilation=2)(image(9, 5))


def test_the_maps_of_the_new_mechanisms_load_no_torch():
    code = (
        "import sys, attnlab_kernels.neighborhood, attnlab_kernels.difference_map, attnlab_kernels.expert_map\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_mask_of_one_axis_is_refused_by_name_and_the_full_one_says_nothing():
    module, x = make(), image(6, 7)
    with torch.no_grad():
        assert torch.equal(module(x, attention_mask=Full())[0], module(x)[0])
    for mask in (Causal(), Window(3), Padding(((0, 4), (0, 5)))):
        with pytest.raises(
            ValueError, match=r"attention_mask must say which pixels exist, .*; got .*causal= orders"
        ):
            module(x, attention_mask=mask)
        with pytest.raises(ValueError, match="attention_mask must say which pixels exist"):
            module.effective_map(x, head=0, attention_mask=mask)
