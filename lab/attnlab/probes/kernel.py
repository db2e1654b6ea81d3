"""One attention of a model, on its real Q, K and V, to be run again alone."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.api import attend

from ..hook import LayerCall


@dataclass(frozen=True, eq=False)
class KernelCall:
    """The inputs of one attention and the implementation that computed it."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    implementation: str
    floor_bytes: int
    """output and log-sum-exp: what it must make whatever the kernel"""
    backward: bool
    again: Callable[[], object] | None = None
    """what to run instead of softmax attention of these tensors"""

    @classmethod
    def of(cls, call: LayerCall, backward: bool) -> "KernelCall":
        query, key, value = (tensor.detach() for tensor in (call.query, call.key, call.value))
        if backward:
            query, key, value = (tensor.clone().requires_grad_() for tensor in (query, key, value))
        floor = sum(tensor.numel() * tensor.element_size() for tensor in (call.output, call.lse))
        again = None if backward else call.again
        return cls(
            call.layer, query, key, value, call.mask, call.scale, call.implementation, floor, backward, again
        )

    def run(self) -> None:
        """Compute it once; with ``backward`` also its gradients."""
        if self.again is not None:
            self.again()
            return
        made = attend(
            self.query,
            self.key,
            self.value,
            mask=self.mask,
            scale=self.scale,
            implementation=self.implementation,
        )
        if self.backward:
            made.output.float().square().mean().backward()
            self.query.grad = self.key.grad = self.value.grad = None
