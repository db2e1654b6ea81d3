"""Softmax attention in a model's place: by any implementation, through a window, with fewer key heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnlab_kernels.attention_call import AttentionCall
from attnlab_kernels.masks import Mask, Window, mask_from_band
from attnlab_kernels.operations.softmax.api import IMPLEMENTATIONS, Unsupported, attend, supports
from attnlab_kernels.output import AttentionOutput

FUSED = ("sdpa_flash", "triton", "sdpa_cudnn", "sdpa_efficient")
"""what flash may be on auto, best first"""

Kind = Literal["exact", "approximate"]


@dataclass(frozen=True)
class Shape:
    """What of a model and its input decides whether a mechanism changes the numbers."""

    tokens: int
    kv_heads: int
    heads: int = 1
    head_dim: int = 0
    causal: bool = True


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One attention as the model asks for it."""

    query: Tensor
    """[B, Hq, Sq, D], after position encoding"""
    key: Tensor
    """[B, Hkv, Sk, D], those of the model's cache included"""
    value: Tensor
    """[B, Hkv, Sk, Dv]"""
    mask: Mask
    scale: float
    layer: int
    """number of this attention within the forward, from 0"""
    name: str
    cross: bool = False
    """the keys are of another sequence than the queries"""
    extras: dict[str, Any] = field(default_factory=dict)
    """what the model adds to plain softmax attention, as ``attend`` takes it"""

    def plain(self, mechanism: str) -> None:
        """Raises Unsupported where the model adds something that only softmax attention itself can do."""
        if self.extras:
            raise Unsupported(f"{mechanism}: has no {' and '.join(self.extras)}, which {self.name} asks for")

    def visible(self) -> Tensor | None:
        """Return which keys exist, bool [B, Sk], or None for all."""
        ranges = self.mask.band().ranges
        if ranges is None:
            return None
        limits = torch.tensor(ranges, device=self.key.device).expand(self.key.shape[0], 2)
        slots = torch.arange(self.key.shape[2], device=self.key.device)
        return (slots >= limits[:, :1]) & (slots < limits[:, 1:])

    def grouped(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hq, Sk, D], each head repeated for its group."""
        group = self.query.shape[1] // self.key.shape[1]
        if group == 1:
            return self.key, self.value
        return self.key.repeat_interleave(group, dim=1), self.value.repeat_interleave(group, dim=1)


@dataclass(frozen=True, eq=False)
class Attended:
    """What a swap made of a call, and the tensors that its map is drawn from."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    output: Tensor
    """[B, Hq, Sq, Dv]"""
    lse: Tensor
    """float32 [B, Hq, Sq], natural log"""
    implementation: str
    reason: str
    again: Callable[[], object] | None = None
    """computes the attention once more, alone; None: softmax attention of these tensors"""
    attention: AttentionCall | None = None
    """what the map is, where more is to be told of it than a softmax under a mask"""

    def told(self, kind: str, reference: Callable[..., Tensor], **detail: Any) -> Attended:
        """Return the same with a map of another kind, see ``views.trace_map``."""
        assert self.again is not None
        again = self.again
        call = AttentionCall(
            kind,
            self.query,
            self.key,
            self.value,
            self.output,
            self.lse,
            self.mask,
            self.scale,
            self.implementation,
            run=lambda: output_of(again()),
            reference=reference,
            operands=(),
            detail=detail,
        )
        return replace(self, attention=call)


