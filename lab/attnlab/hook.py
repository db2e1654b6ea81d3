"""Our kernels inside a transformers model, and what passes through them.

transformers calls one registered function for every attention of a model, after position encoding, and one
for its mask. Both are registered as "attnlab": without the second, transformers would drop masks in silence.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from attnlab_kernels.attention_call import AttentionCall
from attnlab_kernels.masks import Causal, Full, Mask
from attnlab_kernels.operations.softmax.api import Unsupported

from .swap import ModelCall, Swap
from .transformers_masks import MaskCarrier, describe_mask

NAME = "attnlab"

HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "deterministic",
        "encoder_hidden_states",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)
"""keywords that models pass along and that change nothing in the attention itself"""

EXTRAS = {"softcap": "softcap", "s_aux": "sinks", "position_bias": "bias"}
"""what models add to softmax attention, and what ``attend`` calls it"""

CONTEXT = ("key_value_states", "encoder_hidden_states")
"""what a model's attention calls the other sequence that it reads"""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One attention of the model as our kernel computed it."""

    layer: int
    """number of this attention within the forward, from 0"""
    name: str
    """path of the module in the model; a module that runs several times gets #2, #3 ..."""
    query: Tensor
    """[B, Hq, Sq, D]"""
    key: Tensor
    """[B, Hkv, Sk, D]; Hkv after the swap"""
    value: Tensor
    """[B, Hkv, Sk, Dv]"""
    mask: Mask
    scale: float
    output: Tensor
    """[B, Hq, Sq, Dv]"""
    lse: Tensor
    """float32 [B, Hq, Sq], natural log"""
    implementation: str
    reason: str
    again: Callable[[], object] | None = None
    """computes it once more, alone; None: softmax attention of these tensors"""
    cross: bool = False
    """the keys are of another sequence than the queries"""
    attention: AttentionCall | None = None
    """what the mechanism told, where its map is not that of one softmax; the fields above repeat its tensors"""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """softcap, alibi, bias and sinks, as ``attend`` takes them"""

    @classmethod
    def told(cls, layer: int, name: str, call: AttentionCall) -> "LayerCall":
        """A call as a mechanism announced it."""
        tensors = (call.query, call.key, call.value, call.output, call.normaliser)
        query, key, value, output, normaliser = (tensor.detach() for tensor in tensors)
        facts = (layer, name, query, key, value, call.mask, call.scale, output, normaliser)
        return cls(*facts, call.implementation, "", attention=call, extras=call.modifiers)


Listener = Callable[[LayerCall], None]
T = TypeVar("T")


