"""Multi-head latent attention. DeepSeek-AI, "DeepSeek-V2", https://arxiv.org/abs/2405.04434; V3: 2412.19437."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnlab_kernels.attention_call import announce, composing
from attnlab_kernels.caches import Cache
from attnlab_kernels.latent_cache import LatentKV
from attnlab_kernels.masks import Causal, Full, Mask
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask, read_position_bias
from attnlab_kernels.mechanisms.base import read_aliases, read_width
from attnlab_kernels.operations.latent.reference import (
    FORMS,
    Form,
    LatentInputs,
    ScoreParts,
    latent_attend,
    multiply_adds,
    score_parts,
)
from attnlab_kernels.operations.softmax.dense_map import check_map_size, dense_map
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary, rotate
from attnlab_kernels.rope_scaling import latent_scale_factor


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of all heads are rebuilt from one latent a token, and only that (and a rotary key) is cached.

    Returns ``(output, map or None, cache or None)``; the cache is a ``LatentKV``. Takes the weights of transformers'
    DeepseekV3Attention as they are. A prompt runs naive, a decoding step absorbed; ``aux["form"]`` says which ran.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        kv_lora_rank: r, width of the latent (also: d_latent).
        q_lora_rank: width of the query latent; None projects queries directly.
        qk_rope_head_dim: rotary part of a key, even, one for all heads; 0 gives keys no position.
        qk_nope_head_dim: part of a key without position.
        v_head_dim: width of a value.
        bias: of the projections down and of the last one, as in DeepseekV3Attention.
        rope_interleave: rotary weights pair 2i with 2i + 1, as DeepSeek's do; False: i with i + dr / 2.
        rope_scaling: see ``rope_frequencies``; with "mscale_all_dim" it also multiplies the scores, as in DeepSeek.
        attention_scale: default ``1 / sqrt(qk_nope_head_dim + qk_rope_head_dim)``.
        form: "auto", "naive" or "absorbed".
    """

    legacy_returns: ClassVar[int] = 3

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        kv_lora_rank: int = 512,
        q_lora_rank: int | None = None,
        qk_rope_head_dim: int = 64,
        qk_nope_head_dim: int = 128,
        v_head_dim: int = 128,
        dropout: float = 0.0,
        bias: bool = False,
        *,
        d_latent: int | None = None,
        causal: bool = True,
        rope_interleave: bool = True,
        rope_base: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-6,
        attention_scale: float | None = None,
        layer_idx: int = 0,
        form: str = "auto",
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = read_width("dim", dim, widths), num_heads
        self.kv_lora_rank = kv_lora_rank if d_latent is None else d_latent
        self.q_lora_rank = q_lora_rank
        self.qk_rope_head_dim, self.qk_nope_head_dim = qk_rope_head_dim, qk_nope_head_dim
        self.v_head_dim = v_head_dim
        self.dropout, self.causal, self.form = dropout, causal, form
        self.rope_interleave = rope_interleave
        self.rotary = Rotary(rope_base, scaling=rope_scaling)
        self.layer_idx, self.implementation = layer_idx, implementation
        self._check_arguments()
        head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.scale = head_dim**-0.5 if attention_scale is None else attention_scale
        self.scale *= latent_scale_factor(rope_scaling)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(self.dim, num_heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(self.dim, q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(self.dim, self.kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.kv_lora_rank, eps=norm_eps)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, self.dim, bias=bias)

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
        form: str | None = None,
        **aliases: Any,
    ) -> Any:
        """Attend from ``hidden_states`` ``[B, n, dim]`` to the cached tokens and itself.

        Args:
            attention_mask: a ``Mask`` or a tensor, see ``read_attention_mask``; joined to the causal mask.
            position_ids: ``[n]`` or ``[B, n]``; default: after the cached tokens.
            position_embeddings: ``(cos, sin)`` ``[.., n, dr]`` of the new tokens, half-split, instead.
            past_key_value: a ``LatentKV``, updated in place, or a ``(latent, rotary key)`` pair, left as it is.
            output_attentions: also return the map ``[B, H, n, m]`` (before dropout, detached).
            form: overrides the module's setting.
            implementation: a name of ``operations.softmax``, or "auto" (alias: backend).

        Returns:
            ``AttentionOutput`` with ``return_dict=True``, else ``(output, map, cache)``.

        Raises:
            ValueError: an argument that does not fit; Unsupported if the implementation cannot run it.
        """
        context, implementation = read_aliases(context, implementation, aliases)
        self._check_input(hidden_states, context)
        cache = self._open_cache(past_key_value, use_cache)
        past = cache.length(self.layer_idx) if cache is not None else 0
        tables = self._tables(position_embeddings, position_ids, past, hidden_states)
        inputs = self._inputs(hidden_states, tables, cache)
        num_queries, num_keys = hidden_states.shape[1], inputs.latent.shape[1]
        given, bias = read_attention_mask(
            attention_mask,
            batch=hidden_states.shape[0],
            heads=self.num_heads,
            num_queries=num_queries,
            num_keys=num_keys,
        )
        places = torch.arange(num_keys, device=hidden_states.device)
        bias = read_position_bias(position_bias, bias, queries=places[past:], keys=places)
        is_causal = self.causal if causal is None else causal
        mask = (Causal() if is_causal else Full()) & given
        if output_attentions:
            check_map_size(hidden_states.shape[0], self.num_heads, num_queries, num_keys)
        chosen = self._choose(form or self.form, num_queries, num_keys)
        with composing() as parts:
            result = latent_attend(
                inputs,
                form=chosen,
                mask=mask,
                scale=self.scale,
                bias=None if bias is None else bias.to(hidden_states.dtype),
                dropout=self.dropout if self.training else 0.0,
                implementation=implementation or self.implementation,
            )
        content = self.qk_nope_head_dim if chosen == "naive" else self.kv_lora_rank
        for part in parts:
            announce(part.retold("latent", form=chosen, content_dim=content))
        maps = self._map(inputs, mask, bias, result) if output_attentions else None
        heads = result.output.transpose(1, 2).flatten(2)
        output = AttentionOutput(
            self.o_proj(heads), maps, cache if use_cache else None, result.lse, result.aux
        )
        return output if return_dict else (output.output, output.attentions, output.cache)

    def score_parts(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_value: LatentKV | None = None,
    ) -> ScoreParts:
        """Scaled scores ``[B, H, n, m]`` without mask, split into the part of content and the part of position.

        The cache is left as it is.
        """
        self._check_input(hidden_states, None)
        cache = None if past_key_value is None else past_key_value.clone()
        past = cache.length(self.layer_idx) if cache is not None else 0
        tables = self._tables(position_embeddings, position_ids, past, hidden_states)
        return score_parts(self._inputs(hidden_states, tables, cache), scale=self.scale)

    def new_cache(self, batch: int = 1) -> LatentKV:
        """An empty cache of the right kind; it takes its batch from the first tokens."""
        return LatentKV()

    def compress_kv(self, hidden_states: Tensor) -> Tensor:
        """Latent ``[B, n, r]`` of ``[B, n, dim]``, after its norm, as it is cached; the rotary key is not in it."""
        self._check_input(hidden_states, None)
        down = self.kv_a_proj_with_mqa(hidden_states)
        return self.kv_a_layernorm(down[..., : self.kv_lora_rank])

    def decompress_kv(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """All heads' keys without position ``[B, H, m, dn]`` and values ``[B, H, m, dv]``, of latents ``[B, m, r]``."""
        heads = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = heads.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        return key, value

    def latent_inputs(self, hidden_states: Tensor, *, position_ids: Tensor | None = None) -> LatentInputs:
        """What ``latent_attend`` takes of ``[B, n, dim]`` alone, for callers that keep latents themselves."""
        self._check_input(hidden_states, None)
        return self._inputs(hidden_states, self._tables(None, position_ids, 0, hidden_states), None)

    def get_cache_size_ratio(self) -> float:
        """Numbers cached a token over those that the keys and values of all heads would take: below 1 saves memory."""
        key = self.qk_nope_head_dim + self.qk_rope_head_dim
        return (self.kv_lora_rank + self.qk_rope_head_dim) / (self.num_heads * (key + self.v_head_dim))

    def _inputs(
        self, hidden_states: Tensor, tables: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> LatentInputs:
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, rope = query.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        down = self.kv_a_proj_with_mqa(hidden_states)
        latent, key_rope = down.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        # the norm is of the latent alone, and before it is cached; the rotary key is one head
        latent, key_rope = self.kv_a_layernorm(latent)[:, None], self._rotate(key_rope[:, None], tables)
        if cache is not None:
            latent, key_rope, _ = cache.update(self.layer_idx, latent, key_rope)
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        return LatentInputs(nope, self._rotate(rope, tables), latent[:, 0], key_rope[:, 0], up)

    def _rotate(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        if tables is None:
            return x
        if self.rope_interleave:
            # pairs apart first; queries and keys alike, so no score changes
            x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        return rotate(x, *tables)

    def _tables(
        self,
        given: tuple[Tensor, Tensor] | None,
        position_ids: Tensor | None,
        past: int,
        hidden_states: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the new tokens; None where keys have no position."""
        if self.qk_rope_head_dim == 0:
            if given is not None:
                raise ValueError(
                    "position_embeddings must be None with qk_rope_head_dim = 0: no part of a key turns, and a "
                    "latent cannot"
                )
            return None
        if given is not None:
            return given
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device)
        return self.rotary.tables(position_ids, self.qk_rope_head_dim)

    def _choose(self, form: str, num_queries: int, num_keys: int) -> Form:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        if form != "auto":
            return "naive" if form == "naive" else "absorbed"
        if num_queries == num_keys > 1:
            return "naive"
        work = {
            name: multiply_adds(
                name,
                num_queries=num_queries,
                num_keys=num_keys,
                heads=self.num_heads,
                nope=self.qk_nope_head_dim,
                rope=self.qk_rope_head_dim,
                value=self.v_head_dim,
                rank=self.kv_lora_rank,
            )
            for name in ("naive", "absorbed")
        }
        return "absorbed" if work["absorbed"] <= work["naive"] else "naive"

    def _map(self, inputs: LatentInputs, mask: Mask, bias: Tensor | None, result: AttentionOutput) -> Tensor:
        assert result.lse is not None
        with torch.no_grad():
            wide = LatentInputs(*(tensor.to(result.lse.dtype) for tensor in inputs))
            parts = score_parts(wide, scale=self.scale)
            return dense_map(parts.nope + parts.rope, result.lse, mask, bias).to(inputs.query_nope.dtype)

    def _open_cache(self, past: Cache | tuple[Tensor, Tensor] | None, use_cache: bool) -> Cache | None:
        if past is None:
            return LatentKV() if use_cache else None
        if isinstance(past, tuple):
            return LatentKV.from_tuple(past, self.layer_idx)
        if not isinstance(past, LatentKV):
            raise ValueError(
                f"past_key_value must be a LatentKV or a (latent, rotary key) pair; got {type(past).__name__}"
            )
        return past

    def _check_input(self, hidden_states: Tensor, context: Tensor | None) -> None:
        if context is not None:
            raise ValueError("context must be None: latent attention here is self-attention")
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.dim:
            raise ValueError(
                f"hidden_states must be [batch, tokens, {self.dim}]; got {list(hidden_states.shape)}"
            )

    def _check_arguments(self) -> None:
        for name in ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "q_lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.qk_rope_head_dim < 0 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even and at least 0; got {self.qk_rope_head_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {self.dropout}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {self.form!r}")


MLA = MultiHeadLatentAttention
