"""The attentions of decoding steps, gathered layer by layer: each step is one row over the cache as it was then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from .views.trace_map import BY_KEY_HEAD, SOFTMAX_KINDS

BY_ROW = SOFTMAX_KINDS | {"linear", "difference", "sparse"}
"""maps whose every row follows from its own query, from keys that stay, and from numbers of the row"""
FEATURE_TOLERANCE = 1e-6
"""by which features of the same key may differ, relative to the largest: they may be made anew at every step"""


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
        _check_kind(call)
        kept = self._layers.get(call.layer)
        if kept is None:
            kept = self._layers[call.layer] = _Steps(call, {})
        else:
            _check_kept(kept.newest, call)
        kept.newest = call
        rows = {name: getattr(call, name) for name in ("query", "output", "lse")}
        rows |= {name: tensor for name, tensor in _extra(call).items() if name not in BY_KEY_HEAD}
        if "bias" in call.extras:
            rows["bias"] = call.extras["bias"]
        for name, row in rows.items():
            kept.rows.setdefault(name, []).append(row)
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
            told["extra"] = {
                name: tensor if name in BY_KEY_HEAD else torch.cat(kept.rows[name], 2)
                for name, tensor in attention.extra.items()
            }
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


def _extra(call: LayerCall) -> Mapping[str, Tensor]:
    return {} if call.attention is None else call.attention.extra


def _check_kind(call: LayerCall) -> None:
    """Refuses a map whose rows do not stand alone."""
    kind = "softmax" if call.attention is None else call.attention.kind
    if kind not in BY_ROW:
        raise Unsupported(f"decode.steps: must be 1 for {call.name}, whose {kind} map is kept of one step")


def _check_kept(before: LayerCall, now: LayerCall) -> None:
    """One cache has to hold the keys of all steps: none is dropped or changed."""
    old, new = _extra(before), _extra(now)
    pairs = [(before.key, now.key)]
    pairs += [(old[name], new[name]) for name in BY_KEY_HEAD & old.keys() & new.keys()]
    features = now.attention is not None and now.attention.kind == "linear"
    if old.keys() != new.keys() or not all(_holds(*pair, exactly=not features) for pair in pairs):
        raise Unsupported(
            f"decode.steps: must be 1 for {now.name}, whose cache does not keep earlier keys as they were"
        )


def _holds(before: Tensor, now: Tensor, *, exactly: bool) -> bool:
    """Whether keys [B, H, m, D] begin with those that were there a step before."""
    held = before.shape[2]
    if now.shape[2] < held:
        return False
    if exactly:
        return torch.equal(now[:, :, :held], before)
    apart = (now[:, :, :held] - before).abs().max()
    return bool(apart <= FEATURE_TOLERANCE * before.abs().max())


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
