"""Where a measured attention stands under its device's ceilings (Williams et al. 2009). Torch-free."""

from collections.abc import Mapping
from typing import Any


def at_clock(
    found: Mapping[str, Any], ceilings: Mapping[str, Any], mhz: float | None, peak: float | None = None
) -> dict[str, float]:
    """Return where an attention stands under the matrix product at the clock that was sampled while it was timed.

    A device that is slower than when its ceilings were measured has a lower one; the copy has a clock of its own.

    Args:
        found: what ``stand`` returned.
        mhz: the sampled clock; None: nobody said it, and nothing is returned.
        peak: operations a second that the card's datasheet says at that clock, where it is known.

    Returns:
        ``mhz``, ``ceiling_mhz``, ``ceiling_flops_per_s`` and ``share`` of it; ``peak_flops_per_s`` and ``peak_share``.
    """
    told: dict[str, float] = {}
    if mhz is None:
        return told
    if (then := ceilings.get("mhz")) is not None:
        slope = ceilings["copy_bytes_per_s"] * found["intensity"]
        ceiling = min(slope, ceilings["matmul_flops_per_s"] * mhz / then)
        told |= {"mhz": mhz, "ceiling_mhz": then, "ceiling_flops_per_s": ceiling}
        told["share"] = found["flops_per_s"] / ceiling
    if peak is not None:
        told |= {"mhz": mhz, "peak_flops_per_s": peak, "peak_share": found["flops_per_s"] / peak}
    return told


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
