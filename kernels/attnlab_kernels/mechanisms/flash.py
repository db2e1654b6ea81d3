"""FlashAttention. Dao et al., https://arxiv.org/abs/2205.14135; second version https://arxiv.org/abs/2307.08691."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.mechanisms.base import SoftmaxModule, read_width
from attnlab_kernels.operations.softmax.api import Unsupported, supports
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.positions import Rotary

UNFUSED = ("eager", "sdpa_math")
FUSED = ("banded", "sdpa_flash", "sdpa_cudnn", "triton", "sdpa_efficient")


class FlashAttention(SoftmaxModule):
    """Exact attention through a fused kernel; never through one that forms the n x n scores.

    Returns the output alone. ``implementation="auto"`` takes the first fused kernel that runs the call.

    Args:
        hidden_size: model width, a multiple of ``num_heads`` (also: dim, d_model, embed_dim, query_dim).
        block_size: the paper's block of keys. Kernels choose their own tile; it is kept for the record.
    """

    legacy_returns: ClassVar[int] = 1

    def __init__(
        self,
        hidden_size: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.0,
        bias: bool = True,
        block_size: int = 1024,
        causal: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 key; got {block_size}")
        super().__init__(
            dim=read_width("hidden_size", hidden_size, widths),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
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
        self.block_size = block_size

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, implementation: str
    ) -> AttentionOutput:
        if implementation in UNFUSED:
            raise Unsupported(f"FlashAttention is fused, and {implementation!r} forms the n x n scores")
        if self.dropout and self.training:
            raise Unsupported(
                f"no fused kernel here drops probabilities; got dropout {self.dropout} in training"
            )
        if implementation == "auto":
            implementation = _first_fused(q, k, v, mask=mask, bias=bias, need_grad=q.requires_grad)
        result = super()._attend(q, k, v, mask, bias, implementation)
        result.aux["block_size"] = self.block_size
        return result


def _first_fused(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> str:
    refused: list[str] = []
    for name in FUSED:
        support = supports(name, q, k, v, **call)
        if support:
            return name
        refused.append(f"{name}: {support.reason}")
    raise Unsupported(f"no fused implementation runs this call ({'; '.join(refused)})")
