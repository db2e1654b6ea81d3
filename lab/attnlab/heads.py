"""Heads by what they do, over every run in the store: ``find_heads(store, "sink_mass > 0.8 and entropy < 1")``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attnlab.views.errors import ViewError
from attnlab.views.figures import statistic_info
from attnlab.views.labels import mechanism_label, ran_as
from attnlab.views.statistics import STATISTICS
from attnlab.views.viewport import find_run
from attnlab_storage import heads, results
from attnlab_storage.database import Store
from attnlab_storage.heads import HeadCondition, HeadPage, HeadRow

SEARCHED = (*STATISTICS, "attention_error", "lse_error")
"""every number that runs keep of a head"""
_CONDITION = re.compile(r"\s*([A-Za-z_0-9]+)\s*(>=|<=|>|<)\s*([^\s<>]+)\s*")


def find_heads(
    store: Store,
    where: str,
    *,
    filters: Mapping[str, Any] | None = None,
    search: str = "",
    limit: int = 50,
    after: str | None = None,
) -> HeadPage:
    """Heads of all runs for which ``where`` holds, those first that go furthest beyond its first bound.

    Args:
        where: one bound, or several joined by "and": `parse_conditions`.
        filters, search: of the runs, as in `attnlab_storage.listing.list_runs`.

    Raises ViewError for a condition that cannot be read, ListingError for a filter, limit or cursor.
    """
    conditions = parse_conditions(where)
    return heads.find_heads(store, conditions, filters=filters, search=search, limit=limit, after=after)


def statistics_document(store: Store, run_id: int) -> dict[str, Any]:
    """Every statistic that a run keeps of its heads, as plain JSON values.

    By name: title, unit, formula, source, ``layers``, ``heads`` and ``values[layer][head]``, None where there is none.
    Raises NotFound.
    """
    find_run(store, run_id)
    rows = results.measurements(store, run_id)
    found = {name: statistic_info(rows, name, title=one.title) for name, one in STATISTICS.items()}
    return {
        name: info._asdict() | {"formula": STATISTICS[name].formula, "source": STATISTICS[name].source}
        for name, info in found.items()
        if info.layers
    }


def parse_conditions(where: str) -> list[HeadCondition]:
    """``"sink_mass > 0.8 and entropy < 1"`` as conditions. Raises ViewError with the rule and the choices."""
    return [_condition(part) for part in re.split(r"\s+and\s+", where.strip(), flags=re.IGNORECASE)]


def head_document(row: HeadRow) -> dict[str, Any]:
    """A head that was found, as plain JSON values."""
    run = row.run
    return {
        "run": run.id,
        "layer": row.layer,
        "head": row.head,
        "name": f"L{row.layer}H{row.head}",
        "values": dict(row.values),
        "experiment": run.experiment_id,
        "experiment_name": run.experiment_name,
        "model": run.model,
        "mechanism": mechanism_label({"mechanism": run.mechanism, "parameters": run.parameters}),
        "implementation": ran_as(
            {"chosen": (run.summary or {}).get("implementation"), "implementation": run.implementation}
        ),
        "sequence_length": run.sequence_length,
        "dtype": run.dtype,
    }


def _condition(text: str) -> HeadCondition:
    found = _CONDITION.fullmatch(text)
    if found is None:
        rule = "must be a statistic, one of > >= < <= and a number, such as sink_mass > 0.8, joined by and"
        raise ViewError(f"condition {rule}; got {text[:80]!r}")
    name, operator, number = found.groups()
    if name not in SEARCHED:
        raise ViewError(f"statistic must be one of {', '.join(SEARCHED)}; got {name[:60]!r}")
    try:
        return HeadCondition(name, operator, float(number))
    except ValueError:
        raise ViewError(f"bound of {name} must be a number; got {number[:60]!r}") from None
