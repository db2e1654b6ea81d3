"""What a notebook asks of a run: arrays, figures, one token both ways, and the arguments of other viewers."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from attnlab.export.arrays import write_statistics
from attnlab.lab import Lab, Run
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.chart_style import colorscale
from attnlab.views.errors import NothingRecorded, ViewError
from attnlab.views.rollout import rollout
from attnlab.views.tokens import TokenLabels, token_labels
from attnlab_storage import results
from attnlab_storage.database import Store


@pytest.fixture
def run(traced: Any) -> Run:
    return Lab(traced.store).run_by_id(traced.run_ids[0])


def test_statistics_come_as_layers_by_heads(run: Run, traced: Any) -> None:
    found = run.statistics()
    assert found["layers"].tolist() == [0, 1]
    assert found["entropy"].shape == (2, 4)
    for row in results.measurements(traced.store, run.id, "entropy"):
        assert found["entropy"][row.layer, row.head] == row.value
    with np.load(io.BytesIO(write_statistics(traced.store, run.id))) as kept:
        np.testing.assert_array_equal(kept["entropy"], found["entropy"])
        assert json.loads(str(kept["facts"]))["id"] == run.id


def test_a_run_without_statistics_says_so(sqlite_store: Any, make_traced: Any) -> None:
    made = make_traced(sqlite_store, outcomes=["failed"])
    with pytest.raises(NothingRecorded, match="run 3 holds no statistics"):
        Lab(sqlite_store).run_by_id(made.run_ids[2]).statistics()
    with pytest.raises(NothingRecorded, match="holds no row_entropy of L0H1"):
        Lab(sqlite_store).run_by_id(made.run_ids[0]).curve("row_entropy", 0, 1)
    with pytest.raises(ViewError, match="curve must be one of row_entropy, column_mass; got 'x'"):
        Lab(sqlite_store).run_by_id(made.run_ids[0]).curve("x", 0, 1)


@pytest.mark.parametrize("head", [2, None])
def test_a_token_is_its_row_and_its_column(run: Run, traced: Any, head: int | None) -> None:
    heads = range(4) if head is None else [head]
    whole = np.mean([traced.reference(run.id, 1, one) for one in heads], 0)
    found = run.token(40, 1, head)
    np.testing.assert_allclose(found.sent, whole[40], atol=1e-6)
    np.testing.assert_allclose(found.received, whole[:, 40], atol=1e-6)
    assert found.top(3) == [(int(place), float(found.sent[place])) for place in np.argsort(-whole[40])[:3]]
    assert [place for place, _ in found.top_received(1)] == [int(whole[:, 40].argmax())]
    with pytest.raises(ViewError, match=r"row must be in 0\.\.76"):
        run.token(77, 1)


def test_a_figure_shows_the_region_and_escapes_the_tokens(run: Run, traced: Any) -> None:
    figure: Any = run.figure(1, 3, slice(70, 77), slice(60, 77))
    (heatmap,) = figure.data
    np.testing.assert_allclose(heatmap.z, traced.reference(run.id, 1, 3)[70:77, 60:77], atol=1e-6)
    assert heatmap.customdata[6][16] == "76 ⏎ → 76 ⏎"
    assert "&lt;script&gt;" in heatmap.customdata[5][15]
    assert run.figure(0, 0, width=8, height=4).data[0].customdata[0][0] == "0..18 → 0..8"  # type: ignore[attr-defined]


def test_other_viewers_get_the_exact_weights_of_a_span(run: Run, traced: Any) -> None:
    whole = np.stack([traced.reference(run.id, 1, head) for head in range(4)])
    circuits = run.circuitsvis(1, slice(10, 30))
    np.testing.assert_allclose(circuits["attention"], whole[:, 10:30, 10:30], atol=1e-6)
    assert circuits["tokens"][0] == "·token10"
    bert = run.bertviz([1], slice(10, 30))
    assert bert["include_layers"] == [0]
    assert torch.equal(bert["attention"][0][0], torch.from_numpy(circuits["attention"]))
    assert len(run.bertviz(span=slice(0, 5))["attention"]) == 2


def test_a_span_too_long_for_them_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlab.export.notebooks.MOST_TOKENS", 8)
    with pytest.raises(ViewError, match="span must be at most 8 tokens for these viewers; got 77"):
        run.circuitsvis(0)


def test_a_rollout_is_that_of_the_views(run: Run, traced: Any) -> None:
    np.testing.assert_array_equal(run.rollout(5).values, rollout(traced.store, run.id, 5).values)
    far = run.lab.distances(run, traced.run_ids[1]).most_changed(count=2)
    assert far[0].value >= far[1].value > 0


def test_signed_weights_are_drawn_around_zero_in_two_colours(sqlite_store: Store) -> None:
    spec = {
        "name": "signed",
        "module": {"dim": 24, "num_heads": 2},
        "vary": {"mechanism": ["differential"], "sequence_length": [13]},
        "record": ["maps"],
        "repeats": 1,
    }
    (row,) = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, parse_spec(spec)))
    heatmap: Any = Lab(sqlite_store).run_by_id(row.id).figure(0, 1).data[0]
    peak = np.abs(heatmap.z).max()
    assert heatmap.z.min() < 0
    assert (heatmap.zmin, heatmap.zmax) == pytest.approx((-peak, peak))
    assert [list(stop) for stop in heatmap.colorscale] == colorscale("blue_red")


def test_names_are_those_of_the_layers_own_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def labels_of(store: Store, run_id: int, layer: int | None = None) -> TokenLabels:
        own = token_labels(store, run_id)
        return own._replace(key=[f"layer{layer}" for _ in own.key])

    for module in ("attnlab.lab", "attnlab.export.notebooks"):
        monkeypatch.setattr(f"{module}.token_labels", labels_of)
    figure: Any = run.figure(1, 0, slice(0, 9), slice(0, 9))
    assert figure.data[0].customdata[0][0].endswith("→ 0 layer1")
    assert run.circuitsvis(1, slice(0, 5))["tokens"] == ["layer1"] * 5
    assert run.bertviz([1], slice(0, 5))["tokens"] == ["layer1"] * 5
