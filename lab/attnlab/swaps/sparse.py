"""A pattern of pairs in the place of all of them: sparse attention, and neighbourhoods along the tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full
from attnlab_kernels.neighborhood import Neighborhood, NeighborhoodError
from attnlab_kernels.operations.neighborhood import reference as neighborhood_reference
from attnlab_kernels.operations.neighborhood.dense import dense as neighborhood_by_the_book
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.sparse.api import IMPLEMENTATIONS, sparse_attend
from attnlab_kernels.operations.sparse.dense import dense as sparse_by_the_book
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.patterns import Pattern, build_pattern, pattern_to_json

from .softmax import Attended, Kind, ModelCall, Shape, Swap, causal_band, only_auto, softmax_attended


@dataclass(eq=False)
class SparseSwap(Swap):
    """Each query attends along a fixed pattern, causal where the model is; cross-attention stays as it was.

    A Longformer's global tokens have projections of their own. Trained weights have none, so theirs are the local
    ones, with which that model begins its training too.
    """

    pattern: str = "local"
    numbers: dict[str, Any] = field(default_factory=dict)
    """what the pattern is made of, as ``build_pattern`` takes it"""

    def attend(self, call: ModelCall) -> Attended:
        if call.cross:
            return super().attend(call)
        only_auto("sparse", self.implementation, *IMPLEMENTATIONS)
        if call.extras.keys() - {"bias"}:
            call.plain("sparse")
        call = self.pooled(call)
        pattern = self._pattern(causal_band(call, "sparse"), call.layer)
        made = self._run(call, pattern)
        attended = softmax_attended(
            call, call.key, call.value, call.mask, made, again=lambda: self._run(call, pattern)
        )
        rules = {"scale": call.scale, "mask": call.mask, **call.extras}

        def reference() -> Tensor:
            return sparse_by_the_book(call.query, call.key, call.value, pattern, **rules)

        told = attended.told("sparse", reference, pattern=pattern_to_json(pattern))
        assert told.attention is not None
        biased = "its scores have a bias, which no trace of a pattern holds" if call.extras else ""
        return replace(told, attention=replace(told.attention, unmapped=biased))

    def kind(self, shape: Shape) -> Kind:
        mask = Causal() if shape.causal else Full()
        pairs = self._pattern(shape.causal, 0).count(shape.tokens, shape.tokens, shape.heads)
        every = pairs == shape.heads * mask.count(shape.tokens, shape.tokens)
        return super().kind(shape) if every else "approximate"

    def _pattern(self, causal: bool, layer: int) -> Pattern:
        return build_pattern(self.pattern, causal, layer=layer, **self.numbers)

    def _run(self, call: ModelCall, pattern: Pattern) -> AttentionOutput:
        (output, lse), name, reason = sparse_attend(
            call.query,
            call.key,
            call.value,
            pattern,
            scale=call.scale,
            mask=call.mask,
            implementation=self.implementation,
            **call.extras,
        )
        lse = lse if lse.dtype == torch.float64 else lse.float()
        return AttentionOutput(
            output, lse=lse, aux={"implementation": name, "reason": f"{pattern.describe()}; {reason}"}
        )


@dataclass(eq=False)
class NeighborhoodSwap(Swap):
    """Each token attends to the nearest along the sequence; causal where the model is (Hassani et al. 2022).

    At a border the window shifts and never shrinks, except before the first tokens of a causal model.
    """

    kernel_size: int = 7
    dilation: int = 1
    stride: int = 1

    def attend(self, call: ModelCall) -> Attended:
        if call.cross:
            return super().attend(call)
        call.plain("neighborhood")
        only_auto("neighborhood", self.implementation, "tiled")
        around = self._around(call, causal_band(call, "neighborhood"))
        made = self._run(call, around)
        key, value = call.grouped()
        attended = softmax_attended(call, key, value, call.mask, made, again=lambda: self._run(call, around))

        def reference() -> Tensor:
            return neighborhood_by_the_book(
                call.query, key, value, around, scale=call.scale, visible=call.visible()
            )

        told = attended.told("neighborhood", reference, **asdict(around))
        assert told.attention is not None
        hidden = "" if call.visible() is None else "tokens are hidden from everyone, which no trace holds"
        return replace(told, attention=replace(told.attention, unmapped=hidden))

    def kind(self, shape: Shape) -> Kind:
        return "approximate"

    def _around(self, call: ModelCall, causal: bool) -> Neighborhood:
        queries, keys = call.query.shape[2], call.key.shape[2]
        if queries != keys:
            raise Unsupported(
                f"neighborhood: every token must be there at once, it has no cache; {call.name} asks {queries} "
                f"queries of {keys} keys"
            )
        try:
            return Neighborhood((keys,), (self.kernel_size,), (self.dilation,), (self.stride,), (causal,))
        except NeighborhoodError as error:
            raise Unsupported(f"neighborhood: {error}") from error

    def _run(self, call: ModelCall, around: Neighborhood) -> AttentionOutput:
        key, value = call.grouped()
        made = neighborhood_reference.run(
            call.query, key, value, around, scale=call.scale, visible=call.visible()
        )
        lse = made.lse if made.lse.dtype == torch.float64 else made.lse.float()
        reason = f"{self.kernel_size} neighbours, {self.dilation} apart"
        return AttentionOutput(made.output, lse=lse, aux={"implementation": "tiled", "reason": reason})
