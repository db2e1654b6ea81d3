"""Attention flow against networkx, against every cut of a tiny network, and where its answer is known."""

import itertools
from typing import Any

import networkx
import numpy as np
import pytest

from attnlab.views import flow as module
from attnlab.views.errors import ViewError
from attnlab.views.flow import attention_flow, max_flows


def capacities(rng: np.random.Generator, layers: int, tokens: int, causal: bool = True) -> np.ndarray:
    """Rows that sum to 1, some weights exactly 0."""
    weights = rng.random((layers, tokens, tokens)) ** 3 * (rng.random((layers, tokens, tokens)) > 0.3)
    weights += np.eye(tokens) * 0.1
    weights = np.tril(weights) if causal else weights
    return weights / weights.sum(2, keepdims=True)


def by_networkx(layers: np.ndarray, target: int) -> list[float]:
    graph = networkx.DiGraph()
    depth, tokens, _ = layers.shape
    graph.add_nodes_from(itertools.product(range(depth + 1), range(tokens)))
    for layer, above, below in np.argwhere(layers > 0).tolist():
        graph.add_edge((layer + 1, above), (layer, below), capacity=layers[layer, above, below])
    return [networkx.maximum_flow_value(graph, (depth, target), (0, token)) for token in range(tokens)]


def by_every_cut(layers: np.ndarray, target: int, token: int) -> float:
    """The capacity of the smallest cut (Ford and Fulkerson 1956): every set of nodes on the target's side."""
    depth, tokens, _ = layers.shape
    nodes = list(itertools.product(range(depth + 1), range(tokens)))
    free = [node for node in nodes if node not in ((depth, target), (0, token))]
    smallest = float("inf")
    for chosen in itertools.product((False, True), repeat=len(free)):
        side = dict(zip(free, chosen, strict=True)) | {(depth, target): True, (0, token): False}
        cut = sum(
            layers[layer, above, below]
            for layer, above, below in np.ndindex(layers.shape)
            if side[layer + 1, above] and not side[layer, below]
        )
        smallest = min(smallest, float(cut))
    return smallest


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("layers", "tokens"), [(1, 5), (2, 7), (5, 9)])
def test_flows_are_those_of_networkx(layers: int, tokens: int, causal: bool) -> None:
    weights = capacities(np.random.default_rng(layers), layers, tokens, causal)
    for target in (0, tokens // 2, tokens - 1):
        found, edges = max_flows(weights, target)
        assert edges <= weights.size
        np.testing.assert_allclose(found, by_networkx(weights, target), atol=0.5 * edges / module.SCALE)


def test_a_flow_is_the_smallest_of_all_cuts() -> None:
    weights = capacities(np.random.default_rng(7), 2, 3, causal=False)
    for target, token in itertools.product(range(3), repeat=2):
        assert max_flows(weights, target)[0][token] == pytest.approx(
            by_every_cut(weights, target, token), abs=1e-7
        )


def test_through_one_layer_the_flow_is_the_weight() -> None:
    weights = capacities(np.random.default_rng(3), 1, 11)
    np.testing.assert_allclose(max_flows(weights, 8)[0], weights[0, 8], atol=1e-8)


@pytest.mark.parametrize(("row", "span"), [(40, None), (76, (60, 77)), (30, (20, 45))])
def test_the_flow_of_a_run_is_that_of_its_own_maps(
    traced: Any, row: int, span: tuple[int, int] | None
) -> None:
    run_id = traced.run_ids[1]
    told: list[float] = []
    found = attention_flow(traced.store, run_id, row, span, residual=0.4, progress=told.append)
    start, stop = span or (0, row + 1)
    assert (found.start, found.stop, found.row) == (start, stop, row)
    part = slice(start, stop)
    means = [np.mean([traced.reference(run_id, layer, head) for head in range(4)], 0) for layer in range(2)]
    layers = np.stack([0.6 * mean[part, part] + 0.4 * np.eye(stop - start) for mean in means])
    np.testing.assert_allclose(found.values, by_networkx(layers, row - start), atol=1e-5)
    inside = [mean[start : row + 1, part].sum(1).mean() for mean in means]
    np.testing.assert_allclose(found.inside, inside, atol=1e-5)
    assert told[-1] == 1.0
    assert found.error < 1e-4


def test_no_token_gets_more_flow_than_leaves_the_target_and_a_later_one_gets_none(traced: Any) -> None:
    found = attention_flow(traced.store, traced.run_ids[0], 50, (30, 70))
    assert (found.values <= 1 + 1e-6).all()
    assert (found.values[: 50 - 30 + 1] > 0).all()
    np.testing.assert_array_equal(found.values[50 - 30 + 1 :], 0)


@pytest.mark.parametrize(
    ("row", "span", "options", "says"),
    [
        (77, None, {}, "row must be in 0..76; got 77"),
        (10, (11, 20), {}, "at most 96 tokens start:stop of 77 that hold row 10; got 11:20"),
        (10, (0, 90), {}, "got 0:90"),
        (10, None, {"residual": -0.1}, "residual must be from 0 to 1; got -0.1"),
    ],
)
def test_a_flow_that_cannot_be_is_refused(traced: Any, row: int, span: Any, options: Any, says: str) -> None:
    with pytest.raises(ViewError, match=says):
        attention_flow(traced.store, traced.run_ids[0], row, span, **options)


def test_negative_weights_are_no_capacities(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_signed", lambda trace: True)
    with pytest.raises(ViewError, match="a flow needs weights of at least 0; run 1 has signed maps"):
        attention_flow(traced.store, traced.run_ids[0], 10)
