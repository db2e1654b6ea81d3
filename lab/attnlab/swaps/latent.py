"""A low-rank latent in the place of a model's keys and values.

DeepSeek-AI, "DeepSeek-V2", https://arxiv.org/abs/2405.04434, caches one latent a token. Trained weights have none, so
one is fitted: the keys (after position encoding) and values of all heads of a layer, side by side, are projected onto
their leading right singular vectors, taken from the tokens of the first forward. No other basis of that rank is nearer
to them in the Frobenius norm (Eckart and Young 1936), so the loss is the least that any latent of this kind has on
this input. The basis is fitted to all of these tokens: a later token can change it, and so an earlier output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnlab_kernels.operations.latent.reference import Form, LatentInputs, latent_attend, multiply_adds
from attnlab_kernels.output import AttentionOutput

from .softmax import Attended, Kind, ModelCall, Shape, Swap, softmax_attended


@dataclass(eq=False)
class LatentSwap(Swap):
    """Latents of ``rank`` numbers a token stand for the keys and values of all heads of a layer.

    A prompt builds each head's keys and values from the latents (naive); decoding attends to the latents (absorbed)
    where that is less work. The rank cannot be more than the numbers it stands for: there the swap is exact.
    """

    rank: int = 512
    form: str = "auto"
    _bases: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def attend(self, call: ModelCall) -> Attended:
        if call.extras.keys() - {"bias"}:
            call.plain("multi_head_latent")
        basis = self.basis(call)
        latent = side_by_side(call) @ basis
        heads, size = call.key.shape[1], call.key.shape[3]
        rebuilt = (latent @ basis.T).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = rebuilt[..., :size], rebuilt[..., size:]
        made = self._run(call, latent, basis)
        return softmax_attended(
            call, key, value, call.mask, made, again=lambda: self._run(call, latent, basis)
        )

    def kind(self, shape: Shape) -> Kind:
        return "exact" if self.rank >= 2 * shape.kv_heads * shape.head_dim else "approximate"

    def basis(self, call: ModelCall) -> Tensor:
        """Orthonormal columns ``[Hkv (D + Dv), r]``, in the dtype of the keys."""
        if call.name not in self._bases:
            tokens = side_by_side(call).flatten(0, 1).double()
            rank = min(self.rank, tokens.shape[1])
            # eigenvectors of the Gram matrix are the right singular vectors, whatever the number of tokens
            vectors = torch.linalg.eigh(tokens.T @ tokens).eigenvectors
            self._bases[call.name] = vectors[:, -rank:].to(call.key.dtype)
        return self._bases[call.name]

    def _run(self, call: ModelCall, latent: Tensor, basis: Tensor) -> AttentionOutput:
        heads, kv_heads, size = call.query.shape[1], call.key.shape[1], call.key.shape[3]
        up = basis.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=0)
        inputs = LatentInputs(
            query_nope=call.query,
            query_rope=call.query[..., :0],
            latent=latent,
            key_rope=latent[..., :0],
            up=up,
        )
        form = self._form(call, basis.shape[1], size)
        made = latent_attend(
            inputs,
            form=form,
            mask=call.mask,
            scale=call.scale,
            implementation=self.implementation,
            **call.extras,
        )
        reason = f"latents of {basis.shape[1]} numbers, {form}; {made.aux['reason']}"
        return AttentionOutput(made.output, lse=made.lse, aux=made.aux | {"reason": reason})

    def _form(self, call: ModelCall, rank: int, size: int) -> Form:
        if self.form != "auto":
            return "naive" if self.form == "naive" else "absorbed"
        queries, keys = call.query.shape[2], call.key.shape[2]
        if queries == keys > 1:
            return "naive"
        sizes = {"heads": call.query.shape[1], "nope": size, "rope": 0, "value": call.value.shape[3]}
        work = {
            form: multiply_adds(form, num_queries=queries, num_keys=keys, rank=rank, **sizes)
            for form in ("naive", "absorbed")
        }
        return "absorbed" if work["absorbed"] <= work["naive"] else "naive"


def side_by_side(call: ModelCall) -> Tensor:
    """``[B, Sk, Hkv (D + Dv)]``: key and value of a head, then of the next."""
    return torch.cat((call.key, call.value), dim=-1).transpose(1, 2).flatten(2)
