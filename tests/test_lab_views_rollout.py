"""Rollout of one position and of all, against the dense product of the layers in float64."""

from typing import Any

import numpy as np
import pytest

from attnlab.views import rollout as module
from attnlab.views.errors import ViewError
from attnlab.views.rollout import pooled_rollout, rollout


def dense(traced: Any, run_id: int, residual: float = 0.5) -> list[np.ndarray]:
    """The rollout after each number of layers from the top, by the book: matrix times matrix."""
    product = np.eye(77)
    found = [product]
    for layer in (1, 0):
        mean = np.mean([traced.reference(run_id, layer, head) for head in range(4)], 0)
        mixed = residual * np.eye(77) + (1 - residual) * mean
        product = product @ (mixed / mixed.sum(1, keepdims=True))
        found.append(product)
    return found


@pytest.mark.parametrize("cells", [1 << 20, 77 * 5])
@pytest.mark.parametrize("row", [0, 40, 76])
@pytest.mark.parametrize("residual", [0.5, 0.1])
def test_a_row_of_the_rollout_is_that_of_the_product(
    traced: Any, row: int, residual: float, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE_CELLS", cells)
    for run_id in traced.run_ids:
        found = rollout(traced.store, run_id, row, residual=residual)
        wanted = dense(traced, run_id, residual)
        np.testing.assert_allclose(found.values[0], wanted[-1][row], atol=1e-5)
        np.testing.assert_allclose(found.flow[:, 0], [step[row] for step in wanted], atol=1e-5)
        assert found.values.sum() == pytest.approx(1, abs=1e-5)
        assert (found.layers, found.rows) == ([1, 0], [(row, row + 1)])


@pytest.mark.parametrize("height", [1, 10, 77, 200])
def test_all_rows_pooled_are_the_means_of_the_product(traced: Any, height: int) -> None:
    run_id = traced.run_ids[0]
    told: list[float] = []
    found = pooled_rollout(traced.store, run_id, height, progress=told.append)
    product = dense(traced, run_id)[-1]
    wanted = [product[start:stop].mean(0) for start, stop in found.rows]
    assert len(wanted) == min(height, 77)
    np.testing.assert_allclose(found.values, wanted, atol=1e-5)
    assert told == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1.0]  # after every head


def test_with_nothing_but_residual_every_token_stays_where_it_is(traced: Any) -> None:
    found = rollout(traced.store, traced.run_ids[0], 30, residual=1.0)
    np.testing.assert_array_equal(found.flow[:, 0], np.eye(77)[[30, 30, 30]])


def test_only_rows_with_a_share_are_read(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = module._tiles

    def counting(full_map: Any, rows: np.ndarray) -> Any:
        for block, keys, weights in real(full_map, rows):
            read.append(block.stop - block.start)
            yield block, keys, weights

    monkeypatch.setattr(module, "_tiles", counting)
    rollout(traced.store, traced.run_ids[0], 20)
    assert read == [1] * 4 + [21] * 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda store, run_id: rollout(store, run_id, 77), "row must be in 0..76; got 77"),
        (
            lambda store, run_id: rollout(store, run_id, 3, residual=1.5),
            "residual must be from 0 to 1; got 1.5",
        ),
        (lambda store, run_id: pooled_rollout(store, run_id, 0), "height must be in 1..256 rows; got 0"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused(traced: Any, call: Any, says: str) -> None:
    with pytest.raises(ViewError, match=says):
        call(traced.store, traced.run_ids[0])


def test_a_rollout_needs_every_layer(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, traces = module.recorded(traced.store, traced.run_ids[0])
    monkeypatch.setattr(module, "recorded", lambda *_: (run, traces[1:]))
    with pytest.raises(ViewError, match=r"needs every layer from 0; run 1 keeps \[1\]"):
        rollout(traced.store, traced.run_ids[0], 3)


def test_between_two_sequences_there_is_no_way_through_the_layers(
    traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "attention_role", lambda run, trace: "cross")
    with pytest.raises(ViewError, match="run 1 has attention between two sequences"):
        rollout(traced.store, traced.run_ids[0], 3)
