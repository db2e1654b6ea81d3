"""Ring attention. Liu et al., https://arxiv.org/abs/2310.01889; striped layout 2311.09431."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnlab_kernels.attention_call import announce, composing, softmax_call
from attnlab_kernels.caches import Cache, ContiguousKV
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Mask
from attnlab_kernels.mechanisms.attention_mask import read_attention_mask
from attnlab_kernels.mechanisms.base import open_cache, read_aliases, read_width
from attnlab_kernels.mechanisms.key_mask import read_key_mask
from attnlab_kernels.operations.ring.attention import RingResult, ring_attend
from attnlab_kernels.operations.ring.layout import RingError, checked_layout, owners, shard_positions
from attnlab_kernels.operations.ring.link import Ring
from attnlab_kernels.operations.ring.shards import join, split
from attnlab_kernels.operations.softmax.api import AttendCall, Unsupported, tell
from attnlab_kernels.operations.softmax.dense_map import check_map_size, dense_map
from attnlab_kernels.operations.softmax.lower import hide_padding
from attnlab_kernels.output import AttentionOutput
from attnlab_kernels.paged_sequences import PagedSequences
from attnlab_kernels.position_bias import PositionBias
from attnlab_kernels.positions import Rotary, rotate
from attnlab_kernels.ring_map import RingMap


class RingAttention(nn.Module):
    """Exact attention spread over a ring: each rank keeps its queries, keys and values travel. Returns the output.

    Without ``ring_group`` the input is the whole sequence and ``ring_size`` ranks are simulated in this process, by
    the same code. With one, the input is this rank's shard (``operations.ring.shards.shard``), the call is
    collective, and its output is the shard's; weights must be equal on all ranks, and gradients of weights are this
    rank's part of the sum. Scores exist for one block of keys at a time.

    Args:
        dim: model width (also: hidden_size, d_model, embed_dim, query_dim).
        ring_size: ranks; default the size of the group, or 1.
        overlap_comm_compute: send keys on while computing with them.
        dropout: of probabilities. There is none here: training with it is refused.
        layout: who owns which token: "contiguous", "striped" or "zigzag". Causal work is even in the last two.
        num_kv_heads: key heads, fewer to send.
        block_size: keys of a rank that meet its guests at a time; default all.
    """

    legacy_returns: ClassVar[int] = 1

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int = 8,
        head_dim: int | None = None,
        ring_size: int | None = None,
        overlap_comm_compute: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        causal: bool = True,
        layout: str = "contiguous",
        *,
        num_kv_heads: int | None = None,
        attention_scale: float | None = None,
        use_rotary: bool | Rotary = False,
        rope_base: float = 10000.0,
        layer_idx: int = 0,
        block_size: int | None = None,
        implementation: str = "auto",
        **widths: int,
    ) -> None:
        super().__init__()
        self.dim = read_width("dim", dim, widths)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        given = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, value in (given | {"ring_size": ring_size, "block_size": block_size}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}; got {num_kv_heads}")
        if head_dim is None and self.dim % num_heads:
            raise ValueError(
                f"the width must be a multiple of num_heads, or head_dim given; got {self.dim} and {num_heads} heads"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
        if implementation not in ("auto", "ring"):
            raise ValueError(f"implementation must be one of auto, ring; got {implementation!r}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = self.dim // num_heads if head_dim is None else head_dim
        self.ring_size, self.overlap_comm_compute = ring_size, overlap_comm_compute
        self.dropout, self.causal, self.layout = dropout, causal, checked_layout(layout)
        self.scale = self.head_dim**-0.5 if attention_scale is None else attention_scale
        self.use_rotary, self.rope_base = use_rotary, rope_base
        self.layer_idx, self.block_size, self.implementation = layer_idx, block_size, implementation
        self.q_proj = nn.Linear(self.dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(self.dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(self.dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, self.dim, bias=bias)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        ring_group: dist.ProcessGroup | None = None,
        attention_mask: Mask | Tensor | None = None,
        *,
        positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_bias: PositionBias | None = None,
        past_key_value: Cache | tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        causal: bool | None = None,
        return_dict: bool = False,
        implementation: str | None = None,
        **aliases: Any,
    ) -> Any:
        """Attend from ``q`` to itself, or to ``k`` and ``v``.

        Args:
            q: ``[B, n, dim]``; or projected (and rotated) ``[B, H, n, d]``, then with k and v ``[B, Hkv, m, d]``.
            k: source of the keys ``[B, m, dim]``; default q. v: source of the values; default k.
            ring_group: the ranks; the tensors are then this rank's shard, equally long on every rank.
            attention_mask: which keys exist, ``[B, m]`` bool or 0/1 (of the shard, with a group), or a ``Mask`` of
                causal and padding parts over absolute positions.
            positions: with a group, absolute positions of the shard ``[n]``, -1 for a slot without a token; default:
                the layout's, for shards that are full.
            key_positions: likewise for the keys; default: ``positions`` if k is not given, else the layout's.
            position_ids: ``[n]`` or ``[B, n]`` for the module's own rotation, or ``position_embeddings`` in its place;
                without a group. Default: after the cached tokens.
            past_key_value: without a group, a cache of every rank's keys; updated in place, or a pair.
            output_attentions: without a group, also the map ``[B, H, n, m]`` in ``return_dict``.
            causal: overrides the module's setting.

        Returns:
            output ``[B, n, dim]``; with ``return_dict=True`` an ``AttentionOutput`` whose ``aux["tiles"]`` has
            owners, step and whether it was skipped for each meeting of the ranks in this process.

        Raises:
            ValueError: an argument that does not fit; Unsupported: dropout in training.
        """
        if self.dropout and self.training:
            raise Unsupported(f"a ring here drops no probabilities; got dropout {self.dropout} in training")
        k, implementation = read_aliases(k, implementation, aliases)
        if implementation not in (None, "auto", "ring"):
            raise Unsupported(f"implementation must be one of auto, ring; got {implementation!r}")
        if position_bias is not None:
            raise ValueError("position_bias must be None: keys travel, and no bias travels with them")
        self._check(q, k, v)
        causal = self.causal if causal is None else causal
        cache = None
        if ring_group is None:
            if positions is not None or key_positions is not None:
                raise ValueError("positions are for a shard; without ring_group the input is the whole text")
            cache = open_cache(
                past_key_value,
                use_cache=use_cache,
                context=k if q.dim() == 3 else None,
                kinds=(ContiguousKV, PagedSequences),
                make=ContiguousKV,
                layer=self.layer_idx,
            )
            past = cache.length(self.layer_idx) if cache is not None else 0
            if position_ids is None:
                position_ids = torch.arange(past, past + q.shape[-2], device=q.device)
            query, key, value = self._project(q, k, v, position_ids, position_embeddings)
            if cache is not None:
                key, value, _ = cache.update(self.layer_idx, key, value)
            found = self._simulate(query, key, value, attention_mask, causal)
            if output_attentions:
                found = replace(found, attentions=self._map(query, key, attention_mask, causal, found.lse))
        else:
            asked = (
                position_ids,
                position_embeddings,
                past_key_value,
                use_cache or None,
                output_attentions or None,
            )
            if any(part is not None for part in asked):
                raise ValueError(
                    "with ring_group a rank holds a shard only: no cache, map or position_ids; say positions"
                )
            found = self._take_part(q, k, v, ring_group, attention_mask, positions, key_positions, causal)
        found.aux.update(layout=self.layout, overlap=self.overlap_comm_compute, block_size=self.block_size)
        heads = found.output.transpose(1, 2).flatten(2)
        output = AttentionOutput(
            self.o_proj(heads), found.attentions, cache if use_cache else None, found.lse, found.aux
        )
        return output if return_dict else output.output

    def effective_map(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        head: int,
        batch: int = 0,
        attention_mask: Mask | Tensor | None = None,
        causal: bool | None = None,
    ) -> RingMap:
        """The map of one head over the whole sequence, with owners and steps; padding without holes only."""
        self._check(q, k, v)
        causal = self.causal if causal is None else causal
        with torch.no_grad():
            places = torch.arange(q.shape[-2], device=q.device)
            query, key, value = self._project(q, k, v, places)
            mask, bias, _, _ = self._read_mask(attention_mask, query, key, causal)
            if bias is not None:
                raise ValueError("attention_mask must be padding without holes for a map; it has holes")
            lse = self._simulate(query, key, value, attention_mask, causal).lse
        assert lse is not None
        wide = torch.promote_types(query.dtype, torch.float32)
        own_key = key[batch, head // (self.num_heads // self.num_kv_heads)]
        size = self.ring_size or 1
        return RingMap(
            SoftmaxMap(
                query[batch, head].to(wide).cpu().numpy(),
                own_key.to(wide).cpu().numpy(),
                lse[batch, head].cpu().numpy(),
                self.scale,
                mask,
                batch,
            ),
            owners(self.layout, query.shape[2], size),
            owners(self.layout, key.shape[2], size),
            size,
        )

    def _simulate(
        self, query: Tensor, key: Tensor, value: Tensor, given: Mask | Tensor | None, causal: bool
    ) -> AttentionOutput:
        """All ranks in this process: ``[B, H, n, D]`` of the whole sequence."""
        size, length, num_keys = self.ring_size or 1, query.shape[2], key.shape[2]
        if size > max(1, length):
            raise RingError(f"ring_size must be at most the {length} tokens; got {size}")
        mask, bias, keep, causal = self._read_mask(given, query, key, causal)
        cut = {"size": size, "layout": self.layout}
        queries, positions = split(query, dim=2, **cut)
        keys, key_positions = split(key, dim=2, **cut)
        values, _ = split(value, dim=2, **cut)
        if keep is not None:
            kept, _ = split(keep, dim=1, **cut)
            key_positions = torch.where(kept, key_positions[:, None], -1)
        positions, key_positions = _aligned(positions, key_positions, num_keys - length)
        result = self._ring(queries, keys, values, positions, key_positions, Ring(size), causal)
        output, lse = (
            join(part, length=length, layout=self.layout, dim=2) for part in (result.output, result.lse)
        )
        told = AttendCall(query, key, value, mask, self.scale, bias, output, lse, "ring")
        with composing():
            tell(told)

        def again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with composing():
                return self._simulate(query, key, value, given, causal).output

        announce(softmax_call(told, again).retold("ring", ring_size=size, layout=self.layout))
        aux: dict[str, Any] = {
            "implementation": "ring",
            "reason": f"{size} ranks simulated in this process",
            "ring_size": size,
            "tiles": result.tiles,
            "query_owner": owners(self.layout, length, size),
            "key_owner": owners(self.layout, num_keys, size),
        }
        return AttentionOutput(output, lse=lse, aux=aux)

    def _take_part(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        group: dist.ProcessGroup,
        given: Mask | Tensor | None,
        positions: Tensor | None,
        key_positions: Tensor | None,
        causal: bool,
    ) -> AttentionOutput:
        """This rank's shard against the keys of all."""
        size = dist.get_world_size(group)
        ring = Ring(self.ring_size or size, group)
        length, num_keys = q.shape[-2], (q if k is None else k).shape[-2]
        # where the positions are the layout's, the last query is the newest token, as everywhere
        shift = size * (num_keys - length) if positions is None and key_positions is None else 0
        positions = self._positions("positions", positions, length, ring, q.device)
        if k is None:
            key_positions = positions if key_positions is None else key_positions
        key_positions = self._positions("key_positions", key_positions, num_keys, ring, q.device)
        query, key, value = self._project(q, k, v, positions)
        keep, causal = _read_shard_mask(given, query, key, key_positions, causal)
        key_positions = key_positions.expand(query.shape[0], -1)
        if keep is not None:
            key_positions = torch.where(keep, key_positions, -1)
        own, travelling = _aligned(positions[None], key_positions[None], shift)
        result = self._ring(query[None], key[None], value[None], own, travelling, ring, causal)
        aux: dict[str, Any] = {
            "implementation": "ring",
            "reason": f"rank {ring.hosted[0]} of {size} over {dist.get_backend(group)}",
            "ring_size": size,
            "tiles": result.tiles,
            "positions": positions,
        }
        return AttentionOutput(result.output[0], lse=result.lse[0], aux=aux)

    def _ring(
        self, q: Tensor, k: Tensor, v: Tensor, own: Tensor, travelling: Tensor, ring: Ring, causal: bool
    ) -> RingResult:
        return ring_attend(
            q,
            k,
            v,
            own,
            travelling,
            ring=ring,
            scale=self.scale,
            causal=causal,
            overlap=self.overlap_comm_compute,
            block_size=self.block_size,
        )

    def _project(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        positions: Tensor,
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, H, n, D]``; what attends to itself is rotated by absolute position."""
        if q.dim() == 4:
            assert k is not None
            assert v is not None
            return q, k, v
        source = q if k is None else k
        projected = (self.q_proj(q), self.k_proj(source), self.v_proj(source if v is None else v))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        if k is not None or not (self.use_rotary or tables):
            return query, key, value
        rotary = self.use_rotary if isinstance(self.use_rotary, Rotary) else Rotary(self.rope_base)
        tables = tables or rotary.tables(positions.clamp(min=0), self.head_dim)
        turned = (rotate(part, *tables, layout=rotary.layout) for part in (query, key))
        return next(turned), next(turned), value

    def _positions(
        self, name: str, given: Tensor | None, length: int, ring: Ring, device: torch.device
    ) -> Tensor:
        if given is None:
            table = shard_positions(self.layout, ring.size * length, ring.size)
            if table.shape[1] != length:
                raise RingError(
                    f"a {self.layout} shard has an even number of slots: pad it and give {name}; got {length}"
                )
            return torch.from_numpy(table[ring.hosted[0]]).to(device)
        if tuple(given.shape) != (length,) or given.dtype != torch.int64:
            raise RingError(f"{name} must be int64 [{length}]; got {given.dtype} {list(given.shape)}")
        return given

    def _map(
        self, query: Tensor, key: Tensor, given: Mask | Tensor | None, causal: bool, lse: Tensor | None
    ) -> Tensor:
        assert lse is not None
        check_map_size(query.shape[0], self.num_heads, query.shape[2], key.shape[2])
        with torch.no_grad():
            mask, bias, _, _ = self._read_mask(given, query, key, causal)
            keys = hide_padding(key, mask).to(lse.dtype)
            groups = query.to(lse.dtype).unflatten(1, (key.shape[1], -1))
            scores = (groups @ keys[:, :, None].mT * self.scale).flatten(1, 2)
            return dense_map(scores, lse, mask, bias).to(query.dtype)

    def _read_mask(
        self, given: Mask | Tensor | None, query: Tensor, key: Tensor, causal: bool
    ) -> tuple[Mask, Tensor | None, Tensor | None, bool]:
        """The mask and bias of the whole call, and the same as keys that exist and whether it is causal."""
        sizes = {"batch": query.shape[0], "num_queries": query.shape[2], "num_keys": key.shape[2]}
        keep, also_causal = read_key_mask(given, past=0, device=query.device, **sizes)
        mask, bias = read_attention_mask(given, heads=1, **sizes)
        causal = causal or also_causal
        return (Causal() if causal else Full()) & mask, bias, keep, causal

    def _check(self, q: Tensor, k: Tensor | None, v: Tensor | None) -> None:
        if q.dim() == 4 and (k is None or v is None):
            raise ValueError("k and v must be given where q is already projected, [B, H, n, d]; got none")
        if k is None and v is not None:
            raise ValueError("k must be given where v is; got v alone")
        for name, part in (("q", q), ("k", k), ("v", v)):
            if part is None:
                continue
            heads = self.num_heads if name == "q" else self.num_kv_heads
            flat = part.dim() == 3 and part.shape[-1] == self.dim
            ready = part.dim() == 4 and part.shape[1] == heads and part.shape[-1] == self.head_dim
            if part.dim() != q.dim() or not (flat or ready):
                raise ValueError(
                    f"{name} must be [batch, tokens, {self.dim}], or with all three projected "
                    f"[batch, {heads}, tokens, {self.head_dim}]; got {list(part.shape)}"
                )
            if part.shape[0] != q.shape[0]:
                raise ValueError(f"{name} must have the batch of q, {q.shape[0]}; got {part.shape[0]}")
        if k is not None and v is not None and k.shape[-2] != v.shape[-2]:
            raise ValueError(f"v must have the tokens of k, {k.shape[-2]}; got {v.shape[-2]}")


class BlockwiseRingAttention(RingAttention):
    """Ring attention that meets a rank's keys ``block_size`` at a time, so no whole tile of scores exists."""

    def __init__(
        self, dim: int | None = None, num_heads: int = 8, block_size: int = 1024, **settings: Any
    ) -> None:
        super().__init__(dim, num_heads, block_size=block_size, **settings)


