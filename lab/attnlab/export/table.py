"""Long tidy tables: measurements with their unit and what tells their run apart, and the weights of a map's region."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlab.describe import SPEED, hides_speed, run_brief
from attnlab.export.arrays import map_arrays
from attnlab.views.errors import ViewError
from attnlab.views.viewport import Region, find_run
from attnlab_storage import results
from attnlab_storage.database import Store

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("csv", "parquet", "json")
MAP_FORMATS = ("parquet", "csv")
MOST_TABLE_BYTES = 2**27  # of float32 weights, each of which is a row
# name of a column -> its Arrow type
COLUMNS = {
    "run": "int64",
    "experiment": "int64",
    "experiment_name": "string",
    "mechanism": "string",
    "parameters": "string",
    "implementation": "string",
    "kernels": "string",
    "provenance": "string",
    "compilation": "string",
    "model": "string",
    "sequence_length": "int64",
    "dtype": "string",
    "batch_size": "int64",
    "phase": "string",
    "outcome": "string",
    "reason": "string",
    "name": "string",
    "layer": "int64",
    "head": "int64",
    "sample": "int64",
    "value": "float64",
    "unit": "string",
}


def measurement_rows(store: Store, run_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One row a measurement (``sample`` None) and one for each of its samples; the keys are `COLUMNS`.

    A run without a measurement, such as an unsupported one, has one row with ``name`` None: it stays.

    Raises NotFound for an unknown run.
    """
    rows = []
    for run_id in run_ids:
        run = find_run(store, run_id)
        brief = run_brief(run)
        facts = {name: brief.get(name) for name in COLUMNS} | {
            "run": run.id,
            "experiment_name": run.experiment_name,
            "parameters": json.dumps(run.parameters, sort_keys=True),
            "kernels": "+".join(brief["kernels"]),
            **{
                name: json.dumps((run.summary or {}).get(name), sort_keys=True)
                for name in ("provenance", "compilation")
            },
            "outcome": run.state,
            "reason": run.reason,
        }
        measured = results.measurements(store, run_id)
        if hides_speed(run):
            measured = [row for row in measured if row.name not in SPEED]
        for row in measured:
            one = facts | {"name": row.name, "layer": row.layer, "head": row.head, "unit": row.unit}
            rows.append(one | {"value": row.value})
            rows += [one | {"sample": i, "value": sample} for i, sample in enumerate(row.samples or [])]
        if not measured:
            rows.append(facts)
    return rows


def measurement_table(store: Store, run_ids: Sequence[int]) -> pyarrow.Table:
    """`measurement_rows` as an Arrow table."""
    import pyarrow

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])
    return pyarrow.Table.from_pylist(measurement_rows(store, run_ids), schema=schema)


def write_table(store: Store, run_ids: Sequence[int], format: str = "csv") -> bytes:
    """The measurements of some runs as the bytes of a CSV, Parquet or JSON (list of objects) file.

    Numbers are written in full, so that they read back equal; a number that is not finite is null in JSON.

    Raises ViewError for another format, NotFound for an unknown run.
    """
    if format == "json":
        return json.dumps([_finite(row) for row in measurement_rows(store, run_ids)], indent=1).encode()
    _check_format(format, FORMATS)
    return _table_bytes(measurement_table(store, run_ids), format)


def write_map_table(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    format: str = "parquet",
) -> bytes:
    """Every exact weight of a region as a row of a Parquet or CSV file: query, key, their tokens, weight.

    Tokens are as they came from the tokenizer, null where none are known. Raises ViewError for an unknown layer,
    head, region or format, ExportTooLarge for a region over 2**25 weights.
    """
    _check_format(format, MAP_FORMATS)
    found = map_arrays(store, run_id, layer, head, rows, cols, max_bytes=MOST_TABLE_BYTES)
    weights = found["map"]
    (top, bottom), (left, right) = found["rows"], found["cols"]
    queries, keys = np.divmod(np.arange(weights.size), weights.shape[1])
    columns = {
        "query": np.arange(top, bottom)[queries],
        "key": np.arange(left, right)[keys],
        "query_token": named(found["query_tokens"], queries),
        "key_token": named(found["key_tokens"], keys),
        "weight": weights.ravel(),
    }
    return table_bytes(columns, format)


def table_bytes(columns: Mapping[str, Any], format: str) -> bytes:
    """Columns of equal length as the bytes of a Parquet or CSV file."""
    import pyarrow

    return _table_bytes(pyarrow.table(columns), format)


def named(tokens: np.ndarray, places: np.ndarray) -> pyarrow.Array:
    """The token at each place, as a column; nulls where no tokens are known."""
    import pyarrow

    if not len(tokens):
        return pyarrow.nulls(len(places), pyarrow.string())
    return pyarrow.array(tokens.tolist()).take(pyarrow.array(places))


def _table_bytes(table: pyarrow.Table, format: str) -> bytes:
    from pyarrow import csv, parquet

    out = io.BytesIO()
    if format == "csv":
        csv.write_csv(table, out)
    else:
        parquet.write_table(table, out, compression="zstd")
    return out.getvalue()


def _check_format(format: str, formats: Sequence[str]) -> None:
    if format not in formats:
        raise ViewError(f"format must be one of {', '.join(formats)}; got {format!r}")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    value = row["value"]
    return row | {"value": value if value is not None and math.isfinite(value) else None}
