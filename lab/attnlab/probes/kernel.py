"""One attention of a model, on its real inputs, to be run again alone."""

import hashlib
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.operations.softmax import chunked
from attnlab_kernels.operations.softmax.api import attend
from attnlab_kernels.operations.softmax.support import Modifiers

from ..hook import LayerCall
from .timers import Step
from .work import SAME_AS_SOFTMAX, Work, work_of

PROVED_BYTES = 4 << 30
"""float64 scores that a plain reference may hold at once"""
CHUNKED_BYTES = 128 << 20
"""above these, softmax is proved by the reference that holds a tile of scores at a time"""


@dataclass(frozen=True, eq=False)
class KernelCall:
    """The inputs of one attention and what computes it."""

    layer: int
    operands: tuple[Tensor, ...]
    compute: Callable[..., object]
    """takes the operands; gives the output where ``backward``"""
    implementation: str
    floor_bytes: int
    """output and log-sum-exp: what it must make whatever the kernel"""
    backward: bool
    work: Work | None
    """what any kernel would have to do; None where no mask says it"""
    output: Tensor
    """what it made in the forward that was checked"""
    exact: Callable[..., Tensor] | None = None
    """the same function of the same operands by the plain reference; None where it takes no operands"""
    plain: bool = True
    """the operands are those of one softmax"""
    too_large_to_prove: str = ""
    """why the plain reference cannot run here"""
    task: dict[str, Any] = field(default_factory=dict)
    """what is computed, whatever computes it: runs with equal tasks did the same work"""

    @classmethod
    def of(cls, call: LayerCall, backward: bool) -> "KernelCall":
        operands, compute = _task(call, backward)
        operands = tuple(tensor.detach() for tensor in operands)
        if backward:
            operands = tuple(tensor.clone().requires_grad_() for tensor in operands)
        floor = sum(tensor.numel() * tensor.element_size() for tensor in (call.output, call.lse))
        exact, plain = _exact(call, backward)
        return cls(
            call.layer,
            operands,
            compute,
            call.implementation,
            floor,
            backward,
            work_of(call, backward),
            call.output,
            exact,
            plain,
            "" if plain or exact is None else _too_large(call),
            task_of(call, backward),
        )

    @property
    def operand_bytes(self) -> int:
        """Bytes of its operands; 0 where it takes none."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.operands)

    def copies(self, count: int) -> list[Step]:
        """Return the computation on so many sets of the same operands, each in memory of its own but the first."""
        others = (
            self.on(tuple(tensor.detach().clone() for tensor in self.operands)) for _ in range(count - 1)
        )
        return [self.run, *(other.run for other in others)]

    def on(self, operands: tuple[Tensor, ...]) -> "KernelCall":
        """The same computation of other operands of the same shapes."""
        if self.backward:
            operands = tuple(tensor.requires_grad_() for tensor in operands)
        return replace(self, operands=operands)

    def on_random(self, seed: int) -> "KernelCall | None":
        """The same computation of normal queries, keys and values; None where these are not its operands."""
        if not self.plain or len(self.operands) != 3:
            return None
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(tensor.shape, generator=generator) for tensor in self.operands)
        return self.on(tuple(one.to(of) for one, of in zip(drawn, self.operands, strict=True)))

    def run(self) -> None:
        """Compute it once; with ``backward`` also its gradients."""
        made = self.compute(*self.operands)
        if self.backward:
            assert isinstance(made, Tensor)
            made.float().square().mean().backward()
            for operand in self.operands:
                operand.grad = None


def _task(call: LayerCall, backward: bool) -> tuple[tuple[Tensor, ...], Callable[..., object]]:
    if call.attention is not None:
        return call.attention.operands, call.attention.run
    if call.again is not None and not backward:
        again = call.again
        return (), lambda: again()

    return (call.query, call.key, call.value), _attention(call, call.implementation)


def _exact(call: LayerCall, backward: bool) -> tuple[Callable[..., Tensor] | None, bool]:
    """The plain reference of the operands, and whether they are query, key and value of one softmax."""
    told, large = call.attention, _score_bytes(call) > CHUNKED_BYTES
    if told is None:
        by_closure = call.again is not None and not backward
        return (
            (None, False) if by_closure else (_in_tiles(call) if large else _attention(call, "eager"), True)
        )
    if not told.operands:
        return None, False
    same = len(told.operands) == 3 and all(
        map(operator.is_, told.operands, (told.query, told.key, told.value))
    )
    plain = told.kind in SAME_AS_SOFTMAX and same
    return (_in_tiles(call) if plain and large else told.reference), plain


def _in_tiles(call: LayerCall) -> Callable[..., Tensor]:
    """Plain softmax attention that holds a tile of its scores at a time."""
    others = dict(call.extras)
    bias = others.pop("bias", None)
    rules = {"mask": call.mask, "scale": call.scale, "bias": bias, "modifiers": Modifiers(**others)}
    return lambda query, key, value: chunked.run(query, key, value, **rules)[0]


def _score_bytes(call: LayerCall) -> int:
    batch, heads, queries, _ = call.query.shape
    return 8 * batch * heads * queries * call.key.shape[2]


def _too_large(call: LayerCall) -> str:
    needed = _score_bytes(call)
    if needed <= PROVED_BYTES:
        return ""
    return f"its plain reference needs {needed / 1e9:.0f} GB of scores"


def task_of(call: LayerCall, backward: bool) -> dict[str, Any]:
    """Return operation, shapes and dtype of an attention; masks and patterns by the hash of what they are."""
    told = call.attention
    kind = "softmax" if told is None or told.kind in SAME_AS_SOFTMAX else told.kind
    facts = {} if told is None or kind == "softmax" else dict(told.detail)
    rules = json.dumps(
        [call.mask.to_json(), call.scale, sorted(call.extras), facts], sort_keys=True, default=str
    )
    return {
        "operation": kind,
        "query": list(call.query.shape),
        "key": list(call.key.shape),
        "value": list(call.value.shape),
        "dtype": str(call.query.dtype).removeprefix("torch."),
        "backward": backward,
        "rules": hashlib.sha256(rules.encode()).hexdigest()[:16],
    }


def _attention(call: LayerCall, implementation: str) -> Callable[..., Tensor]:
    rules = {"mask": call.mask, "scale": call.scale, **call.extras}

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, implementation=implementation, **rules).output

    return attended
