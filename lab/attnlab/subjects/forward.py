"""A model that reads its whole input in one forward: a picture, or what an encoder-decoder reads and has written."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage.results import InputRow, MeasurementRow

from ..hook import Hook, LayerCall, Listener
from ..models import LoadedModel, ModelError
from ..outcomes import CheckFailed
from ..probes.accuracy import compare_hidden, compare_logits, perplexity
from ..spec import ExperimentSpec, RunPoint
from ..swap import Shape, plan_swap
from .given import Given, Roles, Stream, scout
from .model import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE, SCALED_TOLERANCE
from .speech import read_audio
from .tokens import read_tokens
from .vision import read_image
from .writing import decoder_ids, write

DENSE_CELLS = 1 << 22
"""largest n x n map for which the model's own eager attention is run; above it, its own SDPA"""


def read_input(loaded: LoadedModel, spec: ExperimentSpec, point: RunPoint) -> Given:
    """Return what the model is given.

    Raises:
        ModelError: the model does not read what the spec gives it.
    """
    given = spec.input
    kind = "image" if given.image is not None else "audio" if given.audio is not None else "text"
    if kind != loaded.reads:
        raise ModelError(f"input: {loaded.name} reads {loaded.reads}, and the spec gives it {kind}")
    if kind == "image":
        return read_image(loaded, spec)
    if kind == "audio":
        return read_audio(loaded, spec)
    return _read_source(loaded, spec, point)


def _read_source(loaded: LoadedModel, spec: ExperimentSpec, point: RunPoint) -> Given:
    tokens = read_tokens(loaded, spec, point)
    arguments: dict[str, Any] = {"input_ids": torch.tensor([tokens.ids], device=loaded.model.device)}
    written = write(loaded, arguments, spec.input.target, None)
    arguments["decoder_input_ids"] = decoder_ids(written, loaded)
    detail: dict[str, Any] = {"cut_tokens": tokens.cut} if tokens.cut else {}
    detail["written_by"] = (
        "the spec" if spec.input.target is not None else "greedy decoding, the model's own attention"
    )
    streams = {
        "source": Stream("source", list(tokens.strings)),
        "target": Stream("target", list(written.strings)),
    }
    attentions, _ = scout(loaded.model, arguments)
    ids = arguments["decoder_input_ids"][0]
    return Given(
        arguments, "target", "source", streams, attentions, text=spec.input.text, ids=ids, detail=detail
    )


