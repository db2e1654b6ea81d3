"""The numbers behind a chart as a file: a row a run, a column a measure."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from attnlab.describe import run_document
from attnlab.views.chart_table import FIELDS, MEASURES, NUMERIC_FIELDS, TEXTS, chart_rows
from attnlab.views.errors import ViewError
from attnlab_storage.database import Store

FORMATS = ("csv", "parquet", "json")


def write_chart(store: Store, run_ids: Sequence[int], format: str = "csv") -> bytes:
    """`chart_rows` of some runs as the bytes of a CSV, Parquet or JSON (list of objects) file.

    Raises ViewError for another format, NotFound for an unknown run.
    """
    if format not in FORMATS:
        raise ViewError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    rows = chart_rows([run_document(store, run_id) for run_id in run_ids])
    if format == "json":
        return json.dumps(rows, indent=1).encode()
    table, out = _arrow(rows), io.BytesIO()
    if format == "csv":
        from pyarrow import csv

        csv.write_csv(table, out)
    else:
        from pyarrow import parquet

        parquet.write_table(table, out, compression="zstd")
    return out.getvalue()


def _arrow(rows: Sequence[dict[str, Any]]) -> Any:
    import pyarrow

    whole = ("id", *NUMERIC_FIELDS)
    kinds = {name: pyarrow.int64() if name in whole else pyarrow.string() for name in ("id", *FIELDS)}
    kinds |= {name: pyarrow.string() for name in TEXTS}
    kinds |= {name: pyarrow.float64() for name in MEASURES}
    numbers = [
        {name: float(v) if name in MEASURES and v is not None else v for name, v in row.items()}
        for row in rows
    ]
    return pyarrow.Table.from_pylist(numbers, schema=pyarrow.schema(list(kinds.items())))
