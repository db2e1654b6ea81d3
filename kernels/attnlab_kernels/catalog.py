"""The seventeen mechanisms, one record each: the one place that pages, command line and docs read from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnlab_kernels.catalog_efficient import EFFICIENT_RECORDS
from attnlab_kernels.catalog_record import CatalogError, Mechanism, Parameter
from attnlab_kernels.catalog_special import SPECIAL_RECORDS
from attnlab_kernels.catalog_standard import STANDARD_RECORDS

__all__ = [
    "MECHANISMS",
    "CatalogError",
    "Mechanism",
    "Parameter",
    "has_module",
    "mechanism",
    "validate_parameters",
]

IDS = (
    "multi_head",
    "self",
    "cross",
    "flash",
    "linear",
    "sparse",
    "sliding_window",
    "efficient",
    "grouped_query",
    "multi_head_latent",
    "paged",
    "flash_attention_3",
    "ring",
    "differential",
    "neighborhood",
    "switch_head",
    "chunked_prefill",
)
_records = {record.id: record for record in (*STANDARD_RECORDS, *EFFICIENT_RECORDS, *SPECIAL_RECORDS)}

MECHANISMS: dict[str, Mechanism] = {mechanism_id: _records[mechanism_id] for mechanism_id in IDS}
"""every record by its id, in the order of the catalog"""


def mechanism(mechanism_id: str) -> Mechanism:
    """The record, or CatalogError with the choices."""
    if mechanism_id not in MECHANISMS:
        raise CatalogError(f"mechanism must be one of {', '.join(MECHANISMS)}; got {mechanism_id!r}")
    return MECHANISMS[mechanism_id]


def has_module(record: Mechanism) -> bool:
    """Whether its module can be imported from ``attnlab_kernels``; that experiments can run it is ``built``."""
    from attnlab_kernels import __all__ as exported

    return record.class_name in exported


def validate_parameters(mechanism_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a mechanism, defaults filled in; CatalogError names what does not fit and the choices."""
    return mechanism(mechanism_id).validate(parameters)
