"""Linear attention. Katharopoulos et al., https://arxiv.org/abs/2006.16236; FAVOR+: Choromanski et al., 2009.14794."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from attnlab_kernels.attention_call import AttentionCall, announce, heard
from attnlab_kernels.linear_state import LinearState
from attnlab_kernels.masks import Causal, Full, Mask
from attnlab_kernels.mechanisms import base
from attnlab_kernels.mechanisms.key_mask import hide, read_key_mask
from attnlab_kernels.operations.linear import feature_maps
from attnlab_kernels.operations.linear.api import IMPLEMENTATIONS, LinearResult, linear_attend
from attnlab_kernels.operations.linear.reference import LinearSums
from attnlab_kernels.operations.linear.segments import FeatureMaps
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary


class LinearAttention(base.SoftmaxModule):
    """``O_i = phi(q_i) S_i / (phi(q_i) z_i + eps)``: the softmax becomes a product of feature maps.

    Returns ``(output, cache)``; the cache is a ``LinearState``, None without ``use_cache``. Causal unless told
    otherwise. ``feature_map="identity"`` is not normalised, its similarities may cancel to a denominator of zero.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        feature_map: "elu" (elu + 1), "relu", "softmax_kernel" (FAVOR+) or "identity".
        eps: added to the denominator.
        dropout: share of the head outputs dropped in training; there are no probabilities to drop.
        num_features: random features of "softmax_kernel", default ``floor(d ln d)``.
        ortho_features: orthogonal random rows.
        redraw_features: new random rows in every training pass.
        implementation: "auto", "parallel" (quadratic), "recurrent", "chunked", "triton" or "fla".
    """

    legacy_returns: ClassVar[int] = 2
    projection: Tensor

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        head_dim: int | None = None,
        feature_map: str = "elu",
        eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = False,
        *,
        num_features: int | None = None,
        ortho_features: bool = True,
        redraw_features: bool = False,
        causal: bool = True,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        _check_features(feature_map, num_features, redraw_features)
        _check_form(implementation)
        _refuse_rotary(bool(use_rotary))
        if not 0 <= eps <= 1:
            raise ValueError(f"eps must be between 0 and 1; got {eps}")
        super().__init__(
            dim=base.read_width("dim", dim, widths),
            num_heads=num_heads,
            head_dim=head_dim,
            dropout=dropout,
            bias=bias,
            causal=causal,
            rope_base=rope_base,
            layer_idx=layer_idx,
            implementation=implementation,
        )
        self.feature_map, self.eps = feature_map, eps
        self.ortho_features, self.redraw_features = ortho_features, redraw_features
        self.num_features = self.head_dim
        if feature_map == "softmax_kernel":
            self.num_features = num_features or feature_maps.default_features(self.head_dim)
            self.register_buffer("projection", self._draw())

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        *,
        attention_mask: Mask | Tensor | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_bias: PositionBias | None = None,
        past_key_value: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        causal: bool | None = None,
        return_dict: bool = False,
        implementation: str | None = None,
        **aliases: Any,
    ) -> Any:
        """Attend from ``hidden_states`` ``[B, n, dim]`` to itself, or to ``context`` ``[B, m, dim]``.

        Args:
            attention_mask: which keys exist, see ``read_key_mask``; pairs cannot be masked one by one.
            past_key_value: a ``LinearState``, updated in place, or a ``(state, normaliser)`` pair, left as it is.
            output_attentions: with ``return_dict``, also the implied map ``[B, H, n, m]`` (detached); without a past.
            causal: overrides the module's setting.

        Raises:
            ValueError: an argument that does not fit; Unsupported for an implementation of another operation.
        """
        context, implementation = base.read_aliases(context, implementation, aliases)
        form = _check_form(implementation or self.implementation)
        _refuse_rotary(position_embeddings is not None)
        if position_bias is not None:
            raise ValueError("position_bias is added to scores, and linear attention has none")
        self._check_input(hidden_states, context)
        query, key, value = self._project(hidden_states, hidden_states if context is None else context)
        cache = self._open_state(past_key_value, use_cache, context)
        past = cache.length(self.layer_idx) if cache is not None else 0
        keep, asks_causal = read_key_mask(
            attention_mask,
            batch=query.shape[0],
            num_queries=query.shape[2],
            num_keys=key.shape[2],
            past=past,
            device=query.device,
        )
        is_causal = self.causal and context is None if causal is None else causal
        is_causal = is_causal or asks_causal
        if is_causal and context is not None:
            raise ValueError("causal must be False with a context: it has no common order with the queries")
        sums = cache.sums(self.layer_idx) if cache is not None else None
        if output_attentions and sums is not None:
            raise ValueError("output_attentions needs all keys, and past_key_value keeps only their sums")
        whole = not is_causal and cache is None
        maps = self._maps(whole=whole, started=sums is not None)
        keeps_keys = cache is not None and cache.keep_keys
        if keep is not None or output_attentions or keeps_keys or heard():
            query, key, maps = maps[0](query), hide(maps[1](hide(key, keep)), keep), None
        value = hide(value, keep)
        result = linear_attend(
            query,
            key,
            value,
            causal=is_causal,
            eps=self.eps,
            normalize=self.feature_map != "identity",
            past=sums,
            form=form,
            maps=maps,
        )
        if cache is not None:
            cache.replace(self.layer_idx, result.sums, hidden_states.shape[1], seen=(key, value))
        if heard():
            seen = cache.seen(self.layer_idx) if cache is not None and sums is not None else (key, value)
            self._announce(query, *(seen or (key, value)), result, is_causal, sums, unmapped=seen is None)
        implied = self._implied_map(query, key, result.denominator, is_causal) if output_attentions else None
        heads = functional.dropout(result.output.transpose(1, 2).flatten(2), self.dropout, self.training)
        aux = {"implementation": result.form, "reason": result.reason, "denominator": result.denominator}
        output = AttentionOutput(
            self.o_proj(heads.to(hidden_states.dtype)), implied, cache if use_cache else None, None, aux
        )
        return output if return_dict else self._legacy(output)

    def _maps(self, *, whole: bool, started: bool) -> FeatureMaps:
        """What makes features of queries and of keys; ``whole``: all keys come at once."""
        if self.feature_map == "softmax_kernel":
            if self.redraw_features and self.training:
                if started:
                    raise ValueError(
                        "redraw_features in training cannot continue a past_key_value of other features"
                    )
                with torch.no_grad():
                    self.projection.copy_(self._draw())
            # a stabiliser over the keys is exact only where all of them are here
            return (
                partial(feature_maps.favor, projection=self.projection, stabilise="row"),
                partial(feature_maps.favor, projection=self.projection, stabilise="all" if whole else "none"),
            )
        phi = {
            "elu": feature_maps.elu_plus_one,
            "relu": feature_maps.relu,
            "identity": feature_maps.identity,
        }[self.feature_map]

        def widened(x: Tensor) -> Tensor:
            return phi(x.to(torch.promote_types(x.dtype, torch.float32)))

        return widened, widened

    def _announce(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: LinearResult,
        causal: bool,
        past: LinearSums | None,
        *,
        unmapped: bool,
    ) -> None:
        """``key`` and ``value`` of all tokens, the past included; without the past's where ``unmapped``."""
        count = query.shape[2]
        settings = {"causal": causal, "eps": self.eps, "normalize": self.feature_map != "identity"}

        # keys of the past are in the sums: only those of the new tokens can be given anew
        started = past is not None
        earlier = [tensor[:, :, :-count] if started else tensor[:, :, :0] for tensor in (key, value)]
        new = (query, *(tensor[:, :, -count:] if started else tensor for tensor in (key, value)))

        def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return linear_attend(query, key, value, past=past, form=result.form, **settings).output

        def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = (
                torch.cat([old.to(one.dtype), one], dim=2)
                for old, one in zip(earlier, (key, value), strict=True)
            )
            # queries of zeros stand for those of the past
            missing = key.shape[2] - count if causal else 0
            padded = functional.pad(query, (0, 0, missing, 0))
            sums = past if unmapped else None
            made = linear_attend(padded, key, value, past=sums, form="parallel", **settings).output
            return made[:, :, missing:]

        below = query.new_ones(query.shape[:3]) if result.denominator is None else result.denominator
        announce(
            AttentionCall(
                "linear",
                query,
                key,
                value,
                result.output,
                below,
                Causal() if causal else Full(),
                1.0,
                result.form,
                attended,
                reference,
                new,
                detail={
                    "features": self.feature_map,
                    "eps": self.eps if self.feature_map != "identity" else None,
                },
                unmapped="its cache is a sum over the keys, and no key of the past is kept"
                if unmapped
                else "",
            )
        )

    def _draw(self) -> Tensor:
        return feature_maps.draw_projection(self.num_features, self.head_dim, orthogonal=self.ortho_features)

    def _open_state(self, past: Any, use_cache: bool, context: Tensor | None) -> LinearState | None:
        if past is None and not use_cache:
            return None
        if context is not None:
            raise ValueError("use_cache with a context: a growing state is for self-attention")
        if past is None:
            return LinearState()
        if isinstance(past, tuple):
            return LinearState.from_tuple(past, self.layer_idx)
        if isinstance(past, LinearState):
            return past
        raise ValueError(
            f"past_key_value must be a LinearState or a (state, normaliser) pair; got {type(past).__name__}"
        )

    def _implied_map(self, query: Tensor, key: Tensor, denominator: Tensor | None, causal: bool) -> Tensor:
        batch, heads, rows, _ = query.shape
        size = 4 * batch * heads * rows * key.shape[2]
        if size > base.MAP_LIMIT_BYTES:
            raise ValueError(
                f"output_attentions would take {size:,} bytes, more than {base.MAP_LIMIT_BYTES:,}; "
                "look at fewer tokens"
            )
        with torch.no_grad():
            weights = query @ key.transpose(-1, -2)
            weights = weights.tril() if causal else weights
            if denominator is None:
                return weights
            return weights / denominator.masked_fill(denominator == 0, 1)[..., None]


