"""One attention of a model, on its real inputs, to be run again alone."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attnlab_kernels.operations.softmax.api import attend

from ..hook import LayerCall
from .work import Work, work_of


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
    exact: Callable[..., Tensor] | None = None
    """the same function of the same operands by the plain reference; None where they are not of one softmax"""

    @classmethod
    def of(cls, call: LayerCall, backward: bool) -> "KernelCall":
        operands, compute = _task(call, backward)
        operands = tuple(tensor.detach() for tensor in operands)
        if backward:
            operands = tuple(tensor.clone().requires_grad_() for tensor in operands)
        floor = sum(tensor.numel() * tensor.element_size() for tensor in (call.output, call.lse))
        work = work_of(call, backward)
        exact = _exact(call, backward)
        return cls(call.layer, operands, compute, call.implementation, floor, backward, work, exact)

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


def _exact(call: LayerCall, backward: bool) -> Callable[..., Tensor] | None:
    told = call.attention
    if told is None:
        return _attention(call, "eager") if call.again is None or backward else None
    tensors = (told.query, told.key, told.value)
    same = len(told.operands) == 3 and all(map(operator.is_, told.operands, tensors))
    return told.reference if same and told.kind == "softmax" else None


def _attention(call: LayerCall, implementation: str) -> Callable[..., Tensor]:
    rules = {"mask": call.mask, "scale": call.scale, **call.extras}

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, implementation=implementation, **rules).output

    return attended
