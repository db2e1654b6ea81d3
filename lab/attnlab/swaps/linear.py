"""A product of features in the place of the softmax: elu + 1, random features, or a softmax on each side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full
from attnlab_kernels.operations.linear import feature_maps
from attnlab_kernels.operations.linear.api import LinearResult, linear_attend
from attnlab_kernels.operations.linear.reference import LinearSums
from attnlab_kernels.operations.linear.separable import separable_attend, separate
from attnlab_kernels.operations.softmax.api import Unsupported

from .softmax import Attended, Kind, ModelCall, Shape, Swap, causal_band, only_auto

FORMS = ("auto", "parallel", "recurrent", "chunked")


class _Features(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(eq=False)
class LinearSwap(Swap):
    """Features of queries and keys instead of the exponential of their product; causal where the model is.

    ``softmax_kernel`` estimates the model's own softmax: its expected similarity is ``exp(scale q . k)``. The keys of
    a causal model are stabilised by the first key alone, which every query sees, so nothing of the future leaks.
    A decoded token adds to the sums that the prompt left.
    """

    feature_map: str = "elu"
    num_features: int | None = None
    eps: float = 1e-6
    seed: int = 0
    _projections: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _sums: dict[str, dict[int, LinearSums]] = field(default_factory=dict, init=False, repr=False)
    """of each attention, over its first so many keys"""

    def attend(self, call: ModelCall) -> Attended:
        call.plain("linear")
        if self.implementation not in FORMS:
            raise Unsupported(f"linear: is an operation of its own; {self.implementation} cannot run it")
        causal = not call.cross and causal_band(call, "linear")
        made, features = self._run(call, causal)
        if made.denominator is None:
            raise Unsupported("linear: identity features divide by nothing, and their rows sum to anything")
        past = call.key.shape[2] - call.query.shape[2] if causal else 0
        # a map has no padding: keys that do not exist have features of zero
        mask = Causal() if causal else Full()
        attended = Attended(
            features.query,
            features.key,
            features.value,
            mask,
            1.0,
            made.output,
            made.denominator,
            f"linear {made.form}",
            f"{self.feature_map} features; {made.reason}",
            again=lambda: self._run(call, causal)[0],
        )

        def reference() -> Tensor:
            weights = features.query @ features.key.transpose(-1, -2)
            weights = weights.tril(past) if causal else weights
            below = weights.sum(-1, keepdim=True) + self.eps
            return (weights / below.masked_fill(below == 0, 1) @ features.value.to(weights)).to(call.value)

        return attended.told("linear", reference, features=self.feature_map, eps=self.eps)

    def kind(self, shape: Shape) -> Kind:
        return "approximate"

    def _run(self, call: ModelCall, causal: bool) -> tuple[LinearResult, _Features]:
        features = self._features(call, causal)
        past = call.key.shape[2] - call.query.shape[2] if causal else 0
        if past < 0:
            raise Unsupported(f"linear: {call.name} has more queries than keys, and a causal order of both")
        sums = self._past(call, features, past) if past else None
        made = linear_attend(
            features.query,
            features.key[:, :, past:],
            features.value[:, :, past:],
            causal=causal,
            eps=self.eps,
            past=sums,
            form=self.implementation,
        )
        if causal:
            # the next token goes on from here; a repeated one from where it began
            kept = {call.key.shape[2]: made.sums}
            self._sums[call.name] = kept if sums is None else kept | {past: sums}
        return made, features

    def _past(self, call: ModelCall, features: _Features, past: int) -> LinearSums:
        held = self._sums.get(call.name, {}).get(past)
        if held is not None:
            return held
        key, value = features.key[:, :, :past], features.value[:, :, :past].to(features.key.dtype)
        return LinearSums(key.transpose(-1, -2) @ value, key.sum(dim=2))

    def _features(self, call: ModelCall, causal: bool) -> _Features:
        key, value = call.grouped()
        query, visible = call.query, call.visible()
        if self.feature_map == "softmax_kernel":
            query, key = self._random_features(call, query, key, causal, visible)
        else:
            phi = {
                "elu": feature_maps.elu_plus_one,
                "relu": feature_maps.relu,
                "identity": feature_maps.identity,
            }[self.feature_map]
            wide = torch.promote_types(query.dtype, torch.float32)
            query, key = phi(query.to(wide)), phi(key.to(wide))
        if visible is not None:
            gone = ~visible[:, None, :, None]
            key, value = key.masked_fill(gone, 0), value.masked_fill(gone, 0)
        return _Features(query, key, value)

    def _random_features(
        self, call: ModelCall, query: Tensor, key: Tensor, causal: bool, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        projection = self._projection(call)
        # feature_maps.favor stands for exp(q . k / sqrt(d)); float64, since what is not stabilised spans e^±300
        stretch = (call.scale * query.shape[-1] ** 0.5) ** 0.5
        left, right = query.double() * stretch, key.double() * stretch
        left = feature_maps.favor(left, projection, stabilise="row")
        if not causal:
            return left, feature_maps.favor(right, projection, stabilise="all")
        right = feature_maps.favor(right, projection, stabilise="none")
        first = (
            torch.zeros(len(key), dtype=torch.long, device=key.device)
            if visible is None
            else visible.int().argmax(dim=1)
        )
        size = right[torch.arange(len(key), device=key.device), :, first].amax(dim=-1)
        return left, right / size.clamp_min(torch.finfo(size.dtype).tiny)[..., None, None]

    def _projection(self, call: ModelCall) -> Tensor:
        """Rows of standard normal numbers, the same for a layer and seed in every call."""
        size = call.query.shape[-1]
        if (call.layer, size) not in self._projections:
            generator = torch.Generator().manual_seed(self.seed + call.layer)
            features = self.num_features or feature_maps.default_features(size)
            drawn = feature_maps.draw_projection(features, size, generator=generator)
            self._projections[call.layer, size] = drawn.to(call.query.device)
        return self._projections[call.layer, size]


@dataclass(eq=False)
class SeparableSwap(Swap):
    """A softmax over the features of a query and one over all keys (Shen et al. 2018); never causal."""

    def attend(self, call: ModelCall) -> Attended:
        call.plain("efficient")
        only_auto("efficient", self.implementation, "separable")
        if causal_band(call, "efficient"):
            raise Unsupported(
                f"efficient: variant linear sums its keys over all tokens, and {call.name} must not see later ones"
            )
        key, value = call.grouped()
        visible = call.visible()
        if visible is not None:
            gone = ~visible[:, None, :, None]
            key, value = key.masked_fill(gone, 0), value.masked_fill(gone, 0)

        def run() -> Tensor:
            return separable_attend(call.query, key, value, visible)

        left, right = separate(call.query, key, visible)
        ones = left.new_ones(left.shape[:3])
        reason = "a softmax on each side and two products"
        attended = Attended(left, right, value, Full(), 1.0, run(), ones, "separable", reason, again=run)

        def reference() -> Tensor:
            return ((left @ right.transpose(-1, -2)) @ value.to(left)).to(value)

        return attended.told("linear", reference, features="softmax on each side", eps=None)

    def kind(self, shape: Shape) -> Kind:
        return "approximate"