CausalLinearAttention = LinearAttention


class FAVORPlusAttention(LinearAttention):
    """Performer's attention: ``LinearAttention`` with ``feature_map="softmax_kernel"``. Returns the output alone.

    Args:
        num_features: default ``floor(d ln d)``.
    """

    legacy_returns: ClassVar[int] = 1

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_features: int | None = None,
        ortho_features: bool = True,
        redraw_features: bool = False,
        bias: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            head_dim,
            "softmax_kernel",
            bias=bias,
            num_features=num_features,
            ortho_features=ortho_features,
            redraw_features=redraw_features,
            **others,
        )


def _check_features(feature_map: str, num_features: int | None, redraw: bool) -> None:
    if feature_map not in feature_maps.FEATURE_MAPS:
        raise ValueError(
            f"feature_map must be one of {', '.join(feature_maps.FEATURE_MAPS)}; got {feature_map!r}"
        )
    if num_features is not None and num_features < 1:
        raise ValueError(f"num_features must be at least 1; got {num_features}")
    if feature_map != "softmax_kernel" and (num_features is not None or redraw):
        raise ValueError(
            f"num_features and redraw_features are for feature_map 'softmax_kernel'; got {feature_map!r}"
        )


def _check_form(name: str) -> str:
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise Unsupported(
            f"implementation must be one of {', '.join(('auto', *IMPLEMENTATIONS))}; got {name!r}"
        )
    return name


def _refuse_rotary(wanted: bool) -> None:
    if wanted:
        raise ValueError(
            "rotary positions do not stay relative under a feature map; linear attention takes none"
        )
