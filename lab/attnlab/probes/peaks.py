"""What a card's tensor cores could do at a clock, by its number of multiprocessors: the datasheet's figure, rescaled.

Operations of one multiprocessor in one cycle, dense: half precision 2048 (A100), 4096 (H100, H200) and 8192 (B200);
float32 outside the tensor cores 128, 256 and 256 (NVIDIA A100, H100 and Blackwell architecture whitepapers).
"""

from typing import Any

import torch

HALF, SINGLE = "half", "single"
PER_CYCLE: dict[tuple[int, int], dict[str, int]] = {
    (8, 0): {HALF: 2048, SINGLE: 128},
    (9, 0): {HALF: 4096, SINGLE: 256},
    (10, 0): {HALF: 8192, SINGLE: 256},
}
KINDS = {torch.float16: HALF, torch.bfloat16: HALF, torch.float32: SINGLE}


def peak_of(
    device: torch.device, dtype: torch.dtype, mhz: float | None, cuda: Any = torch.cuda
) -> float | None:
    """Return operations a second of a device at a clock in MHz; None on a CPU, and where it or its clock is unknown."""
    if device.type != "cuda" or mhz is None:
        return None
    card = cuda.get_device_properties(device)
    return peak_flops((card.major, card.minor), card.multi_processor_count, dtype, mhz)


def peak_flops(
    capability: tuple[int, int], multiprocessors: int, dtype: torch.dtype, mhz: float
) -> float | None:
    """Return operations a second at a clock in MHz; None where nothing is known of the card or the dtype."""
    rates = PER_CYCLE.get(capability)
    kind = KINDS.get(dtype)
    if rates is None or kind is None:
        return None
    return rates[kind] * multiprocessors * mhz * 1e6
