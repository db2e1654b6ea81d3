"""Map statistics and pooled maps: every implementation against plain formulas over the whole map in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.map_pooling import streamed
from attnlab_kernels.operations.map_pooling.api import IMPLEMENTATIONS, map_statistics, pooled_map, supports
from attnlab_kernels.operations.softmax.api import Unsupported, attend

MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(6),
    Window(3, 4),
    Causal() & Padding(((2, 33), (5, 20))),
    Padding(((0, 0), (7, 9))),
]


def inputs(num_queries: int, num_keys: int, dtype: torch.dtype, dim: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    q = torch.randn(2, 2, num_queries, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 1, num_keys, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def exact_map(q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Probabilities ``[B, H, Sq, Sk]`` and log-sum-exp in float64, read off the softmax of ones."""
    q, k = q.double(), k.double()
    eye = torch.eye(k.shape[2], dtype=torch.float64).expand(2, 1, -1, -1)
    result = attend(q, k, eye, mask=mask, implementation="eager")
    assert result.lse is not None
    return result.output, result.lse


def expected(weights: Tensor, mask: Mask) -> dict[str, Tensor]:
    """The statistics as a reader would write them, pair by pair."""
    num_queries, num_keys = weights.shape[2:]
    place = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)
    first = torch.tensor([mask.band().key_interval(num_keys, b)[0] for b in range(2)])
    return {
        "row_sum": weights.sum(3),
        "entropy": torch.special.entr(weights).sum(3),
        "row_max": weights.max(3).values,
        "square_sum": (weights**2).sum(3),
        "distance": (weights * (place - key).abs()).sum(3),
        "sink_mass": torch.stack([weights[b, :, :, first[b] : first[b] + 2].sum(2) for b in range(2)]),
        "previous": torch.where(key == place - 1, weights, 0).sum(3),
        "column_sum": weights.sum(2),
        "column_max": weights.max(2).values,
    }


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize("sizes", [(37, 37), (5, 41), (23, 9)], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_statistics_are_those_of_the_whole_map(name, sizes, mask, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK_CELLS", 300)
    q, k = inputs(sizes[0], sizes[1], torch.float32)
    weights, lse = exact_map(q, k, mask)
    if not supports(name, q, k):
        with pytest.raises(Unsupported):
            map_statistics(q, k, lse, mask=mask, implementation=name)
        return
    found, ran = map_statistics(q, k, lse, mask=mask, sinks=2, implementation=name)
    assert ran == name
    for field, want in expected(weights, mask).items():
        got = getattr(found, field).double()
        assert torch.allclose(got, want, atol=2e-5, rtol=1e-5), (field, float((got - want).abs().max()))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@pytest.mark.parametrize("cell", [(1, 1), (4, 32), (64, 64), (5, 7)], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_pooled_map_is_the_maximum_and_mean_of_its_cells(name, cell, mask, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK_CELLS", 300)
    q, k = inputs(37, 41, torch.float32)
    weights, lse = exact_map(q, k, mask)
    if not supports(name, q, k, cell=cell):
        assert supports(name, q, k, cell=cell).reason
        with pytest.raises(Unsupported):
            pooled_map(q, k, lse, mask=mask, cell=cell, implementation=name)
        return
    found, _ = pooled_map(q, k, lse, mask=mask, cell=cell, implementation=name)
    for row in range(found.maximum.shape[2]):
        for column in range(found.maximum.shape[3]):
            part = weights[:, :, cell[0] * row :, cell[1] * column :][:, :, : cell[0], : cell[1]]
            assert torch.allclose(found.maximum[:, :, row, column].double(), part.amax((2, 3)), atol=2e-6)
            assert torch.allclose(found.mean[:, :, row, column].double(), part.mean((2, 3)), atol=2e-6)


def test_a_pooled_map_is_what_the_viewer_pools():
    q, k = inputs(32, 64, torch.float32)
    _, lse = exact_map(q, k, Causal())
    drawn = SoftmaxMap(q[1, 1].numpy(), k[1, 0].numpy(), lse[1, 1].numpy(), 12**-0.5, Causal())
    found, _ = pooled_map(q, k, lse, mask=Causal(), cell=(4, 8))
    for reduce, got in (("max", found.maximum), ("mean", found.mean)):
        want = torch.from_numpy(drawn.pool(slice(None), slice(None), 8, 8, reduce))
        assert torch.allclose(got[1, 1], want, atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_lies_in_padded_slots_never_shows(name):
    q, k = inputs(9, 20, torch.float32)
    mask = Causal() & Padding(((3, 15), (0, 12)))
    _, lse = exact_map(q, k, mask)
    if not supports(name, q, k):
        return
    clean, _ = map_statistics(q, k, lse, mask=mask, implementation=name)
    k[0, :, :3] = k[0, :, 15:] = k[1, :, 12:] = torch.nan
    dirty, _ = map_statistics(q, k, lse, mask=mask, implementation=name)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_a_bias_of_minus_infinity_counts_as_zero_weight():
    q, k = (tensor.double() for tensor in inputs(6, 7, torch.float32))
    bias = torch.zeros(6, 7, dtype=torch.float64)
    bias[:, 3:] = -torch.inf
    bias[2] = -torch.inf
    lse = attend(q, k, k, bias=bias, implementation="eager").lse
    assert lse is not None
    slow, _ = map_statistics(q, k, lse, bias=bias, implementation="eager")
    fast, _ = map_statistics(q, k, lse, bias=bias, implementation="streamed")
    for one, other in zip(slow, fast, strict=True):
        assert one.isfinite().all()
        assert torch.allclose(one, other, atol=1e-12)
    assert not slow.row_sum[:, :, 2].any()


def test_only_pairs_inside_a_window_are_scored(monkeypatch):
    visited = []
    blocks = streamed._blocks

    def counting(*arguments, **named):
        for block in blocks(*arguments, **named):
            visited.append(block.weights[0, 0].numel())
            yield block

    monkeypatch.setattr(streamed, "_blocks", counting)
    monkeypatch.setattr(streamed, "BLOCK_CELLS", 1 << 14)
    q, k = inputs(1024, 1024, torch.float32, dim=4)
    _, lse = exact_map(q, k, Window(31))
    map_statistics(q, k, lse, mask=Window(31))
    assert sum(visited) < 3 * Window(31).count(1024, 1024)


def test_wrong_arguments_are_named():
    q, k = inputs(4, 5, torch.float32)
    lse = torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match="sinks must be at least 1 key; got 0"):
        map_statistics(q, k, lse, sinks=0)
    with pytest.raises(ValueError, match="cell must be at least 1 row"):
        pooled_map(q, k, lse, cell=(0, 4))
    with pytest.raises(ValueError, match="lse \\[B, Hq, Sq\\]"):
        map_statistics(q, k, lse[:, :1])
    with pytest.raises(ValueError, match="implementation must be one of auto, eager, streamed, triton"):
        map_statistics(q, k, lse, implementation="fast")