def _aligned(positions: Tensor, key_positions: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Positions from the first token of the longer side, so none is below 0; ``shift`` more keys than queries."""

    def moved(table: Tensor, by: int) -> Tensor:
        return torch.where(table < 0, table, table + by) if by > 0 else table

    return moved(positions, shift), moved(key_positions, -shift)


def _read_shard_mask(
    given: Mask | Tensor | None, query: Tensor, key: Tensor, key_positions: Tensor, causal: bool
) -> tuple[Tensor | None, bool]:
    """Which of the shard's keys exist, ``[B, m]`` or None for all, and whether the mask is causal."""
    sizes = {"batch": query.shape[0], "num_queries": query.shape[2], "num_keys": key.shape[2]}
    if not isinstance(given, Mask):
        keep, _ = read_key_mask(given, past=0, device=query.device, **sizes)
        return keep, causal
    band = given.band()
    if band.left is not None or band.right not in (None, 0):
        raise ValueError(f"attention_mask must be causal or padding here; got {given.describe()}")
    if band.ranges is None:
        return None, causal or band.right == 0
    if len(band.ranges) not in (1, query.shape[0]):
        raise ValueError(
            f"attention_mask must describe 1 or {query.shape[0]} sequences; got {len(band.ranges)}"
        )
    limits = torch.tensor(band.ranges, device=query.device).expand(query.shape[0], 2)
    return (key_positions >= limits[:, :1]) & (key_positions < limits[:, 1:]), causal or band.right == 0
