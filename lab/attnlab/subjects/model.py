"""A transformers model whose every attention runs through our kernels."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage.results import InputRow, MeasurementRow

from ..hook import Hook, LayerCall, Listener, cache_keyword
from ..models import LoadedModel
from ..outcomes import CheckFailed
from ..probes.accuracy import compare_hidden, compare_logits, perplexity
from ..probes.map_change import MapSample
from ..spec import ExperimentSpec, RunPoint
from ..swap import Shape, plan_swap
from .tokens import read_tokens

CHECKED_TOKENS = 256
"""longest prefix on which the model's own eager attention runs: no n x n of the whole input is formed"""

ABSOLUTE_TOLERANCE = 2e-4
SCALED_TOLERANCE = 1e-5
"""of the largest logit, for models whose logits are large"""
RELATIVE_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""distance over size in the Frobenius norm; a wrong mask is far beyond"""


class ModelSubject:
    """A model, its input and the swap of one run (see subjects.Subject)."""

    def __init__(self, loaded: LoadedModel, spec: ExperimentSpec, point: RunPoint) -> None:
        if point.phase == "train":
            raise Unsupported("phase: train is for bare modules; a model runs with its trained weights")
        if point.phase == "decode" and not loaded.causal:
            raise Unsupported(f"phase: decode needs a language model; {loaded.name} reads all tokens at once")
        self.swap = plan_swap(point.mechanism, point.parameters, point.implementation, seed=spec.seed)
        self.identity = loaded.identity
        self._loaded = loaded
        self._model = loaded.model
        self._phase = point.phase
        self.steps = spec.decoded
        self._written = spec.generated
        self._text = spec.input.text
        self._input = read_tokens(loaded, spec, point)
        self.tokens = len(self._input.ids)
        if self.tokens <= self.steps:
            raise Unsupported(
                f"phase: decode needs at least {self.steps + 1} tokens, one to cache and {self.steps} to decode"
            )
        self.device = next(self._model.parameters()).device
        self._ids = torch.tensor([self._input.ids], device=self.device).expand(point.batch_size, -1)
        config = self._model.config.get_text_config()
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.layers = config.num_hidden_layers
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.kind = self.swap.kind(Shape(self.tokens, kv_heads, heads, head_dim, loaded.causal))
        self._hook = Hook(self._model, self.swap)
        self._cache: DynamicCache | None = None

    def input_row(self) -> InputRow:
        strings = list(self._input.strings)
        detail: dict[str, Any] = {"batch_size": self._ids.shape[0]}
        if self._input.cut:
            detail["cut_tokens"] = self._input.cut
        if self._input.needle:
            detail["needle"] = self._input.needle
        if self._written:
            detail["generated_tokens"] = self._written
        queries = strings[-self.steps :]  # of no steps all
        return InputRow(self._text, queries, strings, detail)

    def trace_detail(self, call: LayerCall) -> dict[str, Any]:
        return {}

    def check(self) -> list[MeasurementRow]:
        """Compare logits (an encoder's hidden states) with the model's own eager attention on a prefix."""
        ids = self._ids[:1, :CHECKED_TOKENS]
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation("eager")
        theirs = self._base(ids)
        self._model.set_attn_implementation(before)
        # an approximation is not compared with the model, but the kernels that it is measured against are
        swap = replace(self.swap) if self.kind == "exact" else self.swap.exact
        hook = Hook(self._model, swap)
        with hook.installed():
            ours = hook.forward(lambda: self._base(ids))
        found = compare_hidden(ours[0], theirs[0], self._head)
        relative = RELATIVE_TOLERANCE.get(ours.dtype)
        if relative is not None:
            error, allowed, unit = found.relative, relative, "relative"
        else:
            error, unit = found.absolute, "absolute"
            allowed = max(ABSOLUTE_TOLERANCE, SCALED_TOLERANCE * found.largest)
        what = "logits" if self._loaded.causal else "hidden states"
        if not error <= allowed:
            raise CheckFailed(
                f"the {what} of {self._loaded.name} through our kernels are {error:.3g} ({unit}) off its own "
                f"eager attention on {ids.shape[1]} tokens, {allowed:.3g} is allowed; nothing was stored"
            )
        detail = {
            "against": "the model's own eager attention",
            "what": what,
            "tokens": ids.shape[1],
            "tolerance": allowed,
        }
        names = ["check_error", "logit_error"] if self.kind == "exact" else ["check_error"]
        return [MeasurementRow(name, error, unit, detail=detail) for name in names]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with self._hook.installed():
            if self._phase == "decode":
                self._cache = DynamicCache()
                self._base(self._ids[:, :-1], self._cache)
            try:
                yield
            finally:
                self._cache = None

    def cache_bytes(self) -> int:
        if self._cache is None:
            return 0
        self.prepare()
        held = (getattr(layer, name, None) for layer in self._cache.layers for name in ("keys", "values"))
        return sum(part.nbytes for part in held if part is not None)

    def prepare(self) -> None:
        self._shorten(self.tokens - 1)

    def walk(self, listener: Listener) -> None:
        assert self._cache is not None
        self._shorten(self.tokens - self.steps)
        for place in range(self.tokens - self.steps, self.tokens):
            token = self._ids[:, place : place + 1]
            self._hook.forward(lambda token=token: self._base(token, self._cache), listener)

    def _shorten(self, tokens: int) -> None:
        """Drop what the cache holds beyond its first tokens."""
        if self._cache is not None and (extra := self._cache.get_seq_length() - tokens) > 0:
            self._cache.crop(-extra)

    def step(self, listener: Listener | None = None) -> Tensor:
        hidden = self._hook.forward(self._forward, listener)
        if self._loaded.causal:
            self._head(hidden[:, -1:])
        return hidden[0]

    def loss(self, hidden: Tensor) -> Iterable[MeasurementRow]:
        if self._phase == "decode":
            return
        ids = self._ids[0]
        if self.kind == "exact":
            if self._loaded.causal and self.tokens > 1:
                yield MeasurementRow("perplexity", perplexity(hidden, self._head, ids), "perplexity")
            return
        sample = MapSample(self.layers)
        exact = Hook(self._model, self.swap.exact)
        with exact.installed():
            reference = exact.forward(self._forward, sample.keep)[0]
        self._hook.forward(self._forward, sample.compare)
        detail: dict[str, Any] = {"against": "multi_head on the same input", "tokens": self.tokens}
        yield from sample.measurements(detail)
        if not self._loaded.causal:
            found = compare_hidden(hidden, reference, self._head)
            yield MeasurementRow(
                "logit_error", found.absolute, "absolute", detail=detail | {"what": "hidden states"}
            )
            return
        lost = compare_logits(hidden, reference, self._head, ids)
        yield MeasurementRow("logit_error", lost.logit_error, "absolute", detail=detail | {"what": "logits"})
        yield MeasurementRow("kl", lost.kl, "nats", detail=detail)
        if self.tokens > 1:
            compared = detail | {"reference_perplexity": lost.reference_perplexity}
            yield MeasurementRow("perplexity", lost.perplexity, "perplexity", detail=compared)

    def _forward(self) -> Tensor:
        if self._cache is None:
            return self._base(self._ids)
        return self._base(self._ids[:, -1:], self._cache)

    def _base(self, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Return the final hidden states [B, T, hidden]: logits of a long text would not fit in memory."""
        options: dict[str, Any] = {"use_cache": cache is not None} if self._loaded.causal else {}
        if cache is not None:
            options[cache_keyword(self._model.base_model)] = cache
        return self._model.base_model(input_ids=ids, **options).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self._loaded.logits(hidden)
