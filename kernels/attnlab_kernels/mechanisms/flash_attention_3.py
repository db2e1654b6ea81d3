"""FlashAttention-3. Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision",
https://arxiv.org/abs/2407.08608.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnlab_kernels.attention_call import announce, composing
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Mask
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask
from attnlab_kernels.mechanisms.base import WIDTH_NAMES, SoftmaxModule, read_width
from attnlab_kernels.operations.fp8 import reference as fp8
from attnlab_kernels.operations.fp8 import triton_forward as fp8_kernel
from attnlab_kernels.operations.softmax import hopper
from attnlab_kernels.operations.softmax.api import (
    AttendCall,
    Support,
    Unsupported,
    _check,
    attend,
    observing,
    tell,
)
from attnlab_kernels.output import AttentionOutput

DEFAULT_WIDTH = 512
CORE_DEFAULTS: dict[str, Any] = {"use_fp8": False, "fp8_block_size": 128, "use_async": True}
MODULE_DEFAULTS: dict[str, Any] = {
    "num_heads": 8,
    "dropout": 0.0,
    "bias": True,
    "num_kv_heads": None,
    "head_dim": None,
    "causal": False,
    "attention_scale": None,
    "use_rotary": False,
    "rope_base": 10000.0,
    "layer_idx": 0,
    "implementation": "auto",
}


def is_flash_attention_3_available() -> bool:
    """Whether the kernel imports and the current device has compute capability 9.0; no other device runs it."""
    return bool(hopper.available())


class FlashAttention3Core(nn.Module):
    """The attention of FlashAttention-3 between given queries, keys and values.

    In 16 bits it is exact attention: the Hopper kernel where it runs, else the same function by ``attend``. In FP8 it
    is ``operations.fp8.reference``: the released kernel takes one scale a head, not one a block, and turns nothing.

    Args:
        use_fp8: round q, k, v and the probabilities to e4m3; forward only.
        fp8_block_size: rows of a head that share a scale.
        use_async: asynchronous copies and softmax beside the products. Only the Hopper kernel has them, and it always
            does: False means another kernel. ``aux["async"]`` says what happened.
    """

    def __init__(self, use_fp8: bool = False, fp8_block_size: int = 128, use_async: bool = True) -> None:
        super().__init__()
        if fp8_block_size < 1:
            raise ValueError(f"fp8_block_size must be at least 1 row; got {fp8_block_size}")
        self.use_fp8, self.fp8_block_size, self.use_async = use_fp8, fp8_block_size, use_async

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Mask | Tensor | None = None,
        causal: bool = False,
        *,
        scale: float | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Attend from ``q`` ``[B, Hq, n, D]`` to ``k``, ``v`` ``[B, Hkv, m, D]``: ``[B, Hq, n, D]``.

        Args:
            attn_mask: forms as in ``read_attention_mask``.
            causal: query row i sits at position ``m - n + i``.
            return_dict: ``AttentionOutput`` with lse and aux.
        """
        given, bias = read_attention_mask(
            attn_mask, batch=q.shape[0], heads=q.shape[1], num_queries=q.shape[2], num_keys=k.shape[2]
        )
        mask = (Causal() if causal else Full()) & given
        result = self.attend(q, k, v, mask=mask, scale=scale, bias=bias)
        return result if return_dict else result.output

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask,
        scale: float | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        implementation: str = "auto",
    ) -> AttentionOutput:
        """As ``operations.softmax.attend``; aux says what ran and why.

        Args:
            implementation: "auto", "hopper", or a name of ``operations.softmax`` (16 bits only); in eight bits
                "auto", "fp8_reference" (the simulation) or "fp8_triton" (our kernel, which computes the same).

        Raises:
            Unsupported: the named implementation cannot run the call; FP8 with gradients or dropout.
        """
        _check(q, k, v, mask, bias, dropout)
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if self.use_fp8:
            return self._attend_fp8(q, k, v, mask, factor, bias, dropout, implementation)
        support = Support(False, "use_async is False, and the kernel is asynchronous")
        if self.use_async:
            support = hopper.supports(q, k, v, mask=mask, bias=bias, dropout=dropout)
        if implementation == "hopper" and not support:
            raise Unsupported(f"implementation 'hopper' cannot run this call: {support.reason}")
        if implementation in ("auto", "hopper") and support:
            return self._attend_hopper(q, k, v, mask, factor, implementation)
        result = attend(
            q, k, v, mask=mask, scale=factor, bias=bias, dropout=dropout, implementation=implementation
        )
        why = f"no Hopper kernel: {support.reason}" if implementation == "auto" else "asked for"
        return self._label(result, "exact simulation", f"{why}; {result.aux['reason']}")

    def _attend_hopper(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, implementation: str
    ) -> AttentionOutput:
        output, lse = hopper.run(q, k, v, mask=mask, scale=scale)
        lse = lse.detach().float()
        tell(AttendCall(q, k, v, mask, scale, None, output, lse, "hopper"))
        reason = "asked for" if implementation == "hopper" else "auto: the kernel runs this call"
        result = AttentionOutput(output, lse=lse, aux={"implementation": "hopper", "reason": reason})
        return self._label(result, "hopper kernel", reason)

    def _attend_fp8(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        scale: float,
        bias: Tensor | None,
        dropout: float,
        implementation: str,
    ) -> AttentionOutput:
        support = _supports_fp8((q, k, v, bias), dropout, implementation)
        if not support:
            raise Unsupported(support.reason)
        if 0 in (q.shape[0], q.shape[2], k.shape[2]):
            empty = attend(q, k, v, mask=mask, scale=scale, bias=bias)
            return self._label(empty, "fp8 simulation", "nothing to attend to")
        kernel = fp8_kernel.supports(q, v, bias=bias, block_size=self.fp8_block_size)
        if implementation == "fp8_triton" and not kernel:
            raise Unsupported(f"implementation 'fp8_triton' cannot run this call: {kernel.reason}")
        own = implementation == "fp8_triton" or (implementation == "auto" and q.is_cuda and bool(kernel))
        name = "fp8_triton" if own else "fp8_reference"
        if own:
            ran = fp8_kernel.run(q, k, v, mask=mask, scale=scale, block_size=self.fp8_block_size)
        else:
            ran = fp8.run(q, k, v, mask=mask, scale=scale, bias=bias, block_size=self.fp8_block_size)
        query, key, value = (numbers.dequantize() for numbers in (ran.query, ran.key, ran.value))
        tell(AttendCall(query, key, value, mask, scale, bias, ran.output, ran.lse, name))
        result = AttentionOutput(ran.output, lse=ran.lse, aux={"implementation": name})
        reason = "block scales with a Hadamard rotation: the released kernel takes one scale a head and does not rotate"
        result = self._label(result, "fp8 kernel" if own else "fp8 simulation", reason)
        result.aux["fp8_block_size"] = self.fp8_block_size
        result.aux["padded_head_dim"] = ran.query.values.shape[-1]
        return result

    def _label(self, result: AttentionOutput, ran: str, reason: str) -> AttentionOutput:
        result.aux.update(ran=ran, reason=reason)
        result.aux["async"] = ran == "hopper kernel"
        return result

    def extra_repr(self) -> str:
        return f"use_fp8={self.use_fp8}, fp8_block_size={self.fp8_block_size}, use_async={self.use_async}"


