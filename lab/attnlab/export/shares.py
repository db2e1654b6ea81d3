"""Where a position takes its input from, by rollout or by flow, as a text with the share of each token behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnlab.describe import run_brief
from attnlab.export.colourbar import Scale
from attnlab.export.scene import Scene
from attnlab.export.token_text import Passage, draw_passage
from attnlab.views.labels import ran_as, view_label
from attnlab.views.tokens import token_labels
from attnlab.views.viewport import find_run
from attnlab_storage.database import Store

WAYS = ("rollout", "flow")
MOST_TOKENS = 1024
DECADES = 4


def draw_shares(
    store: Store,
    run_id: int,
    document: Mapping[str, Any],
    *,
    scale: Scale = "log",
    sink: bool = False,
    colormap: str = "viridis",
    theme: str = "light",
) -> Scene:
    """A `rollout_document` of one position, or a `flow_document`, over its tokens: the last 1,024 up to the position.

    Args:
        scale: "log" over four decades, or "linear"; of a flow always linear, from the least to the most.
        sink: whether the colours reach up to what the first token gets.

    Raises ViewError for an unknown look or scale.
    """
    run, row, flow = find_run(store, run_id), int(document["row"]), "inside" in document
    shares, begin = np.array(document["shares"], float), int(document.get("start", 0))
    reached = begin + int(np.flatnonzero(shares).max(initial=0)) + 1
    start = max(begin, row + 1 - MOST_TOKENS)
    stop = min(max(row + 1, reached), start + MOST_TOKENS, begin + len(shares))
    values = shares[start - begin : stop - begin]
    counted = values[1:] if start == 0 and not sink and len(values) > 1 else values
    names = token_labels(store, run_id).query
    labels = [names[at] if at < len(names) else f"position {at}" for at in range(start, stop)]
    brief, way = run_brief(run), "maximum flow" if flow else "rollout"
    origin = f"{names[row]} ({row})" if row < len(names) else f"position {row}"
    facts = [ran_as(brief), str(brief["dtype"]), f"tokens {start}:{stop}"]
    facts.append(f"residual share {document['residual']:g}")
    if len(counted) < len(values):
        facts.append(f"colours without the first token ({values[0]:.3g})")
    passage = Passage(
        view_label(brief, f"{way} from {origin}"),
        " · ".join(facts),
        labels,
        values,
        float(counted.max()),
        row - start if start <= row < stop else None,
        "linear" if flow else scale,
        low=float(counted.min()) if flow else 0.0,
        decades=DECADES,
    )
    return draw_passage(passage, colormap, theme)