class ForwardSubject:
    """A model, its input and the swap of one run (see subjects.Subject)."""

    def __init__(self, loaded: LoadedModel, spec: ExperimentSpec, point: RunPoint) -> None:
        if point.phase != "prefill":
            raise Unsupported(
                f"phase: {point.phase} needs a language model or a bare module, not {loaded.name}"
            )
        self.swap = plan_swap(point.mechanism, point.parameters, point.implementation, seed=spec.seed)
        self.identity = loaded.identity
        self._loaded = loaded
        self._model = loaded.model
        self._given = read_input(loaded, spec, point)
        self._roles = Roles(loaded.model, self._given)
        self.device = next(self._model.parameters()).device
        self._one = self._given.arguments
        self._roles.check()
        attentions = self._given.attentions
        self.layers = len(attentions)
        self._largest = max(attention.queries * attention.keys for attention in attentions)
        self.tokens = max(attention.keys for attention in attentions)
        self._batch_size = point.batch_size
        self._arguments = {name: self._repeated(value) for name, value in self._one.items()}
        config = self._model.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        heads = config.num_attention_heads
        shape = Shape(self.tokens, kv_heads, heads, config.hidden_size // heads, causal=False)
        self.kind = self.swap.kind(shape)
        self._hook = Hook(self._model, self.swap)

    def input_row(self) -> InputRow:
        given = self._given
        streams = {
            name: {"title": stream.title, "tokens": stream.tokens} for name, stream in given.streams.items()
        }
        detail = {"batch_size": self._batch_size, "streams": streams} | given.detail
        queries, keys = (given.streams[name].tokens for name in (given.queries, given.keys))
        return InputRow(given.text, queries, keys, detail)

    def trace_detail(self, call: LayerCall) -> dict[str, Any]:
        return self._roles.detail(call.name, call.cross)

    def check(self) -> list[MeasurementRow]:
        """Compare logits (states, where there is no head) with the model's own attention on the whole input."""
        own = "eager" if self._largest <= DENSE_CELLS else "sdpa"
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(own)
        theirs = self._answer(self._one)
        self._model.set_attn_implementation(before)
        hook = Hook(self._model, self.swap.exact)
        with hook.installed():
            ours = hook.forward(lambda: self._answer(self._one))
        found = compare_hidden(ours, theirs, _same)
        relative = RELATIVE_TOLERANCE.get(ours.dtype)
        if relative is not None:
            error, allowed, unit = found.relative, relative, "relative"
        else:
            error, unit = found.absolute, "absolute"
            allowed = max(ABSOLUTE_TOLERANCE, SCALED_TOLERANCE * found.largest)
        detail = {
            "against": f"the model's own {own} attention",
            "what": self._what,
            "tokens": self.tokens,
            "tolerance": allowed,
        }
        if not error <= allowed:
            raise CheckFailed(
                f"the {self._what} of {self._loaded.name} through our kernels are {error:.3g} ({unit}) off "
                f"{detail['against']}, {allowed:.3g} is allowed; nothing was stored"
            )
        names = ["check_error", "logit_error"] if self.kind == "exact" else ["check_error"]
        return [MeasurementRow(name, error, unit, detail=detail) for name in names]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with self._hook.installed():
            yield

    def prepare(self) -> None:
        """A forward leaves nothing behind."""

    def step(self, listener: Listener | None = None) -> Tensor:
        return self._hook.forward(lambda: self._answer(self._arguments), listener)

    def loss(self, hidden: Tensor) -> Iterable[MeasurementRow]:
        """Measure the surprise of the target's tokens; after an approximation also how far the answer went."""
        ids = self._given.ids
        predicts = self._what == "logits" and ids is not None and len(ids) > 1
        if self.kind == "exact":
            if predicts and ids is not None:
                yield MeasurementRow("perplexity", perplexity(hidden, _same, ids), "perplexity")
            return
        exact = Hook(self._model, self.swap.exact)
        with exact.installed():
            reference = exact.forward(lambda: self._answer(self._arguments))
        detail = {"against": "multi_head on the same input", "tokens": self.tokens, "what": self._what}
        error = compare_hidden(hidden, reference, _same).absolute
        yield MeasurementRow("logit_error", error, "absolute", detail=detail)
        if self._what != "logits":
            return
        lost = compare_logits(hidden, reference, _same, ids)
        yield MeasurementRow("kl", lost.kl, "nats", detail=detail)
        if predicts:
            compared = detail | {"reference_perplexity": lost.reference_perplexity}
            yield MeasurementRow("perplexity", lost.perplexity, "perplexity", detail=compared)

    @property
    def _what(self) -> str:
        return (
            "logits"
            if self._model.get_output_embeddings() is not None or self._classifies
            else "hidden states"
        )

    @property
    def _classifies(self) -> bool:
        return self._given.ids is None and "ForImageClassification" in type(self._model).__name__

    def _answer(self, arguments: Mapping[str, Any]) -> Tensor:
        """The logits [T, vocabulary] or [1, classes] of batch element 0, or the final states [T, hidden]."""
        options = {"use_cache": False} if self._loaded.writes else {}
        output = self._model(**arguments, **options)
        answer = output.logits if self._what == "logits" else output.last_hidden_state
        return answer[0] if answer.dim() == 3 else answer[:1]

    def _repeated(self, value: Any) -> Any:
        return value.expand(self._batch_size, *value.shape[1:]) if isinstance(value, Tensor) else value


def _same(states: Tensor) -> Tensor:
    return states