@dataclass
class Hook:
    """A swap of mechanism and implementation for every attention of one model."""

    model: Any
    swap: Swap
    listener: Listener | None = None
    calls: int = 0
    """attentions seen in the present forward"""
    implementations: Counter[str] = field(default_factory=Counter)
    _names: dict[int, str] = field(default_factory=dict)
    _seen: Counter[int] = field(default_factory=Counter)
    _crossing: set[int] = field(default_factory=set)
    """modules whose present keys are of another sequence"""

    def __post_init__(self) -> None:
        self._names = {id(module): name for name, module in self.model.named_modules()}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put our kernels into the model; its own attention comes back at the end.

        Raises:
            Unsupported: the model does not let its attention be chosen.
        """
        self.swap.fits(self.model)
        config = self.model.config
        before = config._attn_implementation
        if not self.model._can_set_attn_implementation():
            raise Unsupported(f"model: {type(self.model).__name__} does not let its attention be replaced")
        self.model.set_attn_implementation(NAME)
        token = _current.set(self)
        watching = [handle for module in self.model.modules() for handle in self._watch(module)]
        try:
            yield
        finally:
            for handle in watching:
                handle.remove()
            _current.reset(token)
            self.model.set_attn_implementation(before)

    def forward(self, run: Callable[[], T], listener: Listener | None = None) -> T:
        """Run the model once through our kernels, inside ``installed``; the listener hears of each attention.

        Args:
            run: calls the model.

        Raises:
            Unsupported: something in the model's attention cannot be computed or described, or nothing of it
                passed through our kernels.
        """
        self.calls = 0
        self._seen.clear()
        self.listener = listener
        try:
            result = run()
        finally:
            self.listener = None
        if self.calls == 0:
            name = type(self.model).__name__
            raise Unsupported(f"model: {name} computes its attention where our kernels cannot reach it")
        return result

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        scale: float,
        extras: dict[str, Any],
    ) -> Tensor:
        """Compute one attention with the swapped mechanism; returns [B, Hq, Sq, Dv]."""
        layer, name = self._place(module)
        call = ModelCall(query, key, value, mask, scale, layer, name, id(module) in self._crossing, extras)
        made = self.swap.attend(call)
        self.implementations[made.implementation] += 1
        if self.listener is not None:
            self.listener(
                LayerCall(
                    layer,
                    name,
                    made.query,
                    made.key,
                    made.value,
                    made.mask,
                    made.scale,
                    made.output,
                    made.lse,
                    made.implementation,
                    made.reason,
                    made.again,
                    call.cross,
                    made.attention,
                    extras,
                )
            )
        return made.output

    def _watch(self, module: Any) -> Iterator[Any]:
        """Learn of an attention whether its keys are of another sequence, from what its caller hands over."""
        accepted = inspect.signature(module.forward).parameters
        named = [name for name in CONTEXT if name in accepted]
        if not named:
            return

        def note(module: Any, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            bound = dict(zip(accepted, given, strict=False)) | keywords
            crosses = any(bound.get(name) is not None for name in named)
            (self._crossing.add if crosses else self._crossing.discard)(id(module))

        yield module.register_forward_pre_hook(note, with_kwargs=True)

    def _place(self, module: Any) -> tuple[int, str]:
        layer = self.calls
        self.calls += 1
        self._seen[id(module)] += 1
        name, times = self._names.get(id(module), type(module).__name__), self._seen[id(module)]
        return layer, name if times == 1 else f"{name}#{times}"


def cache_keyword(model: Any) -> str:
    """Return what the model's forward calls its cache: past_key_values until transformers 5.23, then cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


_current: ContextVar[Hook | None] = ContextVar("attnlab_hook", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls; returns [B, Sq, Hq, Dv] as it wants it."""
    hook = _current.get()
    if hook is None:
        raise RuntimeError('attention "attnlab" was called outside Hook.installed()')
    _refuse_unknown(module, attention_mask, dropout, keywords)
    extras = {ours: keywords[theirs] for theirs, ours in EXTRAS.items() if keywords.get(theirs) is not None}
    mask, num_keys = _mask_of(module, query, key, attention_mask, is_causal)
    if num_keys < key.shape[2]:
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    if "bias" in extras:
        extras["bias"] = extras["bias"][..., :num_keys]
        if not extras["bias"].any():
            del extras["bias"]  # layers without one of their own are given zeros
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = hook.attend(module, query, key, value, mask, scale, extras)
    return output.transpose(1, 2).contiguous(), None


def _refuse_unknown(module: Any, attention_mask: Any, dropout: float, keywords: dict[str, Any]) -> None:
    if dropout:
        raise Unsupported(f"dropout: must be 0 for a map to exist, got {dropout}")
    for name, value in keywords.items():
        if value is None or value is False or name in HARMLESS or name in EXTRAS:
            continue
        if name == "sliding_window" and isinstance(attention_mask, MaskCarrier):
            continue  # the described mask holds the window already
        raise Unsupported(f"{name}: {type(module).__name__} asks for it and our kernels would ignore it")


def _mask_of(module: Any, query: Tensor, key: Tensor, given: Any, is_causal: bool | None) -> tuple[Mask, int]:
    if isinstance(given, MaskCarrier):
        return given.mask, given.num_keys
    num_queries, num_keys = query.shape[2], key.shape[2]
    if given is not None:
        raise Unsupported(
            f"attention_mask: {type(module).__name__} gives {_said(given)}, which no mask describes"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal or num_queries == 1:
        return Full(), num_keys
    if num_queries != num_keys:
        raise Unsupported(
            f"attention_mask: {type(module).__name__} gives none, so causal is ambiguous for {num_queries} "
            f"queries over {num_keys} keys"
        )
    return Causal(), num_keys


def _said(mask: Any) -> str:
    if isinstance(mask, torch.Tensor):
        return f"a dense {str(mask.dtype).removeprefix('torch.')} tensor {list(mask.shape)}"
    return f"a {type(mask).__name__}"


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, describe_mask)
