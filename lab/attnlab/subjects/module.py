"""A bare attention module with random weights on random hidden states."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnlab_kernels.mechanisms.build import build_mechanism
from attnlab_kernels.operations.softmax.api import AttendCall, Unsupported, attend, observing
from attnlab_storage.results import InputRow, MeasurementRow

from ..hook import LayerCall, Listener
from ..models import TORCH_DTYPES
from ..outcomes import CheckFailed
from ..spec import ExperimentSpec, ModuleSpec, RunPoint

CHECKED_TOKENS = 256
RELATIVE_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


class ModuleSubject:
    """One mechanism as a module (see subjects.Subject)."""

    def __init__(self, spec: ExperimentSpec, point: RunPoint, device: torch.device) -> None:
        assert spec.module is not None
        shape = {"dim": spec.module.dim, "num_heads": spec.module.num_heads, "causal": spec.module.causal}
        torch.manual_seed(spec.seed)
        module = build_mechanism(point.mechanism, **shape, **_parameters(spec.module, point))
        self._module = module.to(device, TORCH_DTYPES[point.dtype]).train(point.phase == "train")
        hidden = torch.randn(point.batch_size, point.sequence_length, spec.module.dim)
        self._hidden = hidden.to(device, TORCH_DTYPES[point.dtype])
        self._phase = point.phase
        self._dtype = point.dtype
        self._implementation = point.implementation
        self._filled: Any = None
        self._cache: Any = None
        if point.phase == "decode" and point.sequence_length < 2:
            raise Unsupported("phase: decode needs at least 2 tokens, one to cache and one to decode")
        self.device = device
        self.layers = 1
        self.kind = "none"
        self.tokens = point.sequence_length
        self.identity = {
            "name": point.model,
            "architecture": type(module).__name__,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "dtype": point.dtype,
            "source": "random weights",
            "seed": spec.seed,
        }

    def input_row(self) -> InputRow:
        names = [str(position) for position in range(self.tokens)]
        queries = names[-1:] if self._phase == "decode" else names
        detail = {"batch_size": self._hidden.shape[0], "synthetic": "normal hidden states"}
        return InputRow(None, queries, names, detail)

    def trace_detail(self, call: LayerCall) -> dict[str, Any]:
        return {}

    def check(self) -> list[MeasurementRow]:
        """Compare the attention inside the module with the eager reference on the same Q, K and V of a prefix."""
        hidden = self._hidden[:1, :CHECKED_TOKENS]
        calls: list[AttendCall] = []
        with torch.no_grad(), observing(calls.append):
            self._run(hidden, self._implementation)
        squares = norm = 0.0
        with torch.no_grad():
            for call in calls:
                kept = {"mask": call.mask, "scale": call.scale, "bias": call.bias}
                theirs = attend(call.q, call.k, call.v, implementation="eager", **kept).output.double()
                squares += float((call.output.double() - theirs).square().sum())
                norm += float(theirs.square().sum())
        error = math.sqrt(squares / max(norm, 1e-60))
        allowed = RELATIVE_TOLERANCE[self._dtype]
        detail = {
            "against": "the eager reference on the same Q, K and V",
            "tokens": hidden.shape[1],
            "tolerance": allowed,
        }
        if not error <= allowed:
            raise CheckFailed(
                f"the module's attention is {error:.3g} (relative) off the eager reference on {hidden.shape[1]} "
                f"tokens, {allowed:.3g} is allowed; nothing was stored"
            )
        return [MeasurementRow("check_error", error, "relative", detail=detail)]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        if self._phase == "decode":
            before = self._hidden[:, :-1]
            filled = self._module(
                before, use_cache=True, return_dict=True, implementation=self._implementation
            )
            self._filled = filled.cache
        yield
        self._filled = self._cache = None

    def prepare(self) -> None:
        # a step adds its token to the cache, so each one gets a copy
        if self._filled is not None:
            self._cache = self._filled.clone()

    def step(self, listener: Listener | None = None) -> Tensor:
        told = _Listening(listener)
        with observing(told) if listener is not None else contextlib.nullcontext():
            if self._phase == "decode":
                output = self._run(
                    self._hidden[:, -1:], self._implementation, past_key_value=self._cache, use_cache=True
                )
            else:
                output = self._run(self._hidden, self._implementation)
        if self._phase == "train":
            output.float().square().mean().backward()
            self._module.zero_grad(set_to_none=True)
        return output[0]

    def loss(self, hidden: Tensor) -> Iterable[MeasurementRow]:
        return ()

    def _run(self, hidden: Tensor, implementation: str, **keywords: Any) -> Tensor:
        return self._module(hidden, return_dict=True, implementation=implementation, **keywords).output


class _Listening:
    """Turns what attend tells its observers into the calls that probes hear of."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self._calls = 0

    def __call__(self, call: AttendCall) -> None:
        assert self._listener is not None
        layer, self._calls = self._calls, self._calls + 1
        tensors = [tensor.detach() for tensor in (call.q, call.k, call.v, call.output, call.lse)]
        query, key, value, output, lse = tensors
        name = "attention" if layer == 0 else f"attention#{layer + 1}"
        self._listener(
            LayerCall(
                layer, name, query, key, value, call.mask, call.scale, output, lse, call.implementation, ""
            )
        )


def _parameters(module: ModuleSpec, point: RunPoint) -> dict[str, Any]:
    parameters = dict(point.parameters)
    if "num_kv_heads" in parameters and parameters["num_kv_heads"] is None:
        parameters["num_kv_heads"] = module.num_kv_heads
    return parameters
