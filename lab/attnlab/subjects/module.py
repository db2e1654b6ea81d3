"""A bare attention module with random weights on random hidden states."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.attention_call import AttentionCall, hearing
from attnlab_kernels.mechanisms.build import build_mechanism
from attnlab_kernels.mechanisms.switch_head import SwitchHeadAttention
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage.results import InputRow, MeasurementRow

from ..hook import LayerCall, Listener
from ..models import TORCH_DTYPES
from ..outcomes import CheckFailed
from ..spec import ExperimentSpec, RunPoint
from ..spec_sections import ModuleSpec
from .module_call import (
    ModuleCall,
    count_parameters,
    make_context,
    prompt_is_causal,
    release,
)

CHECKED_TOKENS = 256
RELATIVE_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
FP8_TOLERANCE = 0.1
"""three bits of fraction in queries, keys, values and probabilities"""


class ModuleSubject:
    """One mechanism as a module (see subjects.Subject)."""

    def __init__(self, spec: ExperimentSpec, point: RunPoint, device: torch.device) -> None:
        assert spec.module is not None
        dim, parameters = spec.module.dim, _parameters(spec.module, point)
        dtype = TORCH_DTYPES[point.dtype]
        causal = prompt_is_causal(point.mechanism, parameters, spec.module.causal)
        shape = {"dim": dim, "num_heads": spec.module.num_heads, "causal": causal}
        torch.manual_seed(spec.seed)
        module = build_mechanism(point.mechanism, **shape, **parameters)
        module = module.to(device, dtype).train(point.phase == "train")
        hidden = torch.randn(point.batch_size, point.sequence_length, dim)
        self._hidden = hidden.to(device, dtype)
        self._call = ModuleCall(
            point.mechanism, module, parameters, point.implementation, point.phase == "train"
        )
        if point.mechanism == "cross":
            context = make_context(parameters, dim, point.batch_size, point.sequence_length)
            self._call.context = context.to(device, dtype)
        self._phase = point.phase
        self._mapped = bool({"maps", "accuracy", "statistics"} & set(spec.record))
        self._dtype = point.dtype
        self._eight_bits = bool(parameters.get("use_fp8"))
        self._filled: Any = None
        self._cache: Any = None
        self._held = 0
        self.steps = spec.decoded
        if point.sequence_length <= self.steps:
            raise Unsupported(
                f"phase: decode needs at least {self.steps + 1} tokens, one to cache and {self.steps} to decode"
            )
        self.device = device
        self.layers = 1
        self.kind = "none"
        self.tokens = point.sequence_length
        self.identity = {
            "name": point.model,
            "architecture": type(module).__name__,
            "parameters": count_parameters(module),
            "dtype": point.dtype,
            "source": "random weights",
            "seed": spec.seed,
            "causal": causal,
        }

    def input_row(self) -> InputRow:
        names = [str(position) for position in range(self.tokens)]
        context = self._call.context
        keys = names if context is None else [f"context {place}" for place in range(context.shape[1])]
        queries = names[-self.steps :]  # of no steps all
        detail = {"batch_size": self._hidden.shape[0], "synthetic": "normal hidden states"}
        return InputRow(None, queries, keys, detail)

    def trace_detail(self, call: LayerCall) -> dict[str, Any]:
        return {}

    def check(self) -> list[MeasurementRow]:
        """Compare the attention inside the module with its operation's plain reference on the same inputs.

        Where there is more to a mechanism than its attention (experts), also the module's output with the formula.
        Without a grid or a context to keep, on a prefix of one batch element.
        """
        hidden = self._hidden[:1, :CHECKED_TOKENS]
        whole = {"cross", "neighborhood", "efficient"}
        if self._call.mechanism in whole:
            hidden = self._hidden
        calls: list[AttentionCall] = []
        squares = norm = 0.0
        with torch.no_grad():
            with hearing(calls.append):
                made = self._call.run(hidden).output
            self._call.close()
            pairs = [(call.output, call.reference(*call.operands)) for call in calls]
            if isinstance(self._call.module, SwitchHeadAttention):
                pairs.append((made, self._call.module.dense_output(hidden)))
            for ours, theirs in pairs:
                squares += float((ours.double() - theirs.double()).square().sum())
                norm += float(theirs.double().square().sum())
        error = math.sqrt(squares / max(norm, 1e-60))
        allowed = FP8_TOLERANCE if self._eight_bits else RELATIVE_TOLERANCE[self._dtype]
        detail = {
            "against": f"the plain reference of {self._call.mechanism} on the same inputs",
            "tokens": hidden.shape[1],
            "tolerance": allowed,
        }
        if not calls:
            raise CheckFailed(f"{self._call.mechanism} told of no attention, so nothing can be checked")
        if not error <= allowed:
            raise CheckFailed(
                f"the module's attention is {error:.3g} (relative) off its plain reference on {hidden.shape[1]} "
                f"tokens, {allowed:.3g} is allowed; nothing was stored"
            )
        return [MeasurementRow("check_error", error, "relative", detail=detail)]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        if self._phase == "decode":
            self._filled = self._call.fill(self._hidden[:, :-1], mapped=self._mapped)
            # before any step: copies of a paged cache share its pool, and would be counted in
            self._held = int(self._filled.nbytes())
        try:
            yield
        finally:
            release(self._cache)
            release(self._filled)
            self._filled = self._cache = None
            self._call.close()

    def cache_bytes(self) -> int:
        return self._held

    def prepare(self) -> None:
        # a step adds its token to the cache, so each one gets a copy
        if self._filled is not None:
            release(self._cache)
            self._cache = self._filled.clone()

    def walk(self, listener: Listener) -> None:
        cache = self._call.fill(self._hidden[:, : -self.steps], mapped=True)
        try:
            for place in range(self.tokens - self.steps, self.tokens):
                with hearing(_Listening(listener)):
                    self._call.decode(self._hidden[:, place : place + 1], cache)
        finally:
            release(cache)

    def step(self, listener: Listener | None = None) -> Tensor:
        told = _Listening(listener)
        with hearing(told) if listener is not None else contextlib.nullcontext():
            if self._phase == "decode":
                output = self._call.decode(self._hidden[:, -1:], self._cache).output
            else:
                output = self._call.run(self._hidden).output
        if self._phase == "train":
            output.float().square().mean().backward()
            self._call.module.zero_grad(set_to_none=True)
        return output[0]

    def loss(self, hidden: Tensor) -> Iterable[MeasurementRow]:
        return ()


class _Listening:
    """Turns what a mechanism announces into the calls that probes hear of."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self._calls = 0

    def __call__(self, call: AttentionCall) -> None:
        assert self._listener is not None
        layer, self._calls = self._calls, self._calls + 1
        name = "attention" if layer == 0 else f"attention#{layer + 1}"
        self._listener(LayerCall.told(layer, name, call))


def _parameters(module: ModuleSpec, point: RunPoint) -> dict[str, Any]:
    parameters = dict(point.parameters)
    if "num_kv_heads" in parameters and parameters["num_kv_heads"] is None:
        parameters["num_kv_heads"] = module.num_kv_heads
    return parameters
