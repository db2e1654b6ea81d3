"""Latent attention in its two equal forms, and its scores in their two parts.

DeepSeek-AI, "DeepSeek-V2", https://arxiv.org/abs/2405.04434. A token is a latent c of r numbers and one rotary key
for all heads. Head h has the key ``[W_UK,h c | k_rope]`` and the value ``W_UV,h c``. The naive form builds them; the
absorbed form moves W_UK to the query and W_UV to the output and attends to the latents as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.operations.latent import triton_absorbed
from attnlab_kernels.operations.softmax.api import Unsupported, attend, observed
from attnlab_kernels.operations.softmax.support import Support
from attnlab_kernels.output import AttentionOutput

Form = Literal["naive", "absorbed"]
FORMS = ("auto", "naive", "absorbed")
NAME = "latent_triton"


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
        implementation: one of softmax attention, or "latent_triton" (our kernel, absorbed form only); "auto" takes
            our kernel on a GPU where nobody observes the softmax calls.

    Raises:
        Unsupported: the implementation cannot run this call.
    """
    factor = inputs.scale if scale is None else scale
    if form == "naive":
        query = torch.cat((inputs.query_nope, inputs.query_rope), dim=-1)
        key, value = expand(inputs)
    elif form == "absorbed":
        fused = _fused(inputs, mask, factor, bias, dropout, implementation)
        if fused is not None:
            return fused
        query = torch.cat((absorb(inputs), inputs.query_rope), dim=-1)
        value = inputs.latent[:, None]
        key = torch.cat((value, inputs.key_rope[:, None]), dim=-1)
    else:
        raise ValueError(f"form must be naive or absorbed; got {form!r}")
    if implementation == NAME:
        raise Unsupported(f"implementation {NAME!r} cannot run this call: it has the absorbed form only")
    result = attend(
        query, key, value, mask=mask, scale=factor, bias=bias, dropout=dropout, implementation=implementation
    )
    output = raise_values(result.output, inputs) if form == "absorbed" else result.output
    return AttentionOutput(output, lse=result.lse, aux=result.aux | {"form": form})


def _fused(
    inputs: LatentInputs,
    mask: Mask | None,
    scale: float,
    bias: Tensor | None,
    dropout: float,
    implementation: str,
) -> AttentionOutput | None:
    """The absorbed form by our kernel, or None where another implementation is to run."""
    if implementation not in ("auto", NAME):
        return None
    nope = absorb(inputs)
    need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    support = triton_absorbed.supports(nope, inputs.latent, bias=bias, dropout=dropout, need_grad=need_grad)
    if inputs.key_rope.shape[-1] == 0:
        support = Support(False, "our kernel reads a rotary key, and these keys have none")
    packed = mask is not None and mask.form().documents is not None
    if implementation == "auto" and (nope.device.type != "cuda" or observed() or packed or not support):
        return None
    if not support:
        raise Unsupported(f"implementation {NAME!r} cannot run this call: {support.reason}")
    rest = (inputs.query_rope, inputs.latent, inputs.key_rope)
    output, lse = triton_absorbed.run(nope, *rest, mask=mask or Full(), scale=scale)
    reason = "auto: our kernel runs this call" if implementation == "auto" else f"asked for; {support.reason}"
    aux = {"implementation": NAME, "reason": reason, "form": "absorbed"}
    return AttentionOutput(raise_values(output, inputs), lse=lse, aux=aux)


def raise_values(output: Tensor, inputs: LatentInputs) -> Tensor:
    """``W_UV,h o`` ``[B, H, n, dv]`` from what was attended in latents ``[B, H, n, r]``."""
    return torch.einsum("bhnr,hvr->bhnv", output, inputs.up[:, inputs.nope_dim :])


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
