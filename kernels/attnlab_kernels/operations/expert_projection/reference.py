"""Linear maps from a set of experts, chosen for each token and head by gates.

Csordás et al., "SwitchHead", https://arxiv.org/abs/2312.07987. Gates are sigmoids; the largest ``top_k``
are used as they are, not renormalised. ``dense_*`` multiply every token with every expert and read as the formula;
``grouped_*`` only with the chosen ones.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Router = Literal["sigmoid", "softmax"]


class Routing(NamedTuple):
    """Who was chosen: ``gates`` in float32 or wider and ``experts``, both ``[B, n, H, top_k]``, best first."""

    gates: Tensor
    experts: Tensor
    scores: Tensor
    """``[B, n, H, E]`` of all experts"""

    def dense(self) -> Tensor:
        """Gates ``[B, n, H, E]``, 0 where an expert was not chosen."""
        return torch.zeros_like(self.scores).scatter(-1, self.experts, self.gates)


def route(logits: Tensor, top_k: int, router: Router = "sigmoid") -> Routing:
    """Choose ``top_k`` experts a token and head from logits ``[B, n, H, E]``; of equal scores the first.

    "softmax" normalises over all experts before the choice, so a single chosen gate still has a gradient.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = torch.sigmoid(wide) if router == "sigmoid" else torch.softmax(wide, dim=-1)
    # topk leaves open which of two equal scores it takes
    experts = torch.sort(wide.detach(), dim=-1, descending=True, stable=True).indices[..., :top_k]
    return Routing(scores.gather(-1, experts), experts, scores)


def balance(routing: Routing) -> Tensor:
    """``E * sum_e share_e * mean_e`` averaged over heads: 1 where all experts are used alike, up to E where one is.

    ``share`` counts the choices of an expert, ``mean`` is its share of the scores. Fedus et al., "Switch Transformers",
    https://arxiv.org/abs/2101.03961.
    """
    scores = routing.scores.flatten(0, 1)
    mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
    chosen = torch.zeros_like(scores).scatter(-1, routing.experts.flatten(0, 1), 1)
    share = chosen.mean(0) / routing.experts.shape[-1]
    return (share * mean).sum(-1).mean() * scores.shape[-1]


def dense_in(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """From ``x`` ``[B, n, C]`` by ``weight`` ``[H, E, C, d]`` to heads ``[B, H, n, d]``."""
    mixed = torch.einsum("bnhe,bnc,hecd->bhnd", routing.dense(), x.to(routing.gates.dtype), _wide(weight))
    return mixed.to(x.dtype)


def dense_out(heads: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """From heads ``[B, H, n, d]`` by ``weight`` ``[H, E, d, C]`` to their sum ``[B, n, C]``."""
    mixed = torch.einsum("bnhe,bhnd,hedc->bnc", routing.dense(), heads.to(routing.gates.dtype), _wide(weight))
    return mixed.to(heads.dtype)


def grouped_in(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """As ``dense_in``; each expert multiplies the tokens that chose it."""
    batch, tokens, _ = x.shape
    flat = x.flatten(0, 1)
    heads = [
        _by_expert(flat, weight[head], routing.gates[:, :, head], routing.experts[:, :, head])
        for head in range(weight.shape[0])
    ]
    return torch.stack(heads).unflatten(1, (batch, tokens)).transpose(0, 1).to(x.dtype)


def grouped_out(heads: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """As ``dense_out``; each expert multiplies the tokens that chose it."""
    batch, count, tokens, _ = heads.shape
    total = heads.new_zeros(batch * tokens, weight.shape[-1], dtype=routing.gates.dtype)
    for head in range(count):
        source = heads[:, head].flatten(0, 1)
        total = total + _by_expert(
            source, weight[head], routing.gates[:, :, head], routing.experts[:, :, head]
        )
    return total.unflatten(0, (batch, tokens)).to(heads.dtype)


def _by_expert(x: Tensor, weight: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """``x [T, C]`` by ``weight [E, C, d]`` to ``[T, d]`` in the gates' dtype; gates and experts ``[B, n, k]``."""
    top_k = experts.shape[-1]
    order = torch.argsort(experts.flatten(), stable=True)
    sizes = torch.bincount(experts.flatten(), minlength=weight.shape[0]).tolist()
    rows = order // top_k
    groups = x[rows].split(sizes)
    products = torch.cat([group @ matrix for group, matrix in zip(groups, weight, strict=True)])
    total = gates.new_zeros(x.shape[0], weight.shape[-1])
    return total.index_add(0, rows, products * gates.flatten()[order, None])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
