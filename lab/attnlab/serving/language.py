"""A language model that is served: real prompts, and every token of an answer is the likeliest one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.block_tables import BlockTables
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.scheduler import Work

from ..hook import Hook
from ..models import LoadedModel
from ..swap import ModelCall, Shape, plan_swap
from ..swaps.latent import LatentSwap
from .bare import request_of
from .engine import CacheShape
from .pools import StepPlan
from .served_swap import ServedLatentSwap, ServedSwap
from .workload import Request

FITTED_TOKENS = 256
"""of the text that a latent's basis is fitted to"""


class ModelRunner:
    """The model through the hook; a step is one forward of all sequences end to end, each at its own positions.

    Args:
        source: token ids that prompts are cut from, each from a place drawn by the seed; said again where they end.
        shared_prefix: tokens at the beginning of ``source`` that every prompt begins with.

    Raises:
        Unsupported: the model is no decoder of text, or the mechanism cannot go into it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        mechanism: str,
        parameters: dict[str, Any],
        source: Sequence[int],
        *,
        seed: int = 0,
        shared_prefix: int = 0,
        implementation: str = "auto",
    ) -> None:
        if not loaded.causal or loaded.writes or loaded.reads != "text":
            raise Unsupported(f"phase: serving needs a decoder of text, and {loaded.name} is none")
        self.loaded, self.device = loaded, next(loaded.model.parameters()).device
        self.plain = plan_swap(mechanism, parameters, "auto")
        """the same mechanism, for one sequence at a time"""
        self.answers: dict[int, list[int]] = {}
        self._source, self._seed, self._shared = list(source), seed, shared_prefix
        self._prompts: dict[int, list[int]] = {}
        self._swap = self._served_swap(implementation)
        self._hook = Hook(loaded.model, self._swap)
        dtype = loaded.model.dtype
        self.token_bytes = sum(row.nbytes(dtype) for row in self._swap.rows)
        self.layers = len(self._swap.rows)
        self.heads = loaded.model.config.get_text_config().num_attention_heads

    def kind(self, tokens: int) -> str:
        """``exact`` or ``approximate``: whether the mechanism computes what the model was trained with."""
        config = self.loaded.model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return self.plain.kind(Shape(tokens, kv_heads, heads, size))

    @property
    def implementation(self) -> str:
        """What computed the attention."""
        return ", ".join(name for name, _ in self._hook.implementations.most_common())

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Put the served attention into the model and leave it again; steps are run inside."""
        with self._hook.installed(), torch.inference_mode():
            yield

    def open(self, requests: Sequence[Request], shape: CacheShape) -> None:
        self._swap.open(shape, self.loaded.model.dtype, self.device)
        self._prompts = {request.id: self._prompt(request) for request in requests}
        self.answers = {request.id: [] for request in requests}

    def prompts(self) -> dict[int, Sequence[int]]:
        return dict(self._prompts)

    def step(self, batch: Sequence[Work], tables: BlockTables) -> None:
        self._swap.plan = plan = StepPlan.of(batch, tables, self.device)
        ids, last, answered, first = [], [], [], 0
        for work in batch:
            request_id = request_of(work)
            known = self._prompts[request_id] + self.answers[request_id]
            end = work.start + work.tokens
            ids += known[work.start : end]
            first += work.tokens
            if end == len(known):
                last.append(first - 1)
                answered.append(request_id)
        given = torch.tensor([ids], device=self.device)
        hidden = self._hook.forward(lambda: self._base(given, plan.positions[None]))
        likeliest = self.loaded.logits(hidden[0, last]).argmax(dim=-1).tolist()
        for request_id, token in zip(answered, likeliest, strict=True):
            self.answers[request_id].append(token)

    def latest_attention(self) -> dict[str, Callable[[], object]]:
        return self._swap.latest_attention()

    def end(self, request_id: int) -> None:
        pass

    def alone(self, request: Request) -> list[int]:
        """The answer to a request by itself: the same mechanism, the whole text again for every token."""
        text = self._prompt(request)
        hook = Hook(self.loaded.model, self.plain)
        with hook.installed(), torch.inference_mode():
            for _ in range(request.output_tokens):
                ids = torch.tensor([text], device=self.device)
                hidden = hook.forward(lambda ids=ids: self._base(ids, None))
                text.append(int(self.loaded.logits(hidden[0, -1:]).argmax()))
        return text[request.prompt_tokens :]

    def _served_swap(self, implementation: str) -> ServedSwap:
        """The swap, with what each layer keeps of a token learned from a forward over the beginning of the source."""
        plain = self.plain
        made = ServedSwap(plain.mechanism, implementation, num_kv_heads=plain.num_kv_heads)
        if isinstance(plain, LatentSwap):
            made = ServedLatentSwap(plain.mechanism, implementation, fitted=plain)
        hook = Hook(self.loaded.model, _Learning(made, plain))
        ids = torch.tensor([self._source[:FITTED_TOKENS]], device=self.device)
        with hook.installed(), torch.inference_mode():
            hook.forward(lambda: self._base(ids, None))
        return made

    def _base(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        # a mask of ones: without one transformers would look for the sequences in the positions
        options = {"attention_mask": torch.ones_like(ids), "position_ids": positions, "use_cache": False}
        return self.loaded.model.base_model(input_ids=ids, **options).last_hidden_state

    def _prompt(self, request: Request) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + request.id)
        start = int(torch.randint(len(self._source), (1,), generator=generator))
        text = self._source[start:] + self._source[:start]
        prefix = (self._source * (self._shared // len(self._source) + 1))[: self._shared]
        rest = request.prompt_tokens - len(prefix)
        return prefix + (text * (rest // len(text) + 1))[:rest]


class _Learning(ServedSwap):
    """Computes as ``plain`` does, and tells the served swap of every layer."""

    def __init__(self, served: ServedSwap, plain: Any) -> None:
        super().__init__()
        self._served, self._plain = served, plain

    def attend(self, call: ModelCall) -> Any:
        made = self._plain.attend(call)
        self._served.learn(call)
        return made
