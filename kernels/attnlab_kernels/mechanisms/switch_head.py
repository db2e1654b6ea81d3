"""SwitchHead. Csordás et al., "SwitchHead: Accelerating Transformers with Mixture-of-Experts Attention",
https://arxiv.org/abs/2312.07987.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnlab_kernels.attention_call import announce, composing
from attnlab_kernels.caches import Cache
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.expert_map import ExpertMap
from attnlab_kernels.masks import Mask
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_aliases, read_width
from attnlab_kernels.operations.expert_projection import api as projections
from attnlab_kernels.operations.expert_projection import reference as experts
from attnlab_kernels.operations.expert_projection.reference import Router, Routing
from attnlab_kernels.operations.softmax.api import AttendCall, attend, observing
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary

PROJECTIONS = ("auto", *projections.IMPLEMENTATIONS)


class SwitchHeadAttention(SoftmaxModule):
    """Few heads whose value and output projections are experts: chosen by the key token and by the query token.

    Every head has its own two routers, sigmoid gates (float32 or wider) of which the ``top_k`` largest are used as they
    are. Queries and keys are plain. Causal unless told otherwise.

    Returns ``(output, map or None, auxiliary loss or None)``: the loss is a scalar in training, None in evaluation. The
    cache, of keys and mixed values, has no place in this tuple: pass a cache object, which is filled in place, or
    ``return_dict=True``.

    Args:
        d_model: model width (also: hidden_size, dim, embed_dim, query_dim).
        num_experts: experts of a head, for values and for outputs; 1 is a plain value with a gate.
        top_k: experts that each token uses; the paper uses 2 or 3.
        bias: of queries, keys and the sum of the outputs; experts have none.
        aux_loss_coeff: weight of ``expert_projection.reference.balance``, averaged over both routers and every token,
            padded ones too. The paper needs none.
        router: "sigmoid", or "softmax" over all experts.
        rotary_fraction: share of each head that the module's own rotation turns; the paper turns half.
        projection: "grouped" multiplies with the chosen experts only, "dense" with all of them, "triton" is our
            kernel (no backward), "auto" takes it on a GPU and grouped elsewhere.
    """

    def __init__(
        self,
        d_model: int | None = None,
        num_heads: int = 2,
        num_experts: int = 4,
        top_k: int = 1,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        aux_loss_coeff: float = 0.01,
        *,
        router: Router = "sigmoid",
        causal: bool = True,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rotary_fraction: float = 0.5,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        projection: str = "auto",
        **widths: int,
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1; got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts = {num_experts}; got {top_k}")
        if aux_loss_coeff < 0:
            raise ValueError(f"aux_loss_coeff must be at least 0; got {aux_loss_coeff}")
        if not 0 < rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must be above 0 and at most 1; got {rotary_fraction}")
        for name, given, choices in (
            ("router", router, ("sigmoid", "softmax")),
            ("projection", projection, PROJECTIONS),
        ):
            if given not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {given!r}")
        super().__init__(
            dim=read_width("d_model", d_model, widths),
            num_heads=num_heads,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            causal=causal,
            attention_scale=attention_scale,
            use_rotary=use_rotary,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.num_experts, self.top_k = num_experts, top_k
        self.router: Router = router
        self.aux_loss_coeff, self.projection = aux_loss_coeff, projection
        self.rotary_fraction = rotary_fraction
        # in the place of the plain projections
        del self.v_proj, self.o_proj
        shape = (num_heads, num_experts)
        self.value_experts = nn.Parameter(_uniform(*shape, self.dim, self.head_dim, fan_in=self.dim))
        inner = num_heads * self.head_dim
        self.output_experts = nn.Parameter(_uniform(*shape, self.head_dim, self.dim, fan_in=inner))
        self.output_bias = nn.Parameter(torch.zeros(self.dim)) if bias else None
        self.source_router = nn.Linear(self.dim, num_heads * num_experts, bias=False)
        self.destination_router = nn.Linear(self.dim, num_heads * num_experts, bias=False)
        for linear in (self.source_router, self.destination_router):
            _equal_row_norms(linear.weight)

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

        ``aux`` has "routing": the ``Routing`` of the new value tokens ("source") and of the queries ("destination"),
        "aux_loss", and "heads" ``[B, H, n, D]``, the heads before the output experts.
        """
        context, implementation = read_aliases(context, implementation, aliases)
        self._check_input(hidden_states, context)
        origin = hidden_states if context is None else context
        source = self._route(self.source_router, origin)
        destination = self._route(self.destination_router, hidden_states)
        value, _ = projections.project_in(origin, self.value_experts, source, implementation=self.projection)
        step = self._open_step(
            _split(self.q_proj(hidden_states), self.num_heads),
            _split(self.k_proj(origin), self.num_heads),
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
        query, key, value, mask, bias, cache, _ = step
        with composing() as parts:
            result = self._attend(query, key, value, mask, bias, implementation or self.implementation)
        for part in parts:
            gates = {"source_gates": source, "destination_gates": destination}
            told = part.retold("experts", experts=self.num_experts, top_k=self.top_k)
            # a cache keeps mixed values, not who mixed them
            known = gates if source.scores.shape[1] == key.shape[2] else {"destination_gates": destination}
            announce(replace(told, extra={n: r.dense().transpose(1, 2) for n, r in known.items()}))
        maps = self._map(query, key, mask, bias, result.lse) if output_attentions else None
        output, chosen = projections.project_out(
            result.output, self.output_experts, destination, implementation=self.projection
        )
        output = output if self.output_bias is None else output + self.output_bias
        aux = result.aux | {
            "routing": {"source": source, "destination": destination},
            "projection": chosen.implementation,
            "aux_loss": self._aux_loss(source, destination),
            "heads": result.output,
        }
        given_back = AttentionOutput(output, maps, cache if use_cache else None, result.lse, aux)
        return given_back if return_dict else (output, maps, aux["aux_loss"])

    def dense_output(self, hidden_states: Tensor) -> Tensor:
        """The output of ``forward`` for whole sequences ``[B, n, dim]``, by the formula: a reference, without dropout.

        Every expert multiplies every token, gates of 0 included, and the scores are formed.
        """
        source = self._route(self.source_router, hidden_states)
        destination = self._route(self.destination_router, hidden_states)
        step = self._open_step(
            _split(self.q_proj(hidden_states), self.num_heads),
            _split(self.k_proj(hidden_states), self.num_heads),
            experts.dense_in(hidden_states, self.value_experts, source),
            context=None,
            attention_mask=None,
            position_ids=None,
            position_embeddings=None,
            position_bias=None,
            past_key_value=None,
            use_cache=False,
            causal=None,
        )
        heads = attend(*step[:3], mask=step.mask, scale=self.scale, implementation="eager").output
        output = experts.dense_out(heads, self.output_experts, destination)
        return output if self.output_bias is None else output + self.output_bias

    def effective_map(
        self, hidden_states: Tensor, *, head: int, batch: int = 0, **arguments: Any
    ) -> ExpertMap:
        """The map of one head with its gates, region by region, from one forward pass with these arguments.

        Raises:
            ValueError: the call has a bias or a cache, which these numbers cannot hold.
        """
        if arguments.get("past_key_value") is not None:
            raise ValueError(
                "effective_map needs the gates of every key; a cache keeps none of the past: pass all tokens"
            )
        calls: list[AttendCall] = []
        with torch.no_grad(), observing(calls.append):
            aux = self.forward(hidden_states, **arguments, return_dict=True).aux
        (call,) = calls
        if call.bias is not None:
            raise ValueError("effective_map cannot hold a bias: pass a Mask or a key mask, no position_bias")
        wide = torch.promote_types(call.q.dtype, torch.float32)
        query, key, lse, source, destination = (
            tensor.to(wide).cpu().numpy()
            for tensor in (
                call.q[batch, head],
                call.k[batch, head],
                call.lse[batch, head],
                aux["routing"]["source"].dense()[batch, :, head],
                aux["routing"]["destination"].dense()[batch, :, head],
            )
        )
        attention = SoftmaxMap(query, key, lse, scale=call.scale, mask=call.mask, batch=batch)
        return ExpertMap(attention, source, destination)

    def _route(self, linear: nn.Linear, tokens: Tensor) -> Routing:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        logits = nn.functional.linear(tokens.to(wide), linear.weight.to(wide))
        return experts.route(logits.unflatten(-1, (self.num_heads, -1)), self.top_k, self.router)

    def _aux_loss(self, source: Routing, destination: Routing) -> Tensor | None:
        if not self.training:
            return None
        if not self.aux_loss_coeff:
            return source.scores.new_zeros(())
        return self.aux_loss_coeff * (experts.balance(source) + experts.balance(destination)) / 2

    def _rotary(self) -> Rotary:
        if isinstance(self.use_rotary, Rotary):
            return self.use_rotary
        return Rotary(self.rope_base, fraction=self.rotary_fraction)


SwitchHead = SwitchHeadAttention


def _split(projected: Tensor, heads: int) -> Tensor:
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def _uniform(*shape: int, fan_in: int) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(*shape).uniform_(-bound, bound)


def _equal_row_norms(weight: Tensor) -> None:
    """No expert starts ahead of another: all selection rows keep their direction and get the mean length."""
    with torch.no_grad():
        norms = weight.norm(dim=1, keepdim=True)
        weight.mul_(norms.mean() / norms)
