"""A memory snapshot of CUDA's allocator as compressed JSON: what PyTorch's viewer reads, without a pickle. Torch-free.

PyTorch's own tool reads pickles; docs/measurements.md has the line that makes one of a downloaded snapshot.
"""

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

PARTS = ("segments", "device_traces", "allocator_settings")
"""what the viewer draws from"""
MAX_PACKED = 16 << 20
MAX_JSON = 1 << 30


def pack_snapshot(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the snapshot as a detail of a measurement; a larger one than ``MAX_PACKED`` says only its size."""
    text = json.dumps({name: snapshot[name] for name in PARTS if name in snapshot}, default=str)
    packed = base64.b85encode(zlib.compress(text.encode(), 6)).decode()
    if len(packed) > MAX_PACKED:
        return {"left_out_bytes": len(packed)}
    return {"encoding": "json, zlib, base85", "data": packed}


def unpack_snapshot(detail: Mapping[str, Any]) -> bytes | None:
    """Return the JSON of ``pack_snapshot``; None where it was left out.

    Raises:
        ValueError: the data are not what ``pack_snapshot`` makes.
    """
    if "data" not in detail:
        return None
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(base64.b85decode(detail["data"]), MAX_JSON)
    except zlib.error as error:
        raise ValueError(f"snapshot: is not compressed JSON: {error}") from None
    if reader.unconsumed_tail:
        raise ValueError(f"snapshot: must be at most {MAX_JSON} bytes of JSON")
    return text
