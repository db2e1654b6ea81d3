"""The catalog's small maps: each has the pattern of its mechanism, and is exact on the shared input."""

import numpy as np
import pytest

from attnlab.views.sample_maps import SCALE, TOKENS, sample_map, tokens
from attnlab.views.sample_pictures import sample_png, sample_text
from attnlab_kernels.catalog import MECHANISMS

ROW, COLUMN = np.indices((TOKENS, TOKENS))
SUMS = {"differential": 0.4}
CAUSAL = ["multi_head", "flash", "grouped_query", "multi_head_latent", "paged", "flash_attention_3", "ring"]


def softmax(allowed):
    query, key = tokens()
    scores = np.where(allowed, query @ key.T * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name != "switch_head"])
def test_rows_sum_to_what_the_mechanism_says(name):
    sums = sample_map(name).weights.sum(axis=1)
    np.testing.assert_allclose(sums, SUMS.get(name, 1), rtol=1e-5)


@pytest.mark.parametrize("name", [*CAUSAL, "chunked_prefill"])
def test_exact_mechanisms_share_the_causal_map(name):
    np.testing.assert_allclose(sample_map(name).weights, softmax(COLUMN <= ROW), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("self", ROW >= 0),
        ("sliding_window", (COLUMN <= ROW) & (ROW - COLUMN < 12)),
        ("sparse", (COLUMN <= ROW) & ((ROW - COLUMN < 8) | (COLUMN < 2))),
    ],
)
def test_a_pattern_is_the_softmax_over_its_pairs(name, allowed):
    np.testing.assert_allclose(sample_map(name).weights, softmax(allowed), atol=1e-6)


def test_linear_attention_is_the_normalised_product_of_features():
    query, key = (np.where(x > 0, x + 1, np.exp(x)) for x in tokens())
    weights = np.tril(query @ key.T)
    expected = weights / (weights.sum(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(sample_map("linear").weights, expected, atol=1e-6)


def test_the_difference_has_weights_below_zero_and_none_ahead():
    made = sample_map("differential")
    assert made.signed
    assert made.weights.min() < -0.05
    assert (made.weights[COLUMN > ROW] == 0).all()


def test_every_pixel_has_nine_neighbours_also_in_a_corner():
    weights = sample_map("neighborhood").weights
    assert ((weights > 0).sum(axis=1) == 9).all()
    corner = {(place // 7, place % 7) for place in np.flatnonzero(weights[0])}
    assert corner == {(y, x) for y in range(3) for x in range(3)}


def test_experts_pass_only_what_both_gates_let_through():
    weights = sample_map("switch_head").weights
    assert 0 < (weights > 0).mean() < 0.3
    assert (weights <= 1).all()


def test_shapes_differ_where_keys_are_others():
    assert sample_map("cross").weights.shape == (48, 30)
    assert sample_map("efficient").weights.shape == (64, 16)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_map_is_a_picture_and_a_text(name):
    assert sample_png(name).startswith("data:image/png;base64,")
    assert len(sample_png(name)) < 40_000
    lines = sample_text(name).splitlines()
    assert 16 <= len(lines) <= 24
    assert max(map(len, lines)) <= 48
    assert sample_map(name).words
