"""Rotary positions: tables that stay exact far out, scores that depend on distance alone, both layouts."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from attnlab_kernels.positions import Layout, rope_tables, rotate

LAYOUTS: list[Layout] = ["half_split", "interleaved"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_distance_alone(layout):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(i: int, j: int) -> float:
        turned_q = rotate(q, *rope_tables(torch.tensor([i]), 16, layout=layout), layout=layout)
        turned_k = rotate(k, *rope_tables(torch.tensor([j]), 16, layout=layout), layout=layout)
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(1005, 1000), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_keeps_lengths_and_starts_at_nothing(layout):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    turned = rotate(x, *rope_tables(torch.arange(5), 8, layout=layout), layout=layout)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


def test_the_layouts_differ_by_a_permutation_of_dimensions():
    x = torch.randn(1, 2, 7, 10, dtype=torch.float64)
    order = torch.cat((torch.arange(0, 10, 2), torch.arange(1, 10, 2)))
    positions = torch.arange(7)
    half = rotate(x[..., order], *rope_tables(positions, 10))
    pairs = rotate(x, *rope_tables(positions, 10, layout="interleaved"), layout="interleaved")
    torch.testing.assert_close(half, pairs[..., order], atol=1e-6, rtol=0)


def test_half_split_is_what_llama_does():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=128)
    q, k = torch.randn(2, 2, 4, 9, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(9)[None])
    theirs_q, theirs_k = apply_rotary_pos_emb(q, k, cos, sin)
    tables = rope_tables(torch.arange(9), 16, base=10000.0)
    torch.testing.assert_close(rotate(q, *tables), theirs_q, atol=2e-6, rtol=0)
    torch.testing.assert_close(rotate(k, cos, sin), theirs_k, atol=2e-6, rtol=0)


def test_an_angle_far_out_is_still_exact():
    cos, _ = rope_tables(torch.tensor([131_071]), 64)
    exact = torch.cos(131_071 * 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    assert (cos[0, :32].double() - exact).abs().max() < 1e-7


def test_half_types_are_rotated_in_float32():
    x = torch.randn(1, 1, 300, 16)
    tables = rope_tables(torch.arange(300) + 5000, 16)
    exact = rotate(x.bfloat16().double(), *tables)
    error = (rotate(x.bfloat16(), *tables).double() - exact).abs().max()
    assert error < 2**-8 * exact.abs().max()


def test_part_of_the_dimensions_may_turn():
    x = torch.randn(2, 1, 5, 12)
    tables = rope_tables(torch.arange(5).expand(2, 5), 6)
    turned = rotate(x, *tables)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    torch.testing.assert_close(turned[..., :6], rotate(x[..., :6], *tables))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: rope_tables(torch.arange(3), 7),
            r"dim of a rotary embedding must be even and positive; got 7",
        ),
        (
            lambda: rope_tables(torch.arange(3), 8, layout=cast("Layout", "spiral")),
            r"layout must be .* got 'spiral'",
        ),
        (
            lambda: rotate(torch.ones(1, 1, 4, 8), *rope_tables(torch.arange(3), 8)),
            r"\[\.\., 4, <= 8\]; got \(3, 8\)",
        ),
    ],
)
def test_what_cannot_turn_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
