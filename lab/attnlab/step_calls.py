"""The attentions of decoding steps, gathered layer by layer: each step is one row over the cache as it was then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnlab_kernels.masks import Causal, Mask
from attnlab_kernels.operations.softmax.api import Unsupported

from .hook import LayerCall
from .probes.maps import element_mask
from .views.trace_map import SOFTMAX_KINDS


@dataclass
class _Steps:
    """What is kept of one layer's steps: the keys of the newest alone, which hold all earlier ones."""

    newest: LayerCall
    rows: dict[str, list[Tensor]]
    masks: list[tuple[Mask, int]] = field(default_factory=list)
    """of each step, with how many keys there were"""


class StepCalls:
    """Hears the attentions of one step after another, and makes one call a layer of them.

    Q, output and log-sum-exp are those of every step, ``[B, H, steps, ..]``; K and V are the whole cache.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._layers: dict[int, _Steps] = {}

    def hear(self, call: LayerCall) -> None:
        """Keep one attention of one step.

        Raises:
            Unsupported: the mechanism has no map over a cache that grows.
        """
        kind = "softmax" if call.attention is None else call.attention.kind
        if kind not in SOFTMAX_KINDS or (call.attention is not None and call.attention.extra):
            raise Unsupported(
                f"decode.steps: must be 1 for {call.name}, whose {kind} map is kept of one step"
            )
        kept = self._layers.get(call.layer)
        if kept is None:
            kept = self._layers[call.layer] = _Steps(call, {name: [] for name in ("query", "output", "lse")})
        else:
            _check_kept(kept.newest, call)
        kept.newest = call
        for name, rows in kept.rows.items():
            rows.append(getattr(call, name))
        if "bias" in call.extras:
            kept.rows.setdefault("bias", []).append(call.extras["bias"])
        kept.masks.append((element_mask(call.mask, 0), call.key.shape[2]))

    def calls(self) -> list[LayerCall]:
        """The gathered calls, one a layer.

        Raises:
            Unsupported: no mask says what all the steps saw.
        """
        return [self._gathered(self._layers[layer]) for layer in sorted(self._layers)]

    def _gathered(self, kept: _Steps) -> LayerCall:
        newest = kept.newest
        if len(kept.masks) != self._steps:
            raise Unsupported(f"decode.steps: {newest.name} ran in {len(kept.masks)} of {self._steps} steps")
        query, output, lse = (torch.cat(kept.rows[name], 2) for name in ("query", "output", "lse"))
        mask = _common_mask(kept.masks, newest.name)
        extras = dict(newest.extras)
        if "bias" in kept.rows:
            keys = newest.key.shape[2]
            extras["bias"] = torch.cat([pad(row, (0, keys - row.shape[-1])) for row in kept.rows["bias"]], -2)
        attention = newest.attention
        if attention is not None:
            told: dict[str, Any] = {"query": query, "output": output, "normaliser": lse, "mask": mask}
            operands = (query, newest.key, newest.value)
            run = _alone(newest.name)
            attention = replace(
                attention, **told, operands=operands, run=run, reference=run, modifiers=extras
            )
        return replace(
            newest,
            query=query,
            output=output,
            lse=lse,
            mask=mask,
            extras=extras,
            attention=attention,
            again=_alone(newest.name),
        )


def _check_kept(before: LayerCall, now: LayerCall) -> None:
    """One cache has to hold the keys of all steps: none is dropped or changed."""
    held = before.key.shape[2]
    if now.key.shape[2] < held or not torch.equal(now.key[:, :, :held], before.key):
        raise Unsupported(
            f"decode.steps: must be 1 for {now.name}, whose cache does not keep earlier keys as they were"
        )


def _common_mask(masks: list[tuple[Mask, int]], name: str) -> Mask:
    """The mask whose row i is that of step i, over the keys of the last."""
    steps, keys = len(masks), masks[-1][1]
    wanted = np.zeros((steps, keys), bool)
    for step, (mask, known) in enumerate(masks):
        wanted[step, :known] = mask.allowed(np.arange(1), np.arange(known), num_queries=1, num_keys=known)
    last = masks[-1][0]
    for candidate in (last & Causal(), last):
        allowed = candidate.allowed(np.arange(steps), np.arange(keys), num_queries=steps, num_keys=keys)
        if np.array_equal(allowed, wanted):
            return candidate
    raise Unsupported(f"decode.steps: must be 1 for {name}: no mask says what all steps see")


def _alone(name: str) -> Callable[..., Any]:
    def refuse(*operands: Tensor) -> Tensor:
        raise RuntimeError(f"{name}: steps are computed one by one, there is no kernel for them together")

    return refuse
