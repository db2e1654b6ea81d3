"""A model's attention over a served cache: what the hook calls in every layer of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from attnlab_kernels.masks import Causal, Mask, Window
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.output import AttentionOutput

from ..swaps.latent import LatentSwap, side_by_side
from ..swaps.softmax import Attended, ModelCall, Swap, softmax_attended
from .engine import CacheShape
from .pools import LayerPool, Row, StepPlan, latest_attention, open_pools

READ = frozenset({"softcap", "sinks", "alibi"})
"""what a model may add to plain attention and paged attention computes"""


@dataclass(eq=False)
class ServedSwap(Swap):
    """Keys and values of the model, or means of them, in pools; the batch is one row of all sequences end to end."""

    rows: list[Row] = field(default_factory=list)
    """of each layer, see ``learn``"""
    plan: StepPlan | None = None
    """of the present step"""
    _pools: list[LayerPool] = field(default_factory=list, init=False, repr=False)

    def learn(self, call: ModelCall) -> None:
        """Note what a layer keeps of a token, from any call of it, in the order of the layers."""
        self.rows.append(self.row(call))

    def row(self, call: ModelCall) -> Row:
        """What the layer of this call keeps of a token."""
        call = self.pooled(call)
        return Row(call.key.shape[1], call.key.shape[3], call.value.shape[3])

    def open(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        """Make the pools."""
        self._pools = []  # the old ones first
        self._pools = open_pools(self.rows, shape, dtype, device)

    def latest_attention(self) -> dict[str, Callable[[], object]]:
        return latest_attention(self._pools)

    def attend(self, call: ModelCall) -> Attended:
        assert self.plan is not None
        unknown = call.extras.keys() - READ
        if unknown:
            raise Unsupported(
                f"phase: serving reads no {' and '.join(sorted(unknown))}, which {call.name} asks for"
            )
        made = self.run(call, self._pools[call.layer], self.plan)
        assert made.lse is not None
        out = AttentionOutput(made.output.transpose(0, 1)[None], lse=made.lse[None], aux=made.aux)
        return softmax_attended(call, call.key, call.value, call.mask, out)

    def run(self, call: ModelCall, pool: LayerPool, plan: StepPlan) -> AttentionOutput:
        """Write the new tokens and attend: output ``[T, Hq, Dv]``, log-sum-exp ``[Hq, T]``."""
        call = self.pooled(call)
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (call.query, call.key, call.value))
        pool.write(plan, key, value)
        options = {"scale": call.scale, "mask": own_mask(call), "implementation": self.implementation}
        return pool.attend(plan, query, **options, **call.extras)


@dataclass(eq=False)
class ServedLatentSwap(ServedSwap):
    """One latent a token for all heads of a layer, in the basis that ``fitted`` has; attended absorbed."""

    fitted: LatentSwap = field(default_factory=LatentSwap)

    def row(self, call: ModelCall) -> Row:
        return Row(1, self.fitted.basis(call).shape[1], 0)

    def run(self, call: ModelCall, pool: LayerPool, plan: StepPlan) -> AttentionOutput:
        basis = self.fitted.basis(call)
        pool.write(plan, side_by_side(call).transpose(0, 1) @ basis)
        heads, kv_heads, size = call.query.shape[1], call.key.shape[1], call.key.shape[3]
        up = basis.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=0)
        query = torch.einsum("hnd,hdr->nhr", call.query[0], up[:, :size])
        options = {"scale": call.scale, "mask": own_mask(call), "implementation": self.implementation}
        made = pool.attend(plan, query, value_dim=basis.shape[1], **options, **call.extras)
        output = torch.einsum("nhr,hvr->nhv", made.output, up[:, size:])
        return replace(made, output=output)


def own_mask(call: ModelCall) -> Mask:
    """The mask of each sequence by itself, where the model sees the whole batch as one.

    Raises:
        Unsupported: it looks ahead, so no token can be served before the last.
    """
    band = call.mask.band()
    if band.right not in (None, 0) or (band.right is None and call.query.shape[2] > 1):
        raise Unsupported(
            f"model: {call.name} looks ahead ({call.mask.describe()}); only causal attention is served"
        )
    return Causal() if band.left is None else Window(band.left, 0)
