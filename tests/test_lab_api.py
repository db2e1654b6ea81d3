"""Laws of the Python API: objects over one store, exact arrays, errors that name what there is, no torch."""

import subprocess
import sys

import numpy as np
import pytest

import attnlab
from attnlab.lab import Lab, as_spec
from attnlab.problems import SpecError
from attnlab.views.errors import NotFound, NothingRecorded, ViewError
from attnlab_storage.errors import StoreOutdated
from attnlab_storage.listing import ListingError

SPEC = """
name: small
module: {dim: 16, num_heads: 2}
input: {synthetic: random}
vary: {mechanism: [multi_head, {sliding_window: {window_size: 4}}], sequence_length: [9, 17]}
record: [maps]
"""


@pytest.fixture
def lab(traced):
    return Lab(traced.store)


VIEW_SIDE = (
    "attnlab, attnlab.views.figures, attnlab.views.thumbnails, attnlab.describe, attnlab.compare, attnlab.estimate, "
    "attnlab.export.arrays, attnlab.export.bundle, attnlab.export.image, attnlab.export.report, "
    "attnlab.export.table, attnlab.lab"
)


def test_looking_at_results_loads_neither_torch_nor_ray():
    heavy = "'torch', 'ray', 'transformers', 'gradio', 'pandas'"
    code = f"import sys, {VIEW_SIDE}; attnlab.open_lab; print([x for x in ({heavy}) if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_map_is_the_exact_region_and_rebuilds_from_its_arrays(lab, traced):
    run = lab.run_by_id(traced.run_ids[0])
    region = run.map(layer=1, head=3, rows=slice(0, 64), cols=slice(None, 50))
    np.testing.assert_allclose(region, traced.reference(run.id, 1, 3)[:64, :50], atol=2e-6)
    scores = run.query(1, 3).astype(np.float64) @ run.key(1, 3).T * 8**-0.5 - run.lse(1, 3)[:, None]
    rebuilt = np.where(traced.arrays[run.id, 1]["allowed"], np.exp(scores), 0)
    np.testing.assert_allclose(rebuilt, run.map(1, 3), atol=2e-6)
    assert run.viewport(1, 3, height=7, width=11).values.shape == (7, 11)


def test_a_run_says_what_it_has(lab, traced):
    run = lab.run_by_id(traced.run_ids[1])
    assert (run.outcome, run.layers, run.heads) == ("succeeded", [0, 1], 4)
    assert run.tokens.raw_key == traced.tokens
    assert len(run.measurements("entropy", layer=1)) == 4
    assert run.document()["id"] == run.id
    assert repr(run) == f"Run({run.id}, sliding_window, 77 tokens, succeeded)"


def test_errors_name_the_layers_and_heads_that_there_are(lab, traced):
    run = lab.run_by_id(traced.run_ids[0])
    with pytest.raises(ViewError, match=r"layer must be one of 0\.\.1 of run 1; got 5"):
        run.map(layer=5, head=2)
    with pytest.raises(ViewError, match=r"head must be in 0\.\.3 for layer 1 of run 1; got 4"):
        run.key(layer=1, head=4)
    with pytest.raises(NotFound):
        lab.run_by_id(77)
    with pytest.raises(NotFound):
        lab.experiment(77)
    with pytest.raises(ListingError, match="filter"):
        lab.runs(colour="red")


def test_submitting_queues_the_grid_and_nothing_when_the_spec_is_wrong(lab, tmp_path):
    before = len(lab.experiments())
    experiment = lab.submit(SPEC)
    assert (experiment.name, experiment.states) == ("small", {"queued": 4})
    assert [run.row.sequence_length for run in experiment.runs] == [9, 17, 9, 17]
    assert experiment.runs[0].outcome is None
    with pytest.raises(NothingRecorded, match="it is queued"):
        experiment.runs[0].map(0, 0)
    with pytest.raises(SpecError, match="did you mean 'multi_head'"):
        lab.submit(SPEC.replace("multi_head", "many_heads"))
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    assert as_spec(path) == as_spec(SPEC) == as_spec(as_spec(SPEC)) == as_spec(as_spec(SPEC).to_dict())
    with pytest.raises(TypeError, match="got int"):
        as_spec(3)  # type: ignore[arg-type]
    assert len(lab.experiments()) == before + 1


def test_runs_are_found_by_their_columns(lab, traced):
    assert [run.id for run in lab.runs(mechanism="sliding_window")] == [traced.run_ids[1]]
    assert [run.id for run in lab.runs(sort="id")] == traced.run_ids
    assert lab.runs(state="failed") == []


def test_comparing_takes_runs_and_ids(lab, traced):
    a, b = (lab.run_by_id(run_id) for run_id in traced.run_ids)
    assert lab.compare(a, b.id).run_ids == traced.run_ids


def test_an_experiment_travels_as_a_zip(lab, traced, tmp_path):
    path = tmp_path / "a.zip"
    lab.experiment(traced.experiment_id).export_bundle(path)
    imported = lab.import_bundle(path)
    assert imported.id != traced.experiment_id
    np.testing.assert_array_equal(imported.runs[1].map(0, 2), lab.run_by_id(traced.run_ids[1]).map(0, 2))
    assert imported.document()["runs"][0]["latency_ms"]["samples"]


def test_open_lab_makes_the_embedded_database_but_never_upgrades_one(home, tmp_path):
    with attnlab.open_lab() as lab:
        assert lab.experiments() == []
        assert (home / "attnlab.db").exists()
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(StoreOutdated, match="attnlab migrate"):
        attnlab.open_lab(f"sqlite:///{empty}")


def test_estimating_asks_the_store_for_its_history(lab):
    assert lab.estimate(SPEC).runs == 4
