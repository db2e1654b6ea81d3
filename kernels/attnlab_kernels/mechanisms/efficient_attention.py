"""Three mechanisms that share the name efficient attention.

memory_efficient: Rabe and Staats, https://arxiv.org/abs/2112.05682. linear: Shen et al.,
https://arxiv.org/abs/1812.01243. spatial_reduction: PVT, Wang et al., https://arxiv.org/abs/2102.12122, in the form of
SegFormer, Xie et al., https://arxiv.org/abs/2105.15203.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnlab_kernels.attention_call import AttentionCall, announce, composing, heard, softmax_call
from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.mechanisms import base
from attnlab_kernels.mechanisms.key_mask import hide, read_key_mask
from attnlab_kernels.operations.linear.separable import separable_attend, separate
from attnlab_kernels.operations.softmax import chunked
from attnlab_kernels.operations.softmax.api import AttendCall, Unsupported, tell
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.positions import Rotary

Variant = Literal["memory_efficient", "linear", "spatial_reduction"]
VARIANTS = ("memory_efficient", "linear", "spatial_reduction")


class EfficientAttention(base.SoftmaxModule):
    """Exact attention in chunks, or a softmax on each side, or fewer keys from a strided convolution.

    Returns the output alone. The map of "linear" is ``softmax_d(Q) softmax_n(K)^T``; that of "spatial_reduction" has
    a column for each cell of the reduced grid, row by row.

    Args:
        hidden_size: model width, a multiple of ``num_heads`` (also: dim, d_model, embed_dim, query_dim).
        dropout: share of the probabilities dropped in training; of the head outputs in "linear".
        chunk_size: queries and keys of a chunk ("memory_efficient").
        causal: for "memory_efficient" only.
        variant: one of "memory_efficient", "linear", "spatial_reduction".
        reduction: side of a cell of "spatial_reduction"; height and width must be multiples; 1 is multi-head attention.
    """

    legacy_returns: ClassVar[int] = 1
    variant: Variant

    def __init__(
        self,
        hidden_size: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.1,
        chunk_size: int = 128,
        causal: bool = False,
        bias: bool = True,
        *,
        variant: Variant = "memory_efficient",
        reduction: int = 2,
        head_dim: int | None = None,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
        for name, value in (("chunk_size", chunk_size), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        super().__init__(
            dim=base.read_width("hidden_size", hidden_size, widths),
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
        self.variant, self.chunk_size, self.reduction = variant, chunk_size, reduction
        self._refuse(causal=causal, rotary=bool(use_rotary))
        if variant == "spatial_reduction" and reduction > 1:
            self.sequence_reduction = nn.Conv2d(self.dim, self.dim, kernel_size=reduction, stride=reduction)
            self.layer_norm = nn.LayerNorm(self.dim, eps=1e-5)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        spatial_shape: tuple[int, int] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        past_key_value: Any = None,
        causal: bool | None = None,
        return_dict: bool = False,
        **call: Any,
    ) -> Any:
        """Attend from ``hidden_states`` ``[B, n, dim]``; arguments as in ``SoftmaxModule``.

        Args:
            hidden_states: for "spatial_reduction" also ``[B, height, width, dim]``, and the output has that shape.
            spatial_shape: (height, width) of ``[B, n, dim]``, for "spatial_reduction".
            output_attentions: with ``return_dict``, also the map.

        Raises:
            ValueError: an argument that the variant cannot honour; Unsupported for an implementation.
        """
        self._refuse(
            causal=bool(causal),
            rotary=call.get("position_embeddings") is not None,
            cache=use_cache or past_key_value is not None,
            grid=spatial_shape is not None,
            bias=call.get("position_bias") is not None,
        )
        if self.variant == "memory_efficient":
            if use_cache and not return_dict and not hasattr(past_key_value, "update"):
                raise ValueError(
                    "use_cache needs return_dict=True, or a cache object as past_key_value to write into"
                )
            call |= {"use_cache": use_cache, "past_key_value": past_key_value, "causal": causal}
            return super().forward(
                hidden_states, context, output_attentions=output_attentions, return_dict=return_dict, **call
            )
        for name in ("position_ids", "position_embeddings", "position_bias"):
            call.pop(name, None)
        mask = call.pop("attention_mask", None)
        context, implementation = base.read_aliases(context, call.pop("implementation", None), call)
        implementation = implementation or self.implementation
        if self.variant == "linear":
            if implementation not in ("auto", "eager"):
                raise Unsupported(f"variant 'linear' runs as 'eager'; got implementation {implementation!r}")
            result = self._separable(hidden_states, context, mask, output_attentions)
        else:
            if context is not None or mask is not None:
                name = "context" if context is not None else "attention_mask"
                raise ValueError(
                    f"{name} must be None in variant 'spatial_reduction': keys are cells of the grid"
                )
            result = self._reduced(hidden_states, spatial_shape, output_attentions, implementation)
        return result if return_dict else result.output

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, implementation: str
    ) -> AttentionOutput:
        if self.variant == "spatial_reduction":
            return super()._attend(q, k, v, mask, bias, implementation)
        if implementation not in ("auto", "chunked"):
            raise Unsupported(
                f"variant 'memory_efficient' runs as 'chunked'; got implementation {implementation!r}"
            )
        rules: dict[str, Any] = {"mask": mask, "scale": self.scale, "bias": bias, "chunk": self.chunk_size}
        dropout = self.dropout if self.training else 0.0
        output, lse = chunked.run(q, k, v, dropout=dropout, **rules)
        told = AttendCall(q, k, v, mask, self.scale, bias, output, lse, "chunked")
        with composing():
            tell(told)
        announce(softmax_call(told, lambda *operands: chunked.run(*operands, **rules)[0]))
        aux = {"implementation": "chunked", "reason": f"chunks of {self.chunk_size} queries and keys"}
        return AttentionOutput(output, lse=lse, aux=aux)

    def _separable(
        self, hidden_states: Tensor, context: Tensor | None, given: Mask | Tensor | None, wants_map: bool
    ) -> AttentionOutput:
        self._check_input(hidden_states, context)
        query, key, value = self._project(hidden_states, hidden_states if context is None else context)
        keep, causal = read_key_mask(
            given,
            batch=query.shape[0],
            num_queries=query.shape[2],
            num_keys=key.shape[2],
            past=0,
            device=query.device,
        )
        self._refuse(causal=causal)
        key, value = hide(key, keep), hide(value, keep)
        heads = separable_attend(query, key, value, keep)
        maps = self._separable_map(query, key, keep) if wants_map else None
        if heard():
            _announce_separable(query, key, value, heads, keep)
        merged = functional.dropout(heads.transpose(1, 2).flatten(2), self.dropout, self.training)
        aux = {"implementation": "eager", "reason": "a softmax on each side and two products"}
        return AttentionOutput(self.o_proj(merged), maps, aux=aux)

    def _separable_map(self, query: Tensor, key: Tensor, keep: Tensor | None) -> Tensor:
        size = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        if size > base.MAP_LIMIT_BYTES:
            raise ValueError(
                f"output_attentions would take {size:,} bytes, more than {base.MAP_LIMIT_BYTES:,}; "
                "look at fewer tokens"
            )
        with torch.no_grad():
            left, right = separate(query, key, keep)
            return left @ right.transpose(-1, -2)

    def _reduced(
        self, hidden_states: Tensor, grid: tuple[int, int] | None, wants_map: bool, implementation: str
    ) -> AttentionOutput:
        shape = hidden_states.shape
        if hidden_states.dim() == 4:
            if grid is not None and tuple(grid) != tuple(shape[1:3]):
                raise ValueError(
                    f"spatial_shape must be that of the input, {tuple(shape[1:3])}; got {tuple(grid)}"
                )
            grid = (shape[1], shape[2])
            hidden_states = hidden_states.flatten(1, 2)
        self._check_input(hidden_states, None)
        height, width = self._grid(grid, hidden_states.shape[1])
        source = hidden_states
        if self.reduction > 1:
            picture = hidden_states.transpose(1, 2).unflatten(2, (height, width))
            source = self.layer_norm(self.sequence_reduction(picture).flatten(2).transpose(1, 2))
        with composing() as parts:
            result = super().forward(
                hidden_states,
                source,
                output_attentions=wants_map,
                implementation=implementation,
                return_dict=True,
            )
        cells = (height // self.reduction, width // self.reduction)
        result.aux["reduced_shape"] = cells
        columns = f"{cells[0]} x {cells[1]} cells of {self.reduction} x {self.reduction} tokens, row by row"
        for part in parts:
            announce(part.retold("reduced", columns=columns, space=[height, width], cells=list(cells)))
        return AttentionOutput(
            result.output.reshape(shape), result.attentions, lse=result.lse, aux=result.aux
        )

    def _grid(self, grid: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
        if grid is None:
            raise ValueError("spatial_shape=(height, width) must come with [batch, tokens, dim]")
        height, width = grid
        if height * width != tokens:
            raise ValueError(f"spatial_shape must hold the {tokens} tokens; got {height} x {width}")
        if height % self.reduction or width % self.reduction:
            raise ValueError(
                f"height and width must be multiples of reduction = {self.reduction} (the convolution would drop "
                f"the rest); got {height} x {width}"
            )
        return height, width

    def _refuse(self, **asked: bool) -> None:
        if self.variant == "memory_efficient":
            if asked.get("grid"):
                raise ValueError(
                    "spatial_shape is for variant 'spatial_reduction'; this is 'memory_efficient'"
                )
            return
        reasons = {
            "causal": "its keys are summed or pooled over all tokens",
            "rotary": "it has no scores of single tokens to rotate",
            "cache": "a new token changes every key",
            "bias": "it has no scores of token pairs",
        }
        if self.variant == "linear":
            reasons["grid"] = "it has no grid"
        for name, reason in reasons.items():
            if asked.get(name):
                raise ValueError(f"{name} is not for variant {self.variant!r}: {reason}")


def _announce_separable(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, keep: Tensor | None
) -> None:
    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        left, right = separate(query, key, keep)
        return ((left @ right.transpose(-1, -2)) @ value.to(left.dtype)).to(value.dtype)

    left, right = separate(query, key, keep)
    announce(
        AttentionCall(
            "linear",
            left,
            right,
            value,
            heads,
            left.new_ones(left.shape[:3]),
            Full(),
            1.0,
            "eager",
            lambda query, key, value: separable_attend(query, key, value, keep),
            reference,
            (query, key, value),
            detail={"features": "softmax on each side", "eps": None},
        )
    )


MemoryEfficientAttention = EfficientAttention
