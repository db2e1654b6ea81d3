"""Where a measured attention stands under its device's ceilings (Williams et al. 2009). Torch-free."""

from collections.abc import Mapping
from typing import Any


def stand(flops: int, moved: int, seconds: float, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """Return how near a time is to the ceiling of its work.

    Args:
        flops: operations of the attention, from its mask's own pairs.
        moved: bytes that it has to read and write, each tensor once.
        seconds: what it took.
        ceilings: ``copy_bytes_per_s`` and ``matmul_flops_per_s`` of the device.

    Returns:
        ``intensity`` (operations a byte), ``flops_per_s`` reached, ``ceiling_flops_per_s`` (the lower of the
        product's and copy x intensity), ``share`` of it reached (above 1 where caches beat the copy) and
        ``bound`` ("compute" or "memory").
    """
    if flops <= 0 or moved <= 0 or not seconds > 0:
        raise ValueError(f"flops, moved and seconds must be above 0; got {flops}, {moved}, {seconds}")
    intensity = flops / moved
    slope, flat = ceilings["copy_bytes_per_s"] * intensity, ceilings["matmul_flops_per_s"]
    ceiling = min(slope, flat)
    return {
        "intensity": intensity,
        "flops_per_s": flops / seconds,
        "ceiling_flops_per_s": ceiling,
        "share": flops / seconds / ceiling,
        "bound": "memory" if slope < flat else "compute",
    }
