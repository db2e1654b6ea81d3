"""What can run on a device, for softmax attention and by packages that know another kind."""

from __future__ import annotations

from typing import Any

import torch

from attnlab_kernels.operations.linear import fla
from attnlab_kernels.operations.neighborhood import natten
from attnlab_kernels.operations.softmax import api as softmax


def survey(device: str = "cpu") -> list[dict[str, Any]]:
    """One row an implementation: name, label, available, reason, requires; asked with one small call each."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    image = torch.zeros(1, 2, 16, 16, 64, dtype=dtype, device=device)
    tokens = image.flatten(2, 3)
    windows = natten.supports(image, image, image, bias=None, visible=None, dropout=0.0, need_windows=False)
    chunks = fla.supports(tokens, tokens, tokens, causal=True, chunk=fla.CHUNK)
    rows = [
        ("natten", "NATTEN, for neighborhood", windows, natten.REQUIRES),
        ("fla", "flash-linear-attention, for linear", chunks, fla.REQUIRES),
    ]
    return [
        *softmax.survey(device),
        *(
            {
                "name": name,
                "label": label,
                "available": support.ok,
                "reason": support.reason,
                "requires": requires,
            }
            for name, label, support, requires in rows
        ),
    ]
