"""Numbers for other programs: the exact probabilities of a region, or the tensors behind a layer."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping

import numpy as np

from attnlab.describe import run_brief
from attnlab.views.errors import NothingRecorded, ViewError
from attnlab.views.labels import format_bytes
from attnlab.views.tokens import token_labels
from attnlab.views.trace_map import map_facts
from attnlab.views.viewport import Region, find_run, find_trace, load_map, region_of
from attnlab_storage import results, tensors
from attnlab_storage.database import Store

FORMATS = ("npz", "safetensors")
MAX_BYTES = 2**30
NOT_OF_THE_MAP = ("value_norm", "overview_", "thumbnail_", "rollout_", "flow_")
"""beginnings of the names of tensors that follow from a map, or stand beside it"""


class ExportTooLarge(ViewError):
    """An array that would not fit the limit; the text says how many bytes it would take."""


def map_arrays(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    *,
    max_bytes: int = MAX_BYTES,
) -> dict[str, np.ndarray]:
    """The exact probabilities of a region with its tokens as they came from the tokenizer.

    Returns ``map`` float32 [rows, cols], ``query_tokens``, ``key_tokens`` (unicode; empty if none are known),
    ``rows`` and ``cols`` int64 [2] (half-open).

    Raises ViewError for an unknown layer, head or region; ExportTooLarge where the map is over ``max_bytes``.
    """
    full_map = load_map(store, run_id, layer, head)
    region = region_of(full_map.shape, rows, cols)
    (r0, r1), (c0, c1) = region
    _check_bytes(4 * (r1 - r0) * (c1 - c0), max_bytes, f"a map of {r1 - r0} x {c1 - c0} weights")
    query_tokens, key_tokens = _tokens(store, run_id, layer)
    return {
        "map": full_map.tile(slice(r0, r1), slice(c0, c1)),
        "query_tokens": np.array(query_tokens[r0:r1], dtype=np.str_),
        "key_tokens": np.array(key_tokens[c0:c1], dtype=np.str_),
        "rows": np.array([r0, r1]),
        "cols": np.array([c0, c1]),
    }


def trace_arrays(
    store: Store, run_id: int, layer: int, *, max_bytes: int = MAX_BYTES
) -> dict[str, np.ndarray]:
    """What a layer's maps are made of: ``query`` [H, Sq, D], ``key`` [Hkv, Sk, D], ``lse`` [H, Sq].

    float32, but ``lse`` as it is stored: the natural log of the row's sum of exp(scale * q . k). Another kind of map
    has other tensors (``denominator``, ``second_query`` ..). Kind, mask and what else it follows from are in ``facts``.
    """
    _, trace = find_trace(store, run_id, layer)
    found = [info for info in tensors.tensor_info(store, run_id) if info.layer == layer]
    found = [info for info in found if not info.name.startswith(NOT_OF_THE_MAP)]
    numbers = sum(info.heads * info.tokens * (info.head_dim or 1) for info in found)
    _check_bytes(4 * numbers, max_bytes, f"the tensors of layer {layer}")
    query_tokens, key_tokens = _tokens(store, run_id, layer)
    arrays = {
        info.name: np.stack(
            [tensors.read_tensor(store, run_id, info.name, layer, head) for head in range(info.heads)]
        )
        for info in found
    }
    return arrays | {
        "scale": np.array(trace.scale),
        "query_tokens": np.array(query_tokens, dtype=np.str_),
        "key_tokens": np.array(key_tokens, dtype=np.str_),
    }


def write_map(
    store: Store,
    run_id: int,
    layer: int,
    head: int,
    rows: Region = None,
    cols: Region = None,
    format: str = "npz",
    *,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """`map_arrays` as the bytes of an NPZ or safetensors file, with the run's facts beside it."""
    _check_format(format)
    arrays = map_arrays(store, run_id, layer, head, rows, cols, max_bytes=max_bytes)
    return pack(arrays, _facts(store, run_id, layer) | {"head": head}, format)


def write_trace(
    store: Store, run_id: int, layer: int, format: str = "npz", *, max_bytes: int = MAX_BYTES
) -> bytes:
    """`trace_arrays` as the bytes of an NPZ or safetensors file, with the mask and the run's facts."""
    _check_format(format)
    arrays = trace_arrays(store, run_id, layer, max_bytes=max_bytes)
    return pack(arrays, _facts(store, run_id, layer), format)


def statistics_arrays(store: Store, run_id: int) -> dict[str, np.ndarray]:
    """Every number that the run keeps of its heads: float64 [layers, heads] by name, NaN where there is none.

    ``layers`` int64 names the rows. Raises NothingRecorded where the run kept no statistics.
    """
    find_run(store, run_id)
    found = {
        (row.name, row.layer, row.head): row.value
        for row in results.measurements(store, run_id)
        if row.layer is not None and row.head is not None
    }
    if not found:
        raise NothingRecorded(f"run {run_id} holds no statistics of heads: its record does not include them")
    layers = sorted({layer for _, layer, _ in found})
    heads = 1 + max(head for _, _, head in found)
    tables = {name: np.full((len(layers), heads), np.nan) for name, _, _ in found}
    for (name, layer, head), value in found.items():
        tables[name][layers.index(layer), head] = value
    return {"layers": np.array(layers), **tables}


def write_statistics(store: Store, run_id: int, format: str = "npz") -> bytes:
    """`statistics_arrays` as the bytes of an NPZ or safetensors file; `export.table` writes them as Parquet."""
    _check_format(format)
    return pack(statistics_arrays(store, run_id), run_brief(find_run(store, run_id)), format)


def pack(arrays: Mapping[str, np.ndarray], facts: Mapping[str, object], format: str) -> bytes:
    """Arrays as file bytes; safetensors holds no strings, so tokens and facts are JSON in its metadata."""
    _check_format(format)
    if format == "npz":
        out = io.BytesIO()
        np.savez_compressed(out, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
        return out.getvalue()
    try:
        writer = importlib.import_module("safetensors.numpy")
    except ModuleNotFoundError:
        raise ViewError(
            "format safetensors needs the package safetensors (pip install safetensors); npz needs nothing"
        ) from None
    words = {name: array.tolist() for name, array in arrays.items() if array.dtype.kind == "U"}
    metadata = {"facts": json.dumps(facts), **{name: json.dumps(value) for name, value in words.items()}}
    numbers = {name: np.asarray(array, order="C") for name, array in arrays.items() if name not in words}
    return writer.save(numbers, metadata=metadata)


def _facts(store: Store, run_id: int, layer: int) -> dict[str, object]:
    run, trace = find_trace(store, run_id, layer)
    return {
        **run_brief(run),
        "layer": layer,
        "layer_name": trace.name,
        "kind": trace.kind,
        "map": dict(map_facts(trace)),
        "scale": trace.scale,
        "mask": trace.mask,
        "stored_dtype": trace.dtype,
        "row_sum_defect": trace.row_sum_defect,
        "output_defect": trace.output_defect,
    }


def _tokens(store: Store, run_id: int, layer: int) -> tuple[list[str], list[str]]:
    labels = token_labels(store, run_id, layer)
    return labels.raw_query, labels.raw_key


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ViewError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")


def _check_bytes(size: int, limit: int, what: str) -> None:
    if size > limit:
        rule = f"the limit is {format_bytes(limit)}: ask for fewer rows and cols"
        raise ExportTooLarge(f"{what} would take {format_bytes(size)}; {rule}")
