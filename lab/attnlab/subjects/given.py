"""What one forward of a model is given, what its positions are called, and which attentions it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnlab_kernels.operations.softmax.api import Unsupported

from ..hook import Hook, LayerCall
from ..swap import Swap


@dataclass(frozen=True)
class Stream:
    """One sequence of positions: what they are, and what each is called."""

    title: str
    tokens: list[str]


@dataclass(frozen=True)
class Attention:
    """One attention of a forward."""

    name: str
    queries: int
    keys: int
    cross: bool


@dataclass(frozen=True)
class Given:
    """One input as a model's forward takes it."""

    arguments: dict[str, Tensor]
    """keywords of the forward, batch 1"""
    queries: str
    """the stream that is written or, where there is one stream only, read"""
    keys: str
    """the stream that is read"""
    streams: dict[str, Stream]
    attentions: list[Attention]
    """of one forward, in order"""
    text: str | None = None
    ids: Tensor | None = None
    """the decoder's tokens [T]"""
    detail: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    """what every trace says of its axes beside their streams"""


def scout(model: Any, arguments: Mapping[str, Tensor]) -> tuple[list[Attention], Any]:
    """Run the model once through our kernels; returns its attentions in order, and what it answered.

    Raises:
        Unsupported: its attention is none that our kernels compute.
    """
    seen: list[Attention] = []

    def hear(call: LayerCall) -> None:
        seen.append(Attention(call.name, call.query.shape[2], call.key.shape[2], call.cross))

    hook = Hook(model, Swap())
    with torch.inference_mode(), hook.installed():
        answer = hook.forward(lambda: model(**arguments), hear)
    return seen, answer


class Roles:
    """Which attention of a model leads from what to what."""

    def __init__(self, model: Any, given: Given) -> None:
        self._given = given
        self._modules = dict(model.named_modules())
        encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else nn.Module()
        self._encoder = {id(module) for module in encoder.modules()}

    def of(self, name: str, cross: bool) -> tuple[str, str, str]:
        """Return role (``self``, ``cross``, ``encoder``), query stream and key stream of a named attention."""
        queries, keys = self._given.queries, self._given.keys
        if queries == keys:
            return "self", queries, keys
        if cross:
            return "cross", queries, keys
        if id(self._modules.get(name.partition("#")[0])) in self._encoder:
            return "encoder", keys, keys
        return "self", queries, queries

    def detail(self, name: str, cross: bool) -> dict[str, Any]:
        """Return what the trace of an attention says of its axes."""
        role, queries, keys = self.of(name, cross)
        return {"role": role, "queries": queries, "keys": keys} | self._given.trace

    def check(self) -> None:
        """Raise Unsupported if an attention's size is not that of its streams."""
        for attention in self._given.attentions:
            _, queries, keys = self.of(attention.name, attention.cross)
            for side, stream, found in (
                ("queries", queries, attention.queries),
                ("keys", keys, attention.keys),
            ):
                known = len(self._given.streams[stream].tokens)
                if found != known:
                    raise Unsupported(
                        f"model: {attention.name} has {found} {side} where the {stream} has {known} positions"
                    )
