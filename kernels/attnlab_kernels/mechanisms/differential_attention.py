"""Differential attention. Ye et al., "Differential Transformer", https://arxiv.org/abs/2410.05258.

Variant "v2" is the authors' later form (microsoft/unilm, Diff-Transformer V2): twice the queries over shared keys and
values, λ from the token, no norm.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab_kernels.attention_call import AttentionCall, announce, composing, heard
from attnlab_kernels.caches import Cache
from attnlab_kernels.difference_map import DifferenceMap
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Mask
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_aliases, read_width
from attnlab_kernels.operations.differential.api import Difference, Pair, difference_attend
from attnlab_kernels.operations.differential.reference import run
from attnlab_kernels.operations.softmax.api import AttendCall, observing
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary

Variant = Literal["v1", "v2"]
Layout = Literal["paper", "halves"]


def scheduled_lambda(layer_idx: int) -> float:
    """λ_init of the paper's layer ``layer_idx``, counted from 0: 0.2 in the first, towards 0.8."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


class DifferentialAttention(SoftmaxModule):
    """Two softmax maps a head, the second subtracted with weight λ. Causal unless told otherwise.

    v1: every head has two queries and keys of d and one value of 2 d; λ = exp(λq1·λk1) - exp(λq2·λk2) + λ_init in
    float32 or wider, shared by the heads; the head's output is RMS-normed over 2 d and multiplied by 1 - λ_init (the
    initial value, not λ). Half the heads of plain attention have as many parameters and cache bytes.
    v2: two queries of d a head over one key and value of d; λ = sigmoid(W x) for each token and head; no norm.

    Returns ``(output, signed map or None, cache or None)``. A v1 cache has both keys in one: ``[B, Hkv, m, 2 d]``.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        num_heads: differential heads, each of two maps.
        head_dim: d; default ``dim // (2 * num_heads)`` in v1, ``dim // num_heads`` in v2.
        dropout: must be 0; the paper defines none for a difference of maps.
        lambda_init: a number in [0, 1), or "schedule": 0.8 - 0.6 exp(-0.3 layer_idx).
        lambda_learnable: False keeps λ at λ_init (v1).
        num_kv_heads: differential key heads, a divisor of ``num_heads``; default all.
        layout: rows of the projections in v1. "paper": head i is rows 2i and 2i + 1 of d, as in the authors' code and
            timm. "halves": head i is i and i + num_heads, and loads transformers' DiffLlamaAttention as it is (with
            ``norm_affine=False`` and half its head counts).
        norm_affine: whether the RMS norm has a weight, one for all heads.
    """

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 4,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        lambda_init: float | Literal["schedule"] = 0.8,
        lambda_learnable: bool = True,
        *,
        variant: Variant = "v1",
        num_kv_heads: int | None = None,
        layout: Layout = "paper",
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        causal: bool = True,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        dim = read_width("dim", dim, widths)
        _check_choice("variant", variant, ("v1", "v2"))
        _check_choice("layout", layout, ("paper", "halves"))
        if dropout:
            raise ValueError(f"dropout must be 0: a difference of maps has no defined dropout; got {dropout}")
        maps = 2 if variant == "v1" else 1
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}")
        if head_dim is None and dim % (maps * num_heads):
            raise ValueError(
                f"the width must be a multiple of {maps * num_heads} = {maps} * num_heads, or head_dim given; got {dim}"
            )
        head_dim = dim // (maps * num_heads) if head_dim is None else head_dim
        super().__init__(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=maps * head_dim,
            bias=bias,
            causal=causal,
            attention_scale=head_dim**-0.5 if attention_scale is None and head_dim > 0 else attention_scale,
            use_rotary=use_rotary,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.head_dim = head_dim
        self.variant, self.layout = variant, layout
        self.lambda_init = _read_lambda(lambda_init, layer_idx)
        self.lambda_learnable = lambda_learnable
        if variant == "v2":
            self.q_proj = nn.Linear(dim, 2 * num_heads * head_dim, bias=bias)
            self.lambda_proj = nn.Linear(dim, num_heads, bias=False)
            return
        self.norm = nn.RMSNorm(2 * head_dim, eps=norm_eps, elementwise_affine=norm_affine)
        if lambda_learnable:
            self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
                nn.Parameter(torch.randn(head_dim) * 0.1) for _ in range(4)
            )

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        attention_mask: Mask | Tensor | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_bias: PositionBias | None = None,
        past_key_value: Cache | tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        causal: bool | None = None,
        return_dict: bool = False,
        implementation: str | None = None,
        **aliases: Any,
    ) -> Any:
        """Attend from ``hidden_states`` ``[B, n, dim]``; arguments as in ``SoftmaxModule.forward``.

        A mask and a bias act on both maps, a rotation (of d) on both queries and keys. ``attentions`` is the signed map
        ``[B, H, n, m]``, detached; ``aux`` has "lambda" (a number, or ``[B, H, n]``) and "lse", one for each map.
        """
        context, implementation = read_aliases(context, implementation, aliases)
        self._check_input(hidden_states, context)
        query, key, value = self._project(hidden_states, hidden_states if context is None else context)
        step = self._open_step(
            query,
            key,
            value,
            context=context,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            position_bias=position_bias,
            past_key_value=past_key_value,
            use_cache=use_cache,
            causal=causal,
        )
        query, key, value, mask = step.query, step.key, step.value, step.mask
        bias = None if step.bias is None else step.bias.to(query.dtype)
        queries = Pair(query[:, 0::2], query[:, 1::2])
        keys = Pair(*key.chunk(2, dim=-1)) if self.variant == "v1" else Pair(key, key)
        weight = self.lambda_weight(hidden_states)
        rules: dict[str, Any] = {"mask": mask, "scale": self.scale, "bias": bias}
        name = implementation or self.implementation
        with composing():
            result = difference_attend(queries, keys, value, weight, implementation=name, **rules)
        if heard():
            _announce(queries, keys, value, weight, result, rules)
        maps = None
        if output_attentions:
            first, second = (
                self._map(q, k, mask, bias, lse) for q, k, lse in zip(queries, keys, result.lse, strict=True)
            )
            maps = first - (weight[..., None] if weight.dim() else weight).detach().to(first.dtype) * second
        heads = result.output
        if self.variant == "v1":
            heads = self.norm(heads) * (1 - self.lambda_init)
        aux = {
            "implementation": result.implementation,
            "reason": result.reason,
            "lambda": weight.detach(),
            "lse": tuple(result.lse),
            "heads": result.output,
        }
        output = AttentionOutput(
            self.o_proj(heads.transpose(1, 2).flatten(2)), maps, step.cache if use_cache else None, None, aux
        )
        return output if return_dict else self._legacy(output)

    def lambda_weight(self, hidden_states: Tensor) -> Tensor:
        """λ in float32 or wider: a number in v1, ``[B, H, n]`` in v2."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        if self.variant == "v2":
            return torch.sigmoid(self.lambda_proj(hidden_states).to(wide)).transpose(1, 2)
        if not self.lambda_learnable:
            return torch.tensor(self.lambda_init, dtype=wide, device=hidden_states.device)
        first = (self.lambda_q1.to(wide) * self.lambda_k1.to(wide)).sum().exp()
        second = (self.lambda_q2.to(wide) * self.lambda_k2.to(wide)).sum().exp()
        return first - second + self.lambda_init

    def effective_map(
        self, hidden_states: Tensor, *, head: int, batch: int = 0, **arguments: Any
    ) -> DifferenceMap:
        """The signed map of one head, region by region, from one forward pass with these arguments.

        The pass makes two softmax calls, whatever the module's implementation is.

        Raises:
            ValueError: the call has a bias, which a map of queries and keys cannot hold.
        """
        calls: list[AttendCall] = []
        arguments["implementation"] = "pair"
        with torch.no_grad(), observing(calls.append):
            result = self.forward(hidden_states, **arguments, return_dict=True)
        if calls[0].bias is not None:
            raise ValueError("effective_map cannot hold a bias: pass a Mask or a key mask, no position_bias")
        weight = result.aux["lambda"]
        return DifferenceMap(
            *(_softmax_map(call, head, batch) for call in calls),
            weight=float(weight) if weight.dim() == 0 else weight[batch, head].cpu().numpy(),
        )

    def _project(self, hidden_states: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, heads, n, d]``; what belongs to one head lies side by side."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(source), self.v_proj(source)
        if self.variant == "v2":
            return _split(query, self.head_dim), _split(key, self.head_dim), _split(value, self.head_dim)
        return self._paired(query), self._paired(key), _side_by_side(self._paired(value))

    def _encode(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        query, key = super()._encode(query, key, *args, **kwargs)
        return query, _side_by_side(key) if self.variant == "v1" else key

    def _paired(self, projected: Tensor) -> Tensor:
        heads = _split(projected, self.head_dim)
        if self.layout == "paper":
            return heads
        return heads.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


DiffAttn = DifferentialAttention


def _announce(
    query: Pair, key: Pair, value: Tensor, weight: Tensor, result: Difference, rules: dict[str, Any]
) -> None:
    def again(*operands: Tensor) -> Tensor:
        first, second, key, other, value = operands
        name = result.implementation
        pairs = Pair(first, second), Pair(key, other)
        return difference_attend(*pairs, value, weight.detach(), implementation=name, **rules).output

    def reference(*operands: Tensor) -> Tensor:
        first, second, key, other, value = operands
        return run(Pair(first, second), Pair(key, other), value, weight.detach(), **rules)[0]

    announce(
        AttentionCall(
            "difference",
            query.first,
            key.first,
            value,
            result.output,
            result.lse.first,
            rules["mask"],
            rules["scale"],
            result.implementation,
            again,
            reference,
            (*query, *key, value),
            extra={
                "second_query": query.second,
                "second_key": key.second,
                "second_lse": result.lse.second,
                "lambda": weight.expand(result.lse.first.shape),
            },
            unmapped=""
            if rules["bias"] is None
            else "its scores have a bias, which queries and keys do not hold",
        )
    )


def _split(projected: Tensor, head_dim: int) -> Tensor:
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _side_by_side(pairs: Tensor) -> Tensor:
    """``[B, 2 H, n, d]`` to ``[B, H, n, 2 d]``."""
    return pairs.unflatten(1, (-1, 2)).transpose(2, 3).flatten(-2)


def _softmax_map(call: AttendCall, head: int, batch: int) -> SoftmaxMap:
    key_head = head // (call.q.shape[1] // call.k.shape[1])
    query, key, lse = call.q[batch, head], call.k[batch, key_head], call.lse[batch, head]
    wide = torch.promote_types(query.dtype, torch.float32)
    arrays = (tensor.detach().to(wide).cpu().numpy() for tensor in (query, key, lse))
    return SoftmaxMap(*arrays, scale=call.scale, mask=call.mask, batch=batch)


def _read_lambda(given: float | str, layer_idx: int) -> float:
    if given == "schedule":
        return scheduled_lambda(layer_idx)
    if isinstance(given, str) or not 0 <= given < 1:
        raise ValueError(f"lambda_init must be 'schedule' or at least 0 and below 1; got {given!r}")
    return float(given)


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {given!r}")