@dataclass(eq=False)
class Swap:
    """One mechanism in the place of a model's own; this one is softmax attention of changed keys, values and mask."""

    mechanism: str = "multi_head"
    implementation: str = "auto"
    window_size: int | None = None
    """a query sees this many keys, its own included (in a model that looks ahead: as many after it)"""
    num_kv_heads: int | None = None
    """mean-pool the model's key and value heads to this many"""

    def attend(self, call: ModelCall) -> Attended:
        """Compute one attention of the model.

        Raises:
            Unsupported: the mechanism cannot compute this call, with the reason.
        """
        key, value = self.keys_and_values(call.key, call.value)
        mask = call.mask if call.cross else self.mask(call.mask)
        name = self.chosen(call.query, key, value, mask, call.extras)
        made = attend(call.query, key, value, mask=mask, scale=call.scale, implementation=name, **call.extras)
        return softmax_attended(call, key, value, mask, made)

    def kind(self, shape: Shape) -> Kind:
        """Return ``exact`` or ``approximate``: whether it computes what the model was trained with."""
        narrowed = self.window_size is not None and self.window_size < shape.tokens
        pooled = self.num_kv_heads is not None and self.num_kv_heads < shape.kv_heads
        return "approximate" if narrowed or pooled else "exact"

    @property
    def exact(self) -> Swap:
        """The same implementation without the approximation: what the loss is measured against."""
        return Swap("multi_head", self.implementation if self.implementation in IMPLEMENTATIONS else "auto")

    def fits(self, model: Any) -> None:
        """Raises Unsupported where the model has no attention of this kind."""

    def mask(self, mask: Mask) -> Mask:
        """Return the model's own mask narrowed to the window."""
        if self.window_size is None:
            return mask
        before = self.window_size - 1
        ahead = 0 if mask.band().right == 0 else before
        return mask & Window(before, ahead)

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hkv, S, D] with neighbouring heads averaged (Ainslie et al. 2023, GQA).

        Raises:
            Unsupported: the model's heads cannot be pooled to that number.
        """
        heads = key.shape[1]
        if self.num_kv_heads in (None, heads):
            return key, value
        assert self.num_kv_heads is not None
        if heads % self.num_kv_heads:
            raise Unsupported(
                f"num_kv_heads: must divide the model's {heads} key and value heads, got {self.num_kv_heads}"
            )
        return _pooled(key, self.num_kv_heads), _pooled(value, self.num_kv_heads)

    def pooled(self, call: ModelCall) -> ModelCall:
        """Return the call with its keys and values averaged to ``num_kv_heads``."""
        key, value = self.keys_and_values(call.key, call.value)
        return replace(call, key=key, value=value)

    def chosen(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, extras: dict[str, Any] | None = None
    ) -> str:
        """Return the implementation to ask for: flash on auto takes the first fused one that runs the call.

        Raises:
            Unsupported: no fused implementation runs it.
        """
        if self.mechanism != "flash" or self.implementation != "auto":
            return self.implementation
        refused = []
        for name in FUSED:
            support = supports(name, query, key, value, mask=mask, **(extras or {}))
            if support:
                return name
            refused.append(f"{name}: {support.reason}")
        raise Unsupported(f"flash: no fused implementation runs this call ({'; '.join(refused)})")


@dataclass(eq=False)
class CrossSwap(Swap):
    """Cross-attention as our kernels compute it, in models that read a second sequence; their other layers likewise."""

    def fits(self, model: Any) -> None:
        config = model.config
        reads = config.is_encoder_decoder or getattr(config, "add_cross_attention", False)
        if not reads:
            raise Unsupported(
                f"cross: not applicable to {type(model).__name__}: it reads one sequence, and its weights were "
                "trained on no second one"
            )


def softmax_attended(
    call: ModelCall,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    made: AttentionOutput,
    *,
    query: Tensor | None = None,
    again: Callable[[], object] | None = None,
) -> Attended:
    """What softmax attention made, for these keys, values and mask (query: default the call's own)."""
    assert made.lse is not None
    name, reason = str(made.aux["implementation"]), str(made.aux.get("reason", ""))
    query = call.query if query is None else query
    return Attended(query, key, value, mask, call.scale, made.output, made.lse, name, reason, again)


def output_of(made: Any) -> Tensor:
    """The tensor in what a swap computed."""
    return made if isinstance(made, Tensor) else made.output


def softmax_reference(call: ModelCall, key: Tensor, value: Tensor) -> Callable[..., Tensor]:
    """Plain softmax attention of a call's queries to these keys and values, to be asked for without operands."""

    def compute() -> Tensor:
        rules = {"mask": call.mask, "scale": call.scale, **call.extras}
        return attend(call.query, key, value, implementation="eager", **rules).output

    return compute


def causal_band(call: ModelCall, mechanism: str) -> bool:
    """Say whether a call is causal, for mechanisms that know causal and padding only.

    Raises:
        Unsupported: its mask is something else.
    """
    band = call.mask.band()
    if band.left is not None or band.right not in (None, 0):
        raise Unsupported(
            f"{mechanism}: knows causal and padding only; {call.name} has a {call.mask.describe()}"
        )
    return band.right == 0


def only_auto(mechanism: str, implementation: str, *own: str) -> None:
    """Raises Unsupported unless the implementation is ``auto`` or one of the mechanism's own."""
    if implementation not in ("auto", *own):
        raise Unsupported(
            f"{mechanism}: is an operation of its own, {', '.join(own)}; {implementation!r} cannot run it"
        )


def element_mask(mask: Mask, element: int) -> Mask:
    """Return the mask of one batch element: padding keeps only that element's range."""
    band = mask.band()
    if band.ranges is None or len(band.ranges) == 1:
        return mask
    return mask_from_band(replace(band, ranges=(band.ranges[element],)))


def _pooled(tensor: Tensor, heads: int) -> Tensor:
    batch, present, tokens, size = tensor.shape
    return tensor.reshape(batch, heads, present // heads, tokens, size).mean(dim=2)
