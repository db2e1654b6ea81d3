"""Rotary positions: tables that stay exact far out, scores that depend on distance alone, both layouts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from attnlab_kernels import GroupedQueryAttention, MultiHeadAttention
from attnlab_kernels.positions import Layout, Rotary, rope_tables, rotate
from attnlab_kernels.rope_scaling import NEEDED, rope_frequencies

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


TRAINED = {"original_max_position_embeddings": 64}
SCALINGS: dict[str, Any] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, **TRAINED},
    "yarn_mscale": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, **TRAINED},
    "yarn_untruncated": {"factor": 8.0, "truncate": False, "attention_factor": 1.25, **TRAINED},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        **TRAINED,
    },
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED},
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [20, 200])
def test_frequencies_are_those_of_transformers(name, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.split("_")[0]
    scaling = {"rope_type": kind, **SCALINGS[name]}
    # transformers' dynamic reads the trained length from the config
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=64 if kind == "dynamic" else 256,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    ours, our_factor = rope_frequencies(16, scaling=TRAINED | scaling, length=length)
    torch.testing.assert_close(ours.float(), theirs, atol=0, rtol=3e-6)
    assert our_factor == pytest.approx(factor, rel=1e-12)
    assert name == "dynamic" or not torch.allclose(ours, rope_frequencies(16)[0])


def test_every_scaling_that_transformers_knows_is_here():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(NEEDED) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [20, 100])
def test_a_module_rotates_as_llama_does_with_this_scaling(name, length):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    kind = name.split("_")[0]
    scaling = {"rope_type": kind, **SCALINGS[name]}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64 if kind == "dynamic" else 256,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = LlamaAttention(config, layer_idx=0).eval()
    ours = GroupedQueryAttention(64, 4, 2, use_rotary=Rotary(scaling=TRAINED | scaling)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, positions = torch.randn(1, length, 64), torch.arange(length)[None]
    future = torch.full((length, length), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = theirs(x, LlamaRotaryEmbedding(config)(x, positions), future)[0]
        torch.testing.assert_close(ours(x)[0], expected, atol=2e-6, rtol=0)


def test_part_of_a_head_turns_as_in_gpt_neox():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = GPTNeoXAttention(config, layer_idx=0).eval()
    ours = MultiHeadAttention(64, 4, causal=True, use_rotary=Rotary(500.0, fraction=0.25)).eval()
    state = theirs.state_dict()
    packed = {part: state[f"query_key_value.{part}"].unflatten(0, (4, 3, 16)) for part in ("weight", "bias")}
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        getattr(ours, name).load_state_dict({part: t[:, index].flatten(0, 1) for part, t in packed.items()})
    ours.o_proj.load_state_dict({part: state[f"dense.{part}"] for part in ("weight", "bias")})
    x, positions = torch.randn(1, 11, 64), torch.arange(11)[None]
    future = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        tables = GPTNeoXRotaryEmbedding(config)(x, positions)
        expected = theirs(x, future, position_embeddings=tables)[0]
        torch.testing.assert_close(ours(x)[0], expected, atol=1e-6, rtol=0)


def test_interleaved_pairs_turn_as_in_gpt_j():
    from transformers import GPTJConfig
    from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJRotaryEmbedding

    config = GPTJConfig(n_embd=64, n_head=4, rotary_dim=8, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = GPTJAttention(config, layer_idx=0).eval()
    rotary = Rotary(layout="interleaved", fraction=0.5)
    ours = MultiHeadAttention(64, 4, bias=False, causal=True, use_rotary=rotary).eval()
    state = {name.replace("out_proj", "o_proj"): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: state[name] for name in ours.state_dict()}, strict=True)
    x = torch.randn(1, 11, 64)
    future = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        tables = GPTJRotaryEmbedding(config)(x, torch.arange(11)[None])
        expected = theirs(x, tables, future)[0]
        torch.testing.assert_close(ours(x)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "magic"}, "rope_type must be one of default, linear, .*; got 'magic'"),
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn' needs original_max_position_embeddings"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], **TRAINED}, "8 numbers"),
    ],
)
def test_a_scaling_without_its_numbers_is_refused(scaling, says):
    with pytest.raises(ValueError, match=says):
        rope_tables(torch.arange(3), 16, scaling=scaling)


def test_a_rotation_of_no_share_is_refused():
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1; got 0"):
        Rotary(fraction=0)
