"""Causal linear attention by flash-linear-attention's chunked Triton kernels (package fla). Not run on a GPU here.

Yang and Zhang, https://github.com/fla-org/flash-linear-attention. It takes ``[B, tokens, heads, dim]``, contiguous, and
computes the numerators and the state; the denominators are sums of ours, in float32.
"""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.operations.linear.reference import LinearSums, Raw
from attnlab_kernels.operations.softmax import external
from attnlab_kernels.operations.softmax.support import Support

MODULE, SYMBOL = "fla.ops.linear_attn", "chunk_linear_attn"
REQUIRES = "flash-linear-attention, an NVIDIA GPU from Ampere (sm80), float16 or bfloat16"
CHUNK = 64
MAX_FEATURES = 256
"""a limit of ours: nobody has seen wider ones run"""


def arrange(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous ``[B, tokens, H, D]`` of ``[B, H, tokens, D]``: what its kernels read."""
    return tuple(tensor.transpose(1, 2).contiguous() for tensor in tensors)


def run(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, past: LinearSums, chunk: int) -> Raw:
    """As ``reference.parallel``, for causal calls."""
    assert causal
    numerator, state = external.found(MODULE, SYMBOL)(
        *arrange(query, key, value),
        scale=1.0,
        initial_state=past.state.float(),
        output_final_state=True,
        normalize=False,
    )
    seen = key.float().cumsum(2) + past.normaliser.float()[:, :, None]
    denominator = (query.float() * seen).sum(-1)
    return Raw(numerator.transpose(1, 2).float(), denominator, LinearSums(state, seen[:, :, -1]))


def supports(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, chunk: int) -> Support:
    """Ampere or newer, half types, causal calls, chunks of 64 tokens, features to 256; with gradients."""
    capability = external.card(query)
    if capability is None or capability < (8, 0):
        return Support(False, f"fla needs an NVIDIA GPU from sm80; the tensors are on {query.device.type}")
    if any(part.dtype not in external.HALF or part.dtype != query.dtype for part in (query, key, value)):
        kinds = ", ".join(str(part.dtype).removeprefix("torch.") for part in (query, key, value))
        return Support(False, f"fla takes float16 or bfloat16, one of them; got {kinds}")
    if not causal:
        return Support(False, "fla has no form without a causal order: use chunked")
    if chunk != CHUNK:
        return Support(False, f"fla takes chunks of {CHUNK} tokens; got {chunk}")
    if query.shape[3] > MAX_FEATURES:
        return Support(False, f"fla is given at most {MAX_FEATURES} features here; got {query.shape[3]}")
    _, missing = external.find(MODULE, SYMBOL)
    return Support(not missing, missing or external.version("flash-linear-attention"))
