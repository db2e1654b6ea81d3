"""Laws of exported numbers: tables read back equal, arrays are the exact map, and what is too large is refused."""

import io
import json
import math
import re

import numpy as np
import pytest
from pyarrow import csv, parquet
from safetensors.numpy import load as load_safetensors

from attnlab.export import arrays, table
from attnlab.views.errors import NotFound, ViewError
from attnlab_storage import queue, results


@pytest.fixture
def made(sqlite_store, make_traced):
    return make_traced(sqlite_store, outcomes=["unsupported"])


def test_every_number_and_every_sample_is_a_row_with_its_unit_and_run(made):
    rows = table.measurement_rows(made.store, made.run_ids)
    for run_id in made.run_ids[:2]:
        stored = results.measurements(made.store, run_id)
        mine = [row for row in rows if row["run"] == run_id]
        whole = [row for row in mine if row["sample"] is None]
        assert [(r["name"], r["layer"], r["head"], r["value"], r["unit"]) for r in whole] == [
            (r.name, r.layer, r.head, r.value, r.unit) for r in stored
        ]
        latency = next(row for row in stored if row.name == "latency")
        assert [
            row["value"] for row in mine if row["name"] == "latency" and row["sample"] is not None
        ] == latency.samples
    last = [row for row in rows if row["run"] == made.run_ids[2]]
    assert [(row["outcome"], row["name"], row["value"]) for row in last] == [("unsupported", None, None)]
    assert all(set(row) == set(table.COLUMNS) for row in rows)


def test_csv_parquet_and_json_read_back_equal(made):
    rows = table.measurement_rows(made.store, made.run_ids)
    assert (
        parquet.read_table(io.BytesIO(table.write_table(made.store, made.run_ids, "parquet"))).to_pylist()
        == rows
    )
    assert json.loads(table.write_table(made.store, made.run_ids, "json")) == rows
    read = csv.read_csv(
        io.BytesIO(table.write_table(made.store, made.run_ids, "csv")),
        convert_options=csv.ConvertOptions(column_types=table.measurement_table(made.store, []).schema),
    ).to_pylist()
    assert [row["value"] for row in read] == [row["value"] for row in rows]
    assert [row["experiment_name"] for row in read] == [row["experiment_name"] for row in rows]


def test_numbers_that_are_not_finite_are_null_in_json(made):
    point = {key: getattr(results.get_run(made.store, made.run_ids[0]), key) for key in queue.POINT_KEYS}
    run_id = queue.submit(made.store, name="n", spec={}, spec_hash="1", points=[point]).run_ids[0]
    claim = queue.claim(made.store, "tests", run_id=run_id)
    assert claim is not None
    with results.recording(made.store, claim) as session:
        row = results.MeasurementRow("latency", math.nan, "ms", samples=[math.inf, 1.5])
        results.record_measurements(session, claim, [row])
    read = json.loads(table.write_table(made.store, [run_id], "json"))
    assert [row["value"] for row in read] == [None, None, 1.5]


def test_an_unknown_format_or_run_is_refused(made):
    with pytest.raises(ViewError, match="csv, parquet, json; got 'xls'"):
        table.write_table(made.store, made.run_ids, "xls")
    with pytest.raises(NotFound):
        table.write_table(made.store, [99])


@pytest.mark.parametrize("region", [(None, None), ((3, 40), (0, 77)), ((76, 77), (70, 77))])
def test_an_npz_holds_the_exact_probabilities_and_the_tokens(made, region):
    run_id = made.run_ids[1]
    read = np.load(io.BytesIO(arrays.write_map(made.store, run_id, 1, 2, *region)), allow_pickle=False)
    rows, cols = (slice(*part) if part else slice(0, 77) for part in region)
    np.testing.assert_allclose(read["map"], made.reference(run_id, 1, 2)[rows, cols], atol=2e-6)
    assert read["map"].dtype == np.float32
    assert read["query_tokens"].tolist() == made.tokens[rows]
    assert read["key_tokens"].tolist() == made.tokens[cols]
    assert read["rows"].tolist() == [rows.start, rows.stop]
    facts = json.loads(str(read["facts"]))
    assert (facts["id"], facts["layer"], facts["head"], facts["chosen"]) == (run_id, 1, 2, "banded")


def test_safetensors_hold_the_same_numbers_and_the_tokens_in_their_metadata(made):
    run_id = made.run_ids[0]
    data = arrays.write_map(made.store, run_id, 0, 1, (5, 9), (0, 7), "safetensors")
    npz = np.load(io.BytesIO(arrays.write_map(made.store, run_id, 0, 1, (5, 9), (0, 7))))
    np.testing.assert_array_equal(load_safetensors(data)["map"], npz["map"])
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["query_tokens"]) == made.tokens[5:9]


@pytest.mark.parametrize("format", arrays.FORMATS)
def test_the_exported_trace_rebuilds_the_map(made, format):
    run_id = made.run_ids[0]
    data = arrays.write_trace(made.store, run_id, 1, format)
    read = load_safetensors(data) if format == "safetensors" else np.load(io.BytesIO(data))
    np.testing.assert_array_equal(read["query"], made.arrays[run_id, 1]["query"])
    np.testing.assert_array_equal(read["key"], made.arrays[run_id, 1]["key"])
    scores = float(read["scale"]) * read["query"][3].astype(np.float64) @ read["key"][1].T
    rebuilt = np.where(made.arrays[run_id, 1]["allowed"], np.exp(scores - read["lse"][3][:, None]), 0)
    np.testing.assert_allclose(rebuilt, made.reference(run_id, 1, 3), atol=2e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda store, run: arrays.map_arrays(store, run, 0, 0, max_bytes=23_715),
            "77 weights would take 23.7 kB",
        ),
        (
            lambda store, run: arrays.trace_arrays(store, run, 0, max_bytes=10),
            "tensors of layer 0 would take 16.0 kB",
        ),
        (lambda store, run: arrays.write_map(store, run, 0, 0, format="pt"), "npz, safetensors; got 'pt'"),
        (lambda store, run: arrays.write_map(store, run, 0, 4), "head must be in 0..3"),
        (lambda store, run: arrays.write_trace(store, run, 7), "layer must be one of 0..1"),
    ],
)
def test_what_is_too_large_or_not_there_is_refused(made, call, says):
    with pytest.raises(ViewError, match=re.escape(says)):
        call(made.store, made.run_ids[0])


def test_a_map_at_the_limit_is_exported(made):
    found = arrays.map_arrays(made.store, made.run_ids[0], 0, 0, max_bytes=23_716)
    assert found["map"].nbytes == 23_716
