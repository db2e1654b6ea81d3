"""A stack of bare attention modules that is served: the hidden states that come in are drawn, the rest is real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.block_tables import BlockTables
from attnlab_kernels.mechanisms.base import SoftmaxModule
from attnlab_kernels.mechanisms.build import build_mechanism
from attnlab_kernels.mechanisms.multi_head_latent import MultiHeadLatentAttention
from attnlab_kernels.operations.latent.reference import absorb, raise_values
from attnlab_kernels.scheduler import Work

from .engine import CacheShape
from .pools import LayerPool, Row, StepPlan, latest_attention, open_pools
from .workload import Request

PREFIX_SEED = 1 << 40
"""request ids stay below it"""


class BareRunner:
    """Layers ``hidden + attention(hidden)``, one after another. Nothing is generated: token t of request r is row t of
    normal numbers drawn for r, of which the first ``shared_prefix`` are the same for all.

    Args:
        dim: model width.
        keep_outputs: hold what comes out for each token, ``[tokens, dim]`` by request, in ``outputs``.
    """

    def __init__(
        self,
        mechanism: str,
        parameters: dict[str, Any],
        *,
        dim: int,
        num_heads: int,
        layers: int = 1,
        seed: int = 0,
        shared_prefix: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        implementation: str = "auto",
        keep_outputs: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.device = torch.device("cpu") if device is None else device
        shape = {"dim": dim, "num_heads": num_heads, "causal": True}
        self.modules = [
            build_mechanism(mechanism, **shape, **parameters).to(self.device, dtype).eval()
            for _ in range(layers)
        ]
        self._rows = [_row_of(module) for module in self.modules]
        self.layers, self.heads = layers, num_heads
        self.token_bytes = sum(row.nbytes(dtype) for row in self._rows)
        self.outputs: dict[int, Tensor] = {}
        self.implementation = ""
        """what computed the attention last"""
        self._dim, self._dtype, self._seed, self._shared = dim, dtype, seed, shared_prefix
        self._asked, self._keep = implementation, keep_outputs
        self._pools: list[LayerPool] = []
        self._requests: dict[int, Request] = {}
        self._drawn: dict[int, Tensor] = {}

    def open(self, requests: Sequence[Request], shape: CacheShape) -> None:
        self._pools = []  # the old ones first
        self._pools = open_pools(self._rows, shape, self._dtype, self.device)
        self._requests = {request.id: request for request in requests}
        self._drawn, self.outputs = {}, {}

    def prompts(self) -> dict[int, Sequence[int]]:
        """Names of the prompt's hidden states: equal ones for the shared prefix."""
        return {
            request.id: [-1] * self._shared + [request.id] * (request.prompt_tokens - self._shared)
            for request in self._requests.values()
        }

    def inputs(self, request_id: int) -> Tensor:
        """The hidden states of a request's tokens, ``[tokens, dim]``."""
        if request_id not in self._drawn:
            tokens = self._requests[request_id].tokens
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + request_id)
            drawn = torch.randn(tokens, self._dim, generator=generator)
            if self._shared:
                generator.manual_seed(PREFIX_SEED + self._seed)
                drawn[: self._shared] = torch.randn(self._shared, self._dim, generator=generator)[:tokens]
            self._drawn[request_id] = drawn.to(self.device, self._dtype)
        return self._drawn[request_id]

    def step(self, batch: Sequence[Work], tables: BlockTables) -> None:
        plan = StepPlan.of(batch, tables, self.device)
        parts = [self.inputs(request_of(work))[work.start : work.start + work.tokens] for work in batch]
        hidden = torch.cat(parts)
        with torch.inference_mode():
            for module, pool in zip(self.modules, self._pools, strict=True):
                hidden = hidden + self._attend(module, pool, plan, hidden)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._keep:
            self._keep_rows(batch, hidden)

    def latest_attention(self) -> dict[str, Callable[[], object]]:
        return latest_attention(self._pools)

    def end(self, request_id: int) -> None:
        del self._drawn[request_id]

    def alone(self, request: Request) -> Tensor:
        """What comes out of a request by itself, ``[tokens, dim]``: each module's own full pass."""
        hidden = self.inputs(request.id)[None]
        with torch.inference_mode():
            for module in self.modules:
                hidden = hidden + module(hidden, causal=True, return_dict=True).output
        return hidden[0]

    def _attend(self, module: Any, pool: LayerPool, plan: StepPlan, hidden: Tensor) -> Tensor:
        given = (pool, plan, hidden, self._asked)
        latent = isinstance(module, MultiHeadLatentAttention)
        output, self.implementation = (
            _attend_latent(module, *given) if latent else _attend_heads(module, *given)
        )
        return output

    def _keep_rows(self, batch: Sequence[Work], hidden: Tensor) -> None:
        for work, rows in zip(batch, hidden.split([work.tokens for work in batch]), strict=True):
            request_id = request_of(work)
            if request_id not in self.outputs:
                self.outputs[request_id] = hidden.new_full(
                    (self._requests[request_id].tokens, self._dim), torch.nan
                )
            self.outputs[request_id][work.start : work.start + work.tokens] = rows


def _attend_heads(
    module: SoftmaxModule, pool: LayerPool, plan: StepPlan, hidden: Tensor, implementation: str
) -> tuple[Tensor, str]:
    """One attention over keys and values of ``[T, dim]``; returns the output and what computed it."""
    query, key, value = (
        project(hidden).unflatten(-1, (-1, module.head_dim))
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    pool.write(plan, key, value)
    made = pool.attend(plan, query, scale=module.scale, implementation=implementation)
    return module.o_proj(made.output.flatten(1)), str(made.aux["implementation"])


def _attend_latent(
    module: MultiHeadLatentAttention, pool: LayerPool, plan: StepPlan, hidden: Tensor, implementation: str
) -> tuple[Tensor, str]:
    """The same over latents, in the absorbed form: a token's key is its latent and rotary key, its value the latent."""
    inputs = module.latent_inputs(hidden[None], position_ids=plan.positions)
    pool.write(plan, torch.cat((inputs.latent[0], inputs.key_rope[0]), dim=-1)[:, None])
    query = torch.cat((absorb(inputs), inputs.query_rope), dim=-1)[0].transpose(0, 1)
    made = pool.attend(
        plan, query, scale=module.scale, value_dim=module.kv_lora_rank, implementation=implementation
    )
    heads = raise_values(made.output.transpose(0, 1)[None], inputs)[0]
    return module.o_proj(heads.transpose(0, 1).flatten(1)), str(made.aux["implementation"])


def _row_of(module: Any) -> Row:
    if isinstance(module, MultiHeadLatentAttention):
        return Row(1, module.kv_lora_rank + module.qk_rope_head_dim, 0)
    return Row(module.num_kv_heads, module.head_dim, module.head_dim)


def request_of(work: Work) -> int:
    """The request that a piece of work belongs to."""
    assert isinstance(work.seq_id, int)
    return work.seq_id
