"""The steps of a serving run: load, serve some requests unmeasured, serve the workload a few times, judge."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from attnlab_kernels.operations.softmax.provenance import provenance_of
from attnlab_kernels.operations.triton_platform import Launch, noting_launches
from attnlab_storage.results import InputRow, MeasurementRow

from ..environment import describe_environment
from ..models import TORCH_DTYPES, ModelError, shared_model
from ..probes.memory import trim_heap
from ..probes.timing import kernels_that_ran
from ..recorder import Recorder
from ..spec import ExperimentSpec, RunPoint
from ..subjects.module_call import count_parameters
from .bare import BareRunner
from .engine import CacheShape, cut_cache, serve
from .language import ModelRunner
from .metrics import measure, middle_pass, series
from .settings import ServingSpec
from .timeline import Timeline
from .workload import draw_requests

WARMED = 2
"""requests that are served before anything is measured"""
CHECKED = 3
"""requests that are answered once more, alone: those that take the fewest tokens"""
RANDOM_SOURCE = 4096


class ServingProcedure:
    """One run of phase serving; everything it learns goes to the recorder."""

    def __init__(
        self, recorder: Recorder, spec: ExperimentSpec, point: RunPoint, device: torch.device
    ) -> None:
        assert spec.serving is not None
        self._recorder, self._spec, self._point, self._device = recorder, spec, point, device
        self._serving: ServingSpec = spec.serving
        self._requests = draw_requests(self._serving.workload, spec.seed)
        self._kernels: list[str] = []
        self._launches: list[Launch] = []

    def perform(self) -> dict[str, Any]:
        """Do all steps; returns the summary that is kept with the run."""
        recorder = self._recorder
        recorder.phase("loading model")
        runner = self._load()
        recorder.environment(self._environment(runner))
        recorder.input(self._input())
        kind = str(self._point.parameters["cache"])
        shape = cut_cache(self._serving, kind, self._longest(), runner.token_bytes)
        recorder.log(
            f"{len(self._requests)} requests; {kind} cache of {shape.num_blocks} x {shape.block_size} tokens, "
            f"{shape.token_bytes:,} bytes each"
        )
        trim_heap()
        with runner.ready() if isinstance(runner, ModelRunner) else contextlib.nullcontext():
            passes = self._passes(runner, shape)
            self._name_kernels(runner)
        rows = measure(passes)
        if "accuracy" in self._spec.record:
            recorder.phase("checking")
            rows.append(self._check(runner))
        rows.append(
            MeasurementRow("cache_bytes", float(shape.nbytes), "bytes", detail={"total_tokens": shape.tokens})
        )
        recorder.measurements(rows)
        recorder.series(series(middle_pass(passes)))
        return self._summary(runner, {row.name: row.value for row in rows})

    def _load(self) -> BareRunner | ModelRunner:
        parameters = {name: value for name, value in self._point.parameters.items() if name != "cache"}
        shared, module = self._serving.workload.shared_prefix, self._spec.module
        common = {
            "seed": self._spec.seed,
            "shared_prefix": shared,
            "implementation": self._point.implementation,
        }
        if module is None:
            loaded = shared_model(self._point.model, self._point.dtype, str(self._device))
            text = self._spec.input.text
            if text is not None:
                source = list(loaded.encode(text, self._spec.input.max_tokens).ids)
            else:
                generator = torch.Generator().manual_seed(self._spec.seed)
                source = torch.randint(loaded.vocabulary, (RANDOM_SOURCE,), generator=generator).tolist()
            if loaded.context is not None and self._longest() > loaded.context:
                rule = (
                    f"serving.workload: a request must have at most {loaded.context} tokens, the context of"
                )
                raise ModelError(f"{rule} {loaded.name}; the longest has {self._longest()}")
            return ModelRunner(loaded, self._point.mechanism, parameters, source, **common)
        if parameters.get("num_kv_heads", 0) is None:
            parameters["num_kv_heads"] = module.num_kv_heads
        return BareRunner(
            self._point.mechanism,
            parameters,
            dim=module.dim,
            num_heads=module.num_heads,
            layers=self._serving.layers,
            dtype=TORCH_DTYPES[self._point.dtype],
            device=self._device,
            keep_outputs="accuracy" in self._spec.record,
            **common,
        )

    def _environment(self, runner: BareRunner | ModelRunner) -> dict[str, Any]:
        if isinstance(runner, ModelRunner):
            identity = runner.loaded.identity
        else:
            identity = {
                "name": self._point.model,
                "architecture": f"{len(runner.modules)} x {type(runner.modules[0]).__name__}",
                "parameters": sum(count_parameters(module) for module in runner.modules),
                "dtype": self._point.dtype,
                "source": "random weights",
                "seed": self._spec.seed,
            }
        return describe_environment(self._device.type) | {"model": identity, "seed": self._spec.seed}

    def _input(self) -> InputRow:
        detail = {
            "requests": len(self._requests),
            "prompt_tokens": sum(request.prompt_tokens for request in self._requests),
            "output_tokens": sum(request.output_tokens for request in self._requests),
        }
        return InputRow(self._spec.input.text, [], [], detail)

    def _passes(self, runner: BareRunner | ModelRunner, shape: CacheShape) -> list[Timeline]:
        self._recorder.phase("warming up")
        serve(self._requests[:WARMED], runner, shape, self._serving)
        passes = []
        for index in range(self._spec.repeats):
            name = f"serving, pass {index + 1} of {self._spec.repeats}"
            began = time.perf_counter()

            def progress(done: int, total: int, name: str = name) -> None:
                self._recorder.phase(name, done, total)

            made = serve(self._requests, runner, shape, self._serving, progress=progress)
            passes.append(made)
            written = sum(request.output_tokens for request in self._requests)
            # what a run that is cancelled later leaves of its passes
            self._recorder.log(
                f"pass {index + 1}: {len(made.steps)} steps, {made.seconds:.2f} s "
                f"({time.perf_counter() - began:.2f} s with the books), {written / made.seconds:,.0f} output tokens/s"
            )
        return passes

    def _name_kernels(self, runner: BareRunner | ModelRunner) -> None:
        """Profile the last attention of each kind of step, in a middle layer."""
        found: dict[str, None] = {}
        for kind, attention in runner.latest_attention().items():
            with torch.inference_mode(), noting_launches() as launched:
                names = kernels_that_ran(attention, self._device)
            self._launches += [one for one in launched if one not in self._launches]
            found |= dict.fromkeys(names)
            self._recorder.log(f"kernels that ran, {kind}: {', '.join(names)}")
        self._kernels = list(found)

    def _check(self, runner: BareRunner | ModelRunner) -> MeasurementRow:
        """Whether the shortest requests come out as they do alone."""
        chosen = sorted(self._requests, key=lambda request: (request.tokens, request.id))[:CHECKED]
        if isinstance(runner, ModelRunner):
            answers = dict(runner.answers)
            equal = [answers[request.id] == runner.alone(request) for request in chosen]
            detail: dict[str, Any] = {
                "requests": len(chosen),
                "against": "greedy generation of each request alone",
            }
            return MeasurementRow("answers_equal", sum(equal) / len(equal), "share", detail=detail)
        worst = 0.0
        for request in chosen:
            wanted, kept = runner.alone(request), runner.outputs[request.id]
            kept = torch.where(kept.isnan(), wanted, kept) if self._serving.prefix_sharing else kept
            worst = max(worst, float((kept - wanted).norm() / wanted.norm()))
        detail = {"requests": len(chosen), "against": "each request alone, in one pass"}
        return MeasurementRow("check_error", worst, "relative", detail=detail)

    def _longest(self) -> int:
        return max(request.tokens for request in self._requests)

    def _summary(self, runner: BareRunner | ModelRunner, values: dict[str, float]) -> dict[str, Any]:
        kept = ("output_tokens_per_second", "time_to_first_token", "inter_token_latency", "preemptions")
        return {name: values[name] for name in kept if name in values} | {
            "implementation": runner.implementation,
            "kernels": self._kernels,
            "provenance": provenance_of(runner.implementation.split(", "), self._launches),
            "layers": runner.layers,
            "heads": runner.heads,
            "swap": "none" if isinstance(runner, BareRunner) else self._swap_kind(runner),
            "device": str(self._device),
            "tokens": sum(request.tokens for request in self._requests),
        }

    def _swap_kind(self, runner: ModelRunner) -> str:
        return runner.kind(self._longest())
