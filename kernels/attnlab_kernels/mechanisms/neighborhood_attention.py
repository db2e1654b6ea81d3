"""Neighborhood attention. Hassani et al., https://arxiv.org/abs/2204.07143; dilated 2209.15001, strided 2504.16922."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnlab_kernels.attention_call import AttentionCall, announce, heard
from attnlab_kernels.masks import Full, Mask
from attnlab_kernels.mechanisms.base import read_aliases, read_width
from attnlab_kernels.neighborhood import Neighborhood, NeighborhoodError, NeighborhoodMap, per_axis
from attnlab_kernels.operations.neighborhood.api import check_implementation, neighborhood_attend
from attnlab_kernels.operations.neighborhood.dense import dense
from attnlab_kernels.operations.neighborhood.reference import Result
from attnlab_kernels.output import AttentionOutput

REFUSED = {
    "past_key_value": "an image does not grow",
    "use_cache": "an image does not grow",
    "position_ids": "pixels have their place in the image",
    "position_embeddings": "pixels have their place in the image",
    "position_bias": "ask for relative_position_bias",
}


class NeighborhoodAttention(nn.Module):
    """Each pixel attends to ``kernel_size`` keys on every axis; at a border the window shifts and keeps its size.

    Takes ``[B, N, C]``, ``[B, H, W, C]`` or ``[B, T, H, W, C]``, or ``[B, N, C]`` with ``spatial_shape``. Returns
    ``(output, windows or None)``; windows are ``[B, heads, N, k1 * k2 * ..]``, pixels and slots row by row. No cache.

    Args:
        d_model: channels (also: hidden_size, dim, embed_dim, query_dim).
        kernel_size: keys of the window on each axis; one number or one an axis. An even one has its extra key before.
        dilation: distance between them, likewise.
        stride: neighbouring queries that share the window of their leader, likewise; at most ``kernel_size``.
        causal: no keys after the query on this axis; one bool or one an axis.
        relative_position_bias: learn a table ``[heads, 2 k1 - 1, ..]`` added to the scores; needs ``dims``.
        dims: axes; default: those of ``kernel_size`` if it is a tuple, else of each input.
    """

    legacy_returns: ClassVar[int] = 2
    axes: ClassVar[int | None] = None
    """set where the class is for one number of axes only"""

    def __init__(
        self,
        d_model: int | None = None,
        num_heads: int = 8,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        dropout: float = 0.0,
        bias: bool = True,
        head_dim: int | None = None,
        *,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        relative_position_bias: bool = False,
        attention_scale: float | None = None,
        dims: int | None = None,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        super().__init__()
        self.dim = read_width("d_model", d_model, widths)
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}")
        if head_dim is None and self.dim % num_heads:
            raise ValueError(
                f"the width must be a multiple of num_heads, or head_dim given; got {self.dim} and {num_heads} heads"
            )
        self.num_heads = num_heads
        self.head_dim = self.dim // num_heads if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1; got {head_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
        self.dropout, self.implementation = dropout, implementation
        check_implementation(implementation)
        self.dims = self._read_dims(dims, kernel_size)
        self.kernel_size, self.dilation, self.stride, self.causal = kernel_size, dilation, stride, causal
        self.scale = self.head_dim**-0.5 if attention_scale is None else attention_scale
        known = self.dims or 1
        kernels, dilations, strides, _ = self._per_axis(known, causal)
        # all but the size of the image can be judged now
        Neighborhood(
            tuple(k * d for k, d in zip(kernels, dilations, strict=True)),
            kernels,
            dilations,
            strides,
            (False,) * known,
        )
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(self.dim, inner, bias=bias)
        self.k_proj = nn.Linear(self.dim, inner, bias=bias)
        self.v_proj = nn.Linear(self.dim, inner, bias=bias)
        self.o_proj = nn.Linear(inner, self.dim, bias=bias)
        self.position_table: nn.Parameter | None = None
        if relative_position_bias:
            if self.dims is None:
                raise ValueError(
                    "relative_position_bias needs the number of axes: give dims=1, 2 or 3; got None"
                )
            table = torch.empty(num_heads, *(2 * kernel - 1 for kernel in kernels))
            self.position_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        attention_mask: Mask | Tensor | None = None,
        output_attentions: bool = False,
        spatial_shape: Sequence[int] | None = None,
        causal: bool | Sequence[bool] | None = None,
        return_dict: bool = False,
        implementation: str | None = None,
        **others: Any,
    ) -> Any:
        """Attend within the image ``hidden_states``.

        The other arguments of the common ``forward`` may be given as None or False; this mechanism has no cache, no
        context and no positions but those in the image.

        Args:
            attention_mask: bool or 0/1 ``[B, N]`` or ``[B, *space]``, True or 1 = may be attended to.
            output_attentions: also return the weights of the windows, before dropout, detached.
            spatial_shape: the axes of a flat ``[B, N, C]``.
            causal: overrides the module's setting.
            implementation: "tiled", "fused" (a CPU, every pixel visible), "triton", "natten" or "auto".

        Raises:
            ValueError: an input or a mask that does not fit, or an axis shorter than its window.
        """
        context, implementation = _refuse_others(context, implementation, others)
        space = self._space(hidden_states, spatial_shape)
        neighborhood = self.neighborhood(space, causal)
        batch = hidden_states.shape[0]
        query, key, value = self._project(hidden_states, space)
        result, ran, reason = neighborhood_attend(
            query,
            key,
            value,
            neighborhood,
            scale=self.scale,
            bias=self.position_table,
            visible=_visible(attention_mask, batch, space),
            dropout=self.dropout if self.training else 0.0,
            need_windows=output_attentions,
            implementation=implementation or self.implementation,
        )
        if heard():
            visible = _visible(attention_mask, batch, space)
            self._announce((query, key, value), result, neighborhood, visible, ran)
        heads = result.output.movedim(1, -2).flatten(-2)
        windows = None if result.windows is None else result.windows.detach().flatten(2, -2).to(query.dtype)
        output = AttentionOutput(
            self.o_proj(heads).view(*hidden_states.shape[:-1], self.dim),
            windows,
            None,
            result.lse.flatten(2),
            {
                "implementation": ran,
                "reason": reason,
                "heads": result.output.flatten(2, -2),
            },
        )
        return output if return_dict else (output.output, output.attentions)

    def neighborhood(self, space: Sequence[int], causal: bool | Sequence[bool] | None = None) -> Neighborhood:
        """Who attends to whom in an image of this size."""
        kernels, dilations, strides, causals = self._per_axis(
            len(space), self.causal if causal is None else causal
        )
        return Neighborhood(tuple(space), kernels, dilations, strides, tuple(bool(flag) for flag in causals))

    def effective_map(
        self,
        hidden_states: Tensor,
        *,
        head: int,
        batch: int = 0,
        attention_mask: Mask | Tensor | None = None,
        spatial_shape: Sequence[int] | None = None,
        causal: bool | Sequence[bool] | None = None,
    ) -> NeighborhoodMap:
        """The map of one head: any tile, or the window of any pixel at its true place in the image."""
        space = self._space(hidden_states, spatial_shape)
        neighborhood = self.neighborhood(space, causal)
        visible = _visible(attention_mask, hidden_states.shape[0], space)
        with torch.no_grad():
            query, key, value = self._project(hidden_states, space)
            lse = neighborhood_attend(
                query, key, value, neighborhood, scale=self.scale, bias=self.position_table, visible=visible
            ).result.lse
        wide = torch.promote_types(query.dtype, torch.float32)
        return NeighborhoodMap(
            *(part[batch, head].flatten(0, -2).to(wide).cpu().numpy() for part in (query, key)),
            lse=lse[batch, head].flatten().cpu().numpy(),
            scale=self.scale,
            neighborhood=neighborhood,
            bias=None
            if self.position_table is None
            else self.position_table[head].detach().to(wide).cpu().numpy(),
            visible=None if visible is None else visible[batch].flatten().cpu().numpy(),
        )

    def _announce(
        self,
        operands: tuple[Tensor, ...],
        result: Result,
        neighborhood: Neighborhood,
        visible: Tensor | None,
        ran: str,
    ) -> None:
        rules: dict[str, Any] = {"scale": self.scale, "bias": self.position_table, "visible": visible}
        space = neighborhood.space

        def again(*flat: Tensor) -> Tensor:
            images = [part.unflatten(2, space) for part in flat]
            query, key, value = images[0], images[1], images[2]
            made = neighborhood_attend(query, key, value, neighborhood, implementation=ran, **rules)
            return made.result.output.flatten(2, -2)

        query, key, value = (part.flatten(2, -2) for part in operands)
        table = (
            {} if self.position_table is None else {"position_table": self.position_table.flatten(1)[None]}
        )
        announce(
            AttentionCall(
                "neighborhood",
                query,
                key,
                value,
                result.output.flatten(2, -2),
                result.lse.flatten(2),
                Full(),
                self.scale,
                ran,
                again,
                lambda query, key, value: dense(query, key, value, neighborhood, **rules),
                (query, key, value),
                extra=table,
                detail=asdict(neighborhood),
                unmapped=""
                if visible is None
                else "pixels are hidden from everyone, which no mask here holds",
            )
        )

    def _project(self, hidden_states: Tensor, space: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[B, H, *space, D]``."""
        return tuple(
            projection(hidden_states)
            .view(hidden_states.shape[0], *space, self.num_heads, self.head_dim)
            .movedim(-2, 1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )

    def _space(self, hidden_states: Tensor, spatial_shape: Sequence[int] | None) -> tuple[int, ...]:
        shape = tuple(hidden_states.shape)
        if not 3 <= len(shape) <= 5 or shape[-1] != self.dim:
            raise ValueError(
                f"hidden_states must be [B, N, C], [B, H, W, C] or [B, T, H, W, C], C = {self.dim}; got {list(shape)}"
            )
        space = shape[1:-1]
        if spatial_shape is not None:
            if len(shape) != 3 or math.prod(spatial_shape) != shape[1]:
                raise ValueError(
                    f"spatial_shape must multiply to the N of [B, N, C]; got {tuple(spatial_shape)} for {list(shape)}"
                )
            space = tuple(spatial_shape)
        if self.dims is not None and len(space) != self.dims:
            raise ValueError(
                f"hidden_states must have {self.dims} axes between batch and channels, or come with spatial_shape; "
                f"got {list(shape)}"
            )
        return space

    def _per_axis(
        self, axes: int, causal: bool | Sequence[bool]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (
            per_axis("kernel_size", self.kernel_size, axes),
            per_axis("dilation", self.dilation, axes),
            per_axis("stride", self.stride, axes),
            per_axis("causal", causal, axes),
        )

    def _read_dims(self, dims: int | None, kernel_size: int | Sequence[int]) -> int | None:
        known = {
            name: value
            for name, value in (
                ("the class", self.axes),
                ("dims", dims),
                ("kernel_size", None if isinstance(kernel_size, int) else len(kernel_size)),
            )
            if value is not None
        }
        if len(set(known.values())) > 1 or not set(known.values()) <= {1, 2, 3}:
            said = ", ".join(f"{name}: {value}" for name, value in known.items())
            raise NeighborhoodError(f"the number of axes must be 1, 2 or 3 and agree; got {said}")
        return next(iter(known.values()), None)


class NeighborhoodAttention1D(NeighborhoodAttention):
    """Over ``[B, N, C]``."""

    axes = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """Over ``[B, H, W, C]``, or ``[B, N, C]`` with ``spatial_shape``."""

    axes = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """Over ``[B, T, H, W, C]``, or ``[B, N, C]`` with ``spatial_shape``."""

    axes = 3


def _refuse_others(
    context: Tensor | None, implementation: str | None, others: dict[str, Any]
) -> tuple[Tensor | None, str | None]:
    for name, reason in REFUSED.items():
        given = others.pop(name, None)
        if given is not None and given is not False:
            raise ValueError(f"{name} is not for neighborhood attention: {reason}")
    context, implementation = read_aliases(context, implementation, others)
    if context is not None:
        raise ValueError(
            "context is not for neighborhood attention: a window is around the query's own pixel"
        )
    return context, implementation


def _visible(mask: Mask | Tensor | None, batch: int, space: tuple[int, ...]) -> Tensor | None:
    if mask is None or isinstance(mask, Full):
        return None
    if isinstance(mask, Mask):
        raise ValueError(
            "attention_mask must say which pixels exist, bool or 0/1 [B, *space]: a Mask orders tokens on one axis; "
            f"got {mask.describe()} (causal= orders each axis of the image)"
        )
    if tuple(mask.shape) not in ((batch, *space), (batch, math.prod(space))) or mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be bool or 0/1 integers {[batch, *space]} or {[batch, math.prod(space)]}; got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    return mask.reshape(batch, *space) != 0
