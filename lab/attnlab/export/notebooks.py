"""A span of a run for two notebook viewers that people know: the arguments of BertViz and of CircuitsVis.

Both inline every number in the page (BertViz twice), so a span has to be short; the weights are the exact ones of the
whole run and are not made to sum to 1 within the span.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnlab.views.errors import ViewError
from attnlab.views.tokens import token_labels
from attnlab.views.viewport import Region, find_trace, head_map, recorded, region_of
from attnlab_storage.database import Store

MOST_TOKENS = 256


def circuitsvis_arguments(store: Store, run_id: int, layer: int, span: Region = None) -> dict[str, Any]:
    """``circuitsvis.attention.attention_heads(**arguments)``: attention float32 [heads, n, n] and n tokens."""
    start, stop = _span(store, run_id, layer, span)
    return {
        "attention": _layer(store, run_id, layer, (start, stop)),
        "tokens": token_labels(store, run_id, layer).key[start:stop],
    }


def bertviz_arguments(
    store: Store, run_id: int, layers: Sequence[int] | None = None, span: Region = None
) -> dict[str, Any]:
    """``bertviz.head_view(**arguments)``: a torch tensor [1, heads, n, n] for each layer, and n tokens."""
    import torch

    kept = [trace.layer for trace in recorded(store, run_id)[1]]
    wanted = kept if layers is None else list(layers)
    start, stop = _span(store, run_id, wanted[0], span)
    attention = [torch.from_numpy(_layer(store, run_id, layer, (start, stop)))[None] for layer in wanted]
    tokens = token_labels(store, run_id, wanted[0]).key[start:stop]
    # BertViz numbers layers by their place among those it shows
    return {"attention": attention, "tokens": tokens, "include_layers": list(range(len(wanted)))}


def _span(store: Store, run_id: int, layer: int, span: Region) -> tuple[int, int]:
    trace = find_trace(store, run_id, layer)[1]
    if trace.num_queries != trace.num_keys:
        sizes = f"{trace.num_queries} queries and {trace.num_keys} keys"
        raise ViewError(f"span needs self-attention over one sequence; layer {layer} has {sizes}")
    start, stop = region_of((trace.num_queries, trace.num_keys), span, None)[0]
    if stop - start > MOST_TOKENS:
        raise ViewError(f"span must be at most {MOST_TOKENS} tokens for these viewers; got {stop - start}")
    return start, stop


def _layer(store: Store, run_id: int, layer: int, span: tuple[int, int]) -> np.ndarray:
    run, trace = find_trace(store, run_id, layer)
    part = slice(*span)
    return np.stack([head_map(store, run, trace, head).tile(part, part) for head in range(trace.heads)])
