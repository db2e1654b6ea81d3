"""The steps of one run, in order: load, check, capture, measure, time, weigh."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.softmax.provenance import provenance_of
from attnlab_kernels.operations.triton_platform import noting_launches
from attnlab_storage.queue import Claim
from attnlab_storage.results import MeasurementRow

from .environment import describe_environment, name_device
from .estimate import BYTES, cache_formula
from .frontier_search import search
from .hook import LayerCall, Listener
from .models import TORCH_DTYPES, ModelError
from .probes.accuracy import attention_errors, over_budget
from .probes.adversarial import Proof, Rival, prove
from .probes.ceilings import ceilings_of
from .probes.compiling import watching_compilation
from .probes.input_class import input_class, inputs_ratio
from .probes.interleaved import interleaved
from .probes.kernel import KernelCall
from .probes.layout import layout_latency
from .probes.maps import LayerCapture, capture_call, finish
from .probes.memory import heap_kept, peak_memory, trim_heap
from .probes.peaks import peak_of
from .probes.reference import causal_reference
from .probes.statistics import statistics_of
from .probes.timing import kernels_that_ran, latency
from .probes.token_facts import token_facts
from .probes.windows import clock_of
from .recorder import Recorder, core_is_free
from .roofline import at_clock, stand
from .spec import RunPoint, parse_spec
from .step_calls import StepCalls
from .subjects import Caching, Stepping, Subject
from .subjects.load import load_subject
from .subjects.module import FP8_TOLERANCE


@dataclass
class _Found:
    """What the summary of a run is made of."""

    values: dict[str, Any] = field(default_factory=dict)
    implementations: Counter[str] = field(default_factory=Counter)
    heads: int = 0
    layers: int = 0

    def hear(self, call: LayerCall) -> None:
        self.implementations[call.implementation] += 1
        self.heads = max(self.heads, call.query.shape[1])
        self.layers = max(self.layers, call.layer + 1)

    def worst(self, name: str, value: float) -> None:
        self.values[name] = max(value, self.values.get(name, 0.0))


class Procedure:
    """One run: everything it learns goes to the recorder as soon as it is known."""

    def __init__(self, recorder: Recorder, claim: Claim, device: str | None) -> None:
        self._recorder = recorder
        self._spec = parse_spec(claim.spec)
        self._point = RunPoint(**claim.point)
        self._device = choose_device(self._point.gpus, device)
        self._found = _Found()
        self._middle: KernelCall | None = None
        self._reference: KernelCall | None = None
        self._mhz: float | None = None

    def perform(self) -> dict[str, Any]:
        """Do all steps; returns the summary that is kept with the run."""
        recorder, record = self._recorder, set(self._spec.record)
        if self._spec.frontier is not None:
            recorder.environment(describe_environment(self._device.type) | {"seed": self._spec.seed})
            return search(recorder, self._spec, self._point, self._device)
        with watching_compilation(triton=self._device.type == "cuda") as compiled:
            summary = self._perform(recorder, record)
        return summary | {"compilation": compiled}

    def _perform(self, recorder: Recorder, record: set[str]) -> dict[str, Any]:
        torch.manual_seed(self._spec.seed)
        if self._spec.phase == "serving":
            from .serving.procedure import ServingProcedure

            return ServingProcedure(recorder, self._spec, self._point, self._device).perform()
        recorder.phase("loading model")
        subject = self._load()
        recorder.environment(self._environment(subject))
        recorder.input(subject.input_row())
        with torch.enable_grad() if self._point.phase == "train" else torch.inference_mode():
            recorder.phase("checking")
            self._check(subject)
            trim_heap()
            with subject.ready():
                if "maps" in record:
                    self._capture(subject)
                if record & {"accuracy", "statistics"}:
                    self._measure(subject)
                if "timing" in record and "speed_withheld" not in self._found.values:
                    self._time(subject)
                if "attention_latency_ms" in self._found.values:
                    self._stand(subject)
                if "memory" in record:
                    self._weigh(subject)
                if "kernels" not in self._found.values:
                    self._name_kernels(subject)
        return self._summary(subject)

    def _load(self) -> Subject:
        began = time.perf_counter()
        subject = load_subject(self._spec, self._point, self._device)
        self._recorder.log(
            f"loaded {subject.identity['name']} ({subject.identity['parameters']:,} parameters, "
            f"{self._point.dtype} on {self._device}) in {time.perf_counter() - began:.1f} s; {subject.tokens} tokens"
        )
        return subject

    def _environment(self, subject: Subject) -> dict[str, Any]:
        described = describe_environment(self._device.type)
        if "timing" in self._spec.record:
            described["ceilings"] = ceilings_of(self._device, TORCH_DTYPES[self._point.dtype])
        return described | {"model": subject.identity, "seed": self._spec.seed}

    def _check(self, subject: Subject) -> None:
        rows = subject.check()
        self._recorder.measurements(rows)
        for row in rows[:1]:
            detail = row.detail or {}
            self._recorder.log(
                f"check: {row.value:.2g} ({row.unit}) off {detail['against']} on {detail['tokens']} tokens"
            )

    def _capture(self, subject: Subject) -> None:
        """Store Q and K of each layer in the forward that makes them, then make and publish the traces."""
        wanted = self._wanted(subject)
        captured: list[LayerCapture] = []
        began = time.perf_counter()
        beside = core_is_free(self._device)
        with heap_kept(), self._recorder.writer(len(wanted), beside=beside) as writer:

            def capture(call: LayerCall) -> None:
                if self._keeps(call):
                    made = described(capture_call(call), subject.trace_detail(call))
                    captured.append(made.released())
                    writer.put(made)

            self._recorder.phase("capturing", 0, len(wanted))
            self._hear(subject, capture)
        took = time.perf_counter() - began
        self._recorder.settle()
        if missing := sorted(set(wanted) - {made.row.layer for made in captured}):
            last = self._found.layers - 1
            raise ModelError(f"layers: must be from 0 to {last}, there is no attention {missing[0]}")
        self._found.values["capture_ms"] = took * 1e3
        self._recorder.log(f"captured {len(captured)} layers in {took:.2f} s")
        self._publish(captured)

    def _publish(self, captured: list[LayerCapture]) -> None:
        for done, made in enumerate(captured):
            self._recorder.phase("refining", done, len(captured))
            layer = made.row.layer
            row, normalisers = finish(
                made, lambda name, heads, at=layer: self._recorder.stored(name, at, heads), self._device
            )
            self._recorder.trace(row, *normalisers)
            self._found.worst("row_sum_defect", row.row_sum_defect)
            self._found.worst("output_defect", row.output_defect)
            self._found.worst("lse_defect", (row.detail or {})["lse_defect"])

    def _measure(self, subject: Subject) -> None:
        """Measure accuracy and statistics in one forward of their own."""
        record = set(self._spec.record)
        compared = {0, subject.layers // 2, subject.layers - 1}
        given = subject.input_row()
        rows: list[MeasurementRow] = []
        at_once = "statistics" in record and not self._walks(subject)

        def measure(call: LayerCall) -> None:
            self._recorder.phase("measuring", call.layer, max(subject.layers, call.layer))
            if "accuracy" in record and call.layer in compared:
                rows.extend(attention_errors(call))
            if at_once:
                describe(call)

        def describe(call: LayerCall) -> None:
            if self._keeps(call):
                facts = token_facts(given, call.query.shape[2], call.key.shape[2])
                found = statistics_of(call, facts)
                rows.extend(found.rows)
                self._recorder.curves(call.layer, found.curves)

        subject.prepare()
        hidden = subject.step(self._listening(measure))
        if "statistics" in record and not at_once:
            self._hear(subject, describe)
        if "accuracy" in record:
            self._recorder.phase("comparing logits")
            rows.extend(subject.loss(hidden.detach()))
        self._recorder.measurements(rows)
        # eight bits are less exact by design: the check against the reference has its own tolerance for them
        if not self._point.parameters.get("use_fp8") and (reason := over_budget(rows)):
            self._found.values["speed_withheld"] = reason
            self._recorder.log(reason)

    def _time(self, subject: Subject) -> None:
        def progress(done: int) -> None:
            self._recorder.phase("timing", done, self._spec.repeats)

        self._recorder.phase("timing", 0, self._spec.repeats)
        middle = self._middle_call(subject)
        ratio = self._timed_in_turn(middle)
        whole = latency(
            "latency",
            subject.step,
            self._spec.repeats,
            self._device,
            prepare=subject.prepare,
            progress=progress,
        )
        kernel = latency(
            "attention_latency", middle.run, self._spec.repeats, self._device, cold=True, copies=middle
        )
        layout = layout_latency(middle, self._spec.repeats, self._device)
        task = middle.task | {"device": name_device(self._device)}
        proof = self._prove(middle, task, kernel, ratio)
        if not proof.stands:
            self._found.values["speed_withheld"] = proof.words
            return
        inputs = inputs_ratio(middle, self._spec, self._device)
        kernels = self._name_kernels(subject)
        detail = {"layer": middle.layer, "implementation": middle.implementation, "kernels": kernels}
        detail |= {"task": task, "proof": proof.words, "inputs": input_class(self._spec, middle.layer)}
        rows = [whole, with_detail(kernel, detail)]
        rows += [row for row in (layout, ratio, inputs) if row is not None]
        if (captured := self._found.values.get("capture_ms")) is not None:
            compared = {"captured_ms": captured, "plain_ms": whole.value}
            rows.append(MeasurementRow("capture_overhead", captured / whole.value, "ratio", detail=compared))
        self._recorder.measurements(rows)  # all at once: what is refused leaves no time behind
        self._found.values |= {
            "latency_ms": whole.value,
            "attention_latency_ms": kernel.value,
        }
        self._mhz = clock_of((kernel.detail or {})["conditions"])
        self._recorder.log(f"latency {whole.value:.2f} ms, attention {kernel.value:.3f} ms")

    def _timed_in_turn(self, middle: KernelCall) -> MeasurementRow | None:
        """The attention's time over plain causal SDPA's, pair by pair; None where the spec names no reference."""
        if (reference := self._reference) is None:
            return None
        self._recorder.phase("timing in turn")
        row = interleaved(
            "reference_ratio",
            middle.run,
            reference.run,
            self._spec.repeats,
            self._device,
            copies=(middle, reference),
        )
        self._recorder.log(f"attention takes {row.value:.3f} x the time of plain causal SDPA")
        return with_detail(row, {"reference": reference.implementation})

    def _prove(
        self, middle: KernelCall, task: dict[str, Any], kernel: MeasurementRow, ratio: MeasurementRow | None
    ) -> Proof:
        """What is much faster than the best known of its operation has to show that it computes it."""
        rivals = [] if ratio is None else [Rival(ratio.value, "plain causal SDPA in turn")]
        if (best := self._recorder.best_known(task, self._point)) is not None:
            rivals.append(Rival(kernel.value / best.value, f"run {best.run_id}, {best.value:.4g} ms"))
        self._recorder.phase("proving")
        slack = FP8_TOLERANCE if self._point.parameters.get("use_fp8") else 0.0
        proof = prove(middle, rivals, slack=slack)
        self._recorder.log(proof.words)
        return proof

    def _name_kernels(self, subject: Subject) -> list[str]:
        """Profile the attention once, whatever else is recorded: a fallback must not hide."""
        middle = self._middle_call(subject)
        with noting_launches() as launched:
            kernels = kernels_that_ran(middle.run, self._device)
        self._found.values["kernels"] = kernels
        self._found.values["provenance"] = provenance_of([middle.implementation], launched)
        self._recorder.log(f"kernels that ran: {', '.join(kernels)}")
        return kernels

    def _stand(self, subject: Subject) -> None:
        """Set the attention's time beside the device's ceilings."""
        work = self._middle_call(subject).work
        if work is None:
            self._recorder.log(
                "roofline: pixels are hidden from everyone, so there is no count of operations"
            )
            return
        dtype = TORCH_DTYPES[self._point.dtype]
        facts = {"flops": work.flops, "bytes": work.bytes, "pairs": work.pairs, "factor": work.factor}
        seconds = self._found.values["attention_latency_ms"] / 1e3
        ceilings = ceilings_of(self._device, dtype)
        found = stand(work.flops, work.bytes, seconds, ceilings)
        if found["share"] > 1:  # the machine may have been busy when its ceilings were measured
            ceilings = ceilings_of(self._device, dtype, again=True)
            found = stand(work.flops, work.bytes, seconds, ceilings)
        detail = facts | found | {"counted": work.counted, "ceilings": ceilings}
        peak = peak_of(self._device, dtype, self._mhz)
        detail["at_clock"] = at_clock(found, ceilings, self._mhz, peak)
        self._recorder.measurements([MeasurementRow("roofline", found["share"], "fraction", detail=detail)])

    def _weigh(self, subject: Subject) -> None:
        self._recorder.phase("measuring memory")
        middle = self._middle_call(subject)
        floor = middle.floor_bytes
        cache = self._cache(subject)
        held = {"weights": int(subject.identity["parameters"]) * BYTES[self._point.dtype]}
        held |= {"kv_cache": int(sum(row.value for row in cache))}
        whole, timeline, snapshot = peak_memory(
            "peak_memory", subject.step, self._device, floor=floor, held=held, prepare=subject.prepare
        )
        kernel, kernel_timeline, _ = peak_memory(
            "attention_peak_memory", middle.run, self._device, floor=floor
        )
        rows = [whole, with_detail(kernel, {"layer": middle.layer}), *cache]
        rows.append(MeasurementRow("memory_timeline", whole.value, "bytes", detail=timeline))
        rows.append(
            MeasurementRow("attention_memory_timeline", kernel.value, "bytes", detail=kernel_timeline)
        )
        if snapshot is not None:
            rows.append(MeasurementRow("memory_snapshot", whole.value, "bytes", detail=snapshot))
        self._recorder.measurements(rows)
        self._found.values["peak_memory_bytes"] = int(whole.value)
        self._recorder.log(f"peak memory {whole.value / 1e6:.1f} MB, attention {kernel.value / 1e6:.1f} MB")

    def _cache(self, subject: Subject) -> list[MeasurementRow]:
        """Bytes of the cache that a decoding step starts from, where the subject keeps one that can be weighed."""
        if self._point.phase != "decode" or not isinstance(subject, Caching):
            return []
        expected = cache_formula(self._spec, self._point, subject.tokens - 1)
        return [MeasurementRow("cache_bytes", float(subject.cache_bytes()), "bytes", detail=expected)]

    def _hear(self, subject: Subject, listener: Listener) -> None:
        """Let the listener hear each attention that has a map: of decoding steps one, over all of them."""
        if self._walks(subject):
            assert isinstance(subject, Stepping)
            gathered = StepCalls(subject.steps)
            subject.walk(self._listening(gathered.hear))
            for call in gathered.calls():
                listener(call)
        else:
            subject.prepare()
            subject.step(self._listening(listener))

    def _walks(self, subject: Subject) -> bool:
        return isinstance(subject, Stepping) and subject.steps > 1

    def _wanted(self, subject: Subject) -> list[int]:
        layers = self._spec.layers
        return list(range(subject.layers)) if isinstance(layers, str) else list(layers)

    def _keeps(self, call: LayerCall) -> bool:
        return isinstance(self._spec.layers, str) or call.layer in self._spec.layers

    def _listening(self, listener: Listener) -> Listener:
        def hear(call: LayerCall) -> None:
            self._found.hear(call)
            listener(call)

        return hear

    def _middle_call(self, subject: Subject) -> KernelCall:
        """The attention of a middle layer on its real Q, K and V, to be repeated alone."""
        if self._middle is None:
            place = subject.layers // 2

            def keep(call: LayerCall) -> None:
                if call.layer == place:
                    backward = self._point.phase == "train"
                    self._middle = KernelCall.of(call, backward)
                    self._reference = causal_reference(call, backward) if self._spec.reference else None

            subject.prepare()
            subject.step(self._listening(keep))
        if self._middle is None:
            raise Unsupported(f"model: computes no attention {subject.layers // 2}")
        return self._middle

    def _summary(self, subject: Subject) -> dict[str, Any]:
        chosen = ", ".join(name for name, _ in self._found.implementations.most_common())
        return self._found.values | {
            "implementation": chosen,
            "swap": subject.kind,
            "layers": self._found.layers,
            "heads": self._found.heads,
            "tokens": subject.tokens,
            "device": str(self._device),
        }


def choose_device(gpus: int, device: str | None) -> torch.device:
    """Return where to run: what was asked for, else CUDA for runs that asked for GPUs, else the CPU.

    Raises:
        Unsupported: GPUs are needed and this process sees none.
    """
    if device is not None:
        return torch.device(device)
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Unsupported(f"resources.gpus: {gpus} asked for, and this process sees no CUDA device")
    return torch.device("cuda")


def described(capture: LayerCapture, detail: dict[str, Any]) -> LayerCapture:
    row = replace(capture.row, detail=(capture.row.detail or {}) | detail)
    return replace(capture, row=row)


def with_detail(row: MeasurementRow, more: dict[str, Any]) -> MeasurementRow:
    return replace(row, detail=(row.detail or {}) | more)