class FlashAttention3(SoftmaxModule):
    """Attention as FlashAttention-3 computes it; returns the output alone.

    Args:
        config: any of the options below, in one mapping; an option may come either way, or both if they agree.
        embed_dim: model width (also: hidden_size, dim, d_model, query_dim), default 512.
        num_heads, dropout, bias: 8, 0.0 and True; dropout is for training in 16 bits.
        use_fp8, fp8_block_size, use_async: as in ``FlashAttention3Core``.
        num_kv_heads, head_dim, causal, attention_scale, use_rotary, rope_base, layer_idx: as in every module here.
        implementation: "auto", "hopper", or a name of ``operations.softmax``.

    Raises:
        ValueError: a value out of range, or two that disagree; TypeError for an unknown option.
    """

    legacy_returns: ClassVar[int] = 1

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        given = _merge(config or {}, options)
        widths = {name: given.pop(name) for name in WIDTH_NAMES if name in given}
        unknown = [name for name in given if name not in CORE_DEFAULTS | MODULE_DEFAULTS]
        if unknown:
            known = ", ".join(("embed_dim", *MODULE_DEFAULTS, *CORE_DEFAULTS))
            raise TypeError(f"unknown option {unknown[0]!r}; options are {known}")
        own = {name: given.pop(name, default) for name, default in CORE_DEFAULTS.items()}
        width = read_width("embed_dim", None, widths or {"embed_dim": DEFAULT_WIDTH})
        super().__init__(dim=width, **(MODULE_DEFAULTS | given))
        self.core = FlashAttention3Core(**own)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        attn_mask: Mask | Tensor | None = None,
        key_value: Tensor | None = None,
        causal: bool | None = None,
        **arguments: Any,
    ) -> Any:
        """Attend from ``x`` ``[B, n, embed_dim]`` to itself, or to ``key_value`` ``[B, m, embed_dim]``.

        Args:
            attn_mask: forms as in ``read_attention_mask`` (also: attention_mask).
            causal: default the module's setting, False.
            arguments: as in ``SoftmaxModule.forward``.

        Returns:
            the output ``[B, n, embed_dim]``; ``AttentionOutput`` with ``return_dict=True``. Its aux has "ran" ("hopper
            kernel", "exact simulation", "fp8 kernel" or "fp8 simulation"), "reason", "implementation" and "async".
        """
        if attn_mask is not None:
            if arguments.get("attention_mask") is not None:
                raise ValueError("attn_mask and attention_mask are two names of one argument; got both")
            arguments["attention_mask"] = attn_mask
        return super().forward(x, causal=causal, key_value=key_value, **arguments)

    def effective_map(
        self, hidden_states: Tensor, *, head: int, batch: int = 0, **arguments: Any
    ) -> SoftmaxMap:
        """The map of one head, region by region, from one forward pass; in FP8 that of the rounded queries and keys.

        Raises:
            ValueError: the call has a bias, which a map of queries and keys cannot hold.
        """
        calls: list[AttendCall] = []
        with torch.no_grad(), observing(calls.append):
            self.forward(hidden_states, **arguments, return_dict=True)
        (call,) = calls
        if call.bias is not None:
            raise ValueError("effective_map cannot hold a bias: pass a Mask or a key mask, no position_bias")
        key_head = head // (call.q.shape[1] // call.k.shape[1])
        wide = torch.promote_types(call.q.dtype, torch.float32)
        tensors = (call.q[batch, head], call.k[batch, key_head], call.lse[batch, head])
        arrays = (tensor.detach().to(wide).cpu().numpy() for tensor in tensors)
        return SoftmaxMap(*arrays, scale=call.scale, mask=call.mask, batch=batch)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, implementation: str
    ) -> AttentionOutput:
        rules: dict[str, Any] = {
            "mask": mask,
            "scale": self.scale,
            "bias": bias if bias is None else bias.to(q.dtype),
            "implementation": implementation,
        }
        dropout = self.dropout if self.training else 0.0
        with composing() as parts:
            result = self.core.attend(q, k, v, dropout=dropout, **rules)
        for part in parts:
            facts = {"fp8_block_size": self.core.fp8_block_size} if self.core.use_fp8 else {}
            announce(
                replace(
                    part.retold("softmax", **facts),
                    run=lambda *operands: self.core.attend(*operands, **rules).output,
                    operands=(q, k, v),
                )
            )
        return result

    def _map(self, query: Tensor, key: Tensor, mask: Mask, bias: Tensor | None, lse: Tensor | None) -> Tensor:
        if not self.core.use_fp8 or 0 in (*query.shape, *key.shape):
            return super()._map(query, key, mask, bias, lse)
        q8, k8 = fp8.quantize_scores(query, key, mask=mask, block_size=self.core.fp8_block_size)
        return super()._map(q8.dequantize(), k8.dequantize(), mask, bias, lse).to(query.dtype)


def _merge(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    for name in config.keys() & options.keys():
        if config[name] != options[name]:
            raise ValueError(
                f"{name} must agree; the config has {config[name]!r}, the call {options[name]!r}"
            )
    return {**config, **options}


def _supports_fp8(tensors: tuple[Tensor | None, ...], dropout: float, implementation: str) -> Support:
    if implementation not in ("auto", "fp8_reference", "fp8_triton"):
        return Support(
            False, f"implementation {implementation!r} cannot run FP8 with block scales; pass 'auto'"
        )
    if dropout:
        return Support(False, f"FP8 attention drops no probabilities; got dropout {dropout} in training")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Support(False, "FP8 attention is forward only: call it under torch.no_grad()")
    return Support(True)
