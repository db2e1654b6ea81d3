"""Latent attention in its two equal forms, and its scores in their two parts.

DeepSeek-AI, "DeepSeek-V2", https://arxiv.org/abs/2405.04434. A token is a latent c of r numbers and one rotary key
for all heads. Head h has the key ``[W_UK,h c | k_rope]`` and the value ``W_UV,h c``. The naive form builds them; the
absorbed form moves W_UK to the query and W_UV to the output and attends to the latents as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax.api import attend
from attnlab_kernels.output import AttentionOutput

Form = Literal["naive", "absorbed"]
FORMS = ("auto", "naive", "absorbed")


class LatentInputs(NamedTuple):
    """What both forms take."""

    query_nope: Tensor
    """``[B, H, n, dn]``"""
    query_rope: Tensor
    """``[B, H, n, dr]``, rotated"""
    latent: Tensor
    """``[B, m, r]``, after its norm"""
    key_rope: Tensor
    """``[B, m, dr]``, rotated, shared by all heads"""
    up: Tensor
    """``[H, dn + dv, r]``: the rows of W_UK,h, then those of W_UV,h"""

    @property
    def nope_dim(self) -> int:
        return self.query_nope.shape[-1]

    @property
    def scale(self) -> float:
        """``1 / sqrt(dn + dr)``: the width of a head's own key, in both forms."""
        return (self.nope_dim + self.query_rope.shape[-1]) ** -0.5


class ScoreParts(NamedTuple):
    """Scaled scores ``[B, H, n, m]`` before mask and softmax; their sum is the score."""

    nope: Tensor
    rope: Tensor


def latent_attend(
    inputs: LatentInputs,
    *,
    form: Form,
    mask: Mask | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> AttentionOutput:
    """Attend in one of the two forms: output ``[B, H, n, dv]`` and log-sum-exp as from ``attend``.

    Args:
        form: "naive" builds each head's keys and values (prefill); "absorbed" never does (decoding).
        scale: default ``1 / sqrt(dn + dr)``, also for the absorbed form, whose keys are r + dr wide.
    """
    factor = inputs.scale if scale is None else scale
    if form == "naive":
        query = torch.cat((inputs.query_nope, inputs.query_rope), dim=-1)
        key, value = expand(inputs)
    elif form == "absorbed":
        query = torch.cat((absorb(inputs), inputs.query_rope), dim=-1)
        value = inputs.latent[:, None]
        key = torch.cat((value, inputs.key_rope[:, None]), dim=-1)
    else:
        raise ValueError(f"form must be naive or absorbed; got {form!r}")
    result = attend(
        query, key, value, mask=mask, scale=factor, bias=bias, dropout=dropout, implementation=implementation
    )
    output = result.output
    if form == "absorbed":
        output = torch.einsum("bhnr,hvr->bhnv", output, inputs.up[:, inputs.nope_dim :])
    return AttentionOutput(output, lse=result.lse, aux=result.aux | {"form": form})


def expand(inputs: LatentInputs) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, m, dn + dr]`` and values ``[B, H, m, dv]`` of every head."""
    both = torch.einsum("bmr,hdr->bhmd", inputs.latent, inputs.up)
    rope = inputs.key_rope[:, None].expand(-1, both.shape[1], -1, -1)
    return torch.cat((both[..., : inputs.nope_dim], rope), dim=-1), both[..., inputs.nope_dim :]


def absorb(inputs: LatentInputs) -> Tensor:
    """``W_UK,h^T q_nope`` ``[B, H, n, r]``: the query that meets the latent itself."""
    return torch.einsum("bhnd,hdr->bhnr", inputs.query_nope, inputs.up[:, : inputs.nope_dim])


def score_parts(inputs: LatentInputs, *, scale: float | None = None) -> ScoreParts:
    """The score of every pair, split into what content says and what position says."""
    factor = inputs.scale if scale is None else scale
    nope = absorb(inputs) @ inputs.latent[:, None].transpose(-1, -2)
    rope = inputs.query_rope @ inputs.key_rope[:, None].transpose(-1, -2)
    return ScoreParts(nope * factor, rope * factor)


def multiply_adds(
    form: Form, *, num_queries: int, num_keys: int, heads: int, nope: int, rope: int, value: int, rank: int
) -> int:
    """Multiply-adds of one sequence, without what the two forms share and without a mask."""
    pairs = num_queries * num_keys
    if form == "naive":
        return heads * (num_keys * rank * (nope + value) + pairs * (nope + rope + value))
    return heads * (num_queries * rank * (nope + value) + pairs * (2 * rank + rope))
