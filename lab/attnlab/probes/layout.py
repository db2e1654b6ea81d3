"""What it costs to bring tensors into the layout that a kernel of another package takes, apart from the kernel."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnlab_kernels.operations.linear import fla
from attnlab_kernels.operations.neighborhood import natten
from attnlab_kernels.operations.softmax.registry import IMPLEMENTATIONS
from attnlab_storage.results import MeasurementRow

from .kernel import KernelCall
from .timing import latency

NAME = "layout_latency"


def layout_latency(call: KernelCall, repeats: int, device: torch.device) -> MeasurementRow | None:
    """Time the copies alone, in milliseconds: 0 where views suffice, None where the lab's layout is the kernel's own.

    ``detail`` has the ``copied_bytes``. The time of the attention includes these copies.
    """
    arrange = _arrange(call.implementation)
    if arrange is None or len(call.operands) != 3:
        return None
    query, key, value = call.operands
    copied = copied_bytes(arrange(query, key, value), call.operands)
    if not copied:
        return MeasurementRow(NAME, 0.0, "ms", detail={"copied_bytes": 0})
    row = latency(NAME, lambda: arrange(query, key, value), repeats, device, cold=device.type == "cuda")
    return MeasurementRow(
        row.name,
        row.value,
        row.unit,
        samples=row.samples,
        detail=(row.detail or {}) | {"copied_bytes": copied},
    )


def _arrange(name: str) -> Callable[..., tuple[Tensor, ...]] | None:
    softmax, others = IMPLEMENTATIONS.get(name), {"fla": fla.arrange, "natten": natten.arrange}
    return others.get(name) if softmax is None else softmax.arrange


def copied_bytes(arranged: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> int:
    """Bytes of what does not lie in the memory that was given."""
    held = {tensor.untyped_storage().data_ptr() for tensor in given}
    new = [tensor for tensor in arranged if tensor.untyped_storage().data_ptr() not in held]
    return sum(tensor.numel() * tensor.element_size() for tensor in new)
