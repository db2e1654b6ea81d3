"""Lengths tried in processes of their own, each held to a stated memory, so that no trial endangers the machine.

``python -m attnlab.trials`` imports what a run needs and computes nothing. For every line that it reads it forks: the
fork is held to its memory, takes one step and says how it went. Forking is safe because no thread pool and no device
was touched before.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from .probes.frontier import FITS, Trial
from .spec import ExperimentSpec, RunPoint, parse_spec

START_SECONDS = 300.0
ANSWER_BYTES = 65_536


class Trials:
    """A waiting process that tries lengths of one point of the grid; use it in a ``with`` block."""

    def __init__(
        self, spec: ExperimentSpec, point: RunPoint, device: str, *, memory_bytes: int, seconds: float
    ) -> None:
        self._order = {
            "spec": spec.to_dict(),
            "device": device,
            "memory_bytes": memory_bytes,
            "seconds": seconds,
        }
        self._point = point
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Trials":
        # asking whether there is a device must not start a runtime that forks cannot use
        environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        command = [sys.executable, "-m", "attnlab.trials"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self._answer(START_SECONDS) != "ready":
            raise RuntimeError("the process for trials did not start; its log says why")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def attempt(self, tokens: int, *, name_kernels: bool = False) -> Trial:
        """Try one length; ``name_kernels`` does so under the profiler."""
        assert self._process is not None
        assert self._process.stdin is not None
        point = replace(self._point, sequence_length=tokens)
        order = {**self._order, "point": point.to_dict(), "name_kernels": name_kernels}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Trial(**json.loads(self._answer(self._seconds + START_SECONDS)))

    def _answer(self, seconds: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError("the process for trials ended; the log says why")
        return line.strip()


def main() -> None:
    """Import, say ``ready``, fork for every order from standard input."""
    import attnlab.subjects.load  # noqa: F401 - imported once, for all forks

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(_forked(json.loads(line)))), flush=True)


def _forked(order: Mapping[str, Any]) -> Trial:
    began = time.monotonic()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        os.dup2(2, 1)  # what libraries print belongs into the log, not among the answers
        os.write(tell, json.dumps(_tried(order)).encode()[:ANSWER_BYTES])
        os._exit(0)
    os.close(tell)
    ready, _, _ = select.select([told], [], [], order["seconds"])
    answer = os.read(told, ANSWER_BYTES) if ready else b""
    os.close(told)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    took = time.monotonic() - began
    tokens = order["point"]["sequence_length"]
    if not ready:
        return Trial(tokens, "timed_out", f"it took longer than {order['seconds']:g} s", None, took)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        # what cannot report a failed allocation as an error ends the process
        reason = f"the process {how} within {order['memory_bytes']} bytes"
        return Trial(tokens, "out_of_memory", reason, None, took)
    return Trial(tokens=tokens, seconds=took, **json.loads(answer))


def _tried(order: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from .outcomes import ending_of
    from .probes.memory import resident
    from .subjects.load import load_subject

    device = torch.device(order["device"])
    before = resident("VmRSS")
    named: dict[str, Any] = {}
    try:
        hold_to(order["memory_bytes"], device)
        spec, point = parse_spec(order["spec"]), RunPoint(**order["point"])
        torch.manual_seed(spec.seed)
        train = point.phase == "train"
        with torch.enable_grad() if train else torch.inference_mode():
            subject = load_subject(spec, point, device)
            with subject.ready():
                subject.prepare()
                if order["name_kernels"]:
                    named = _named(subject, device)
                else:
                    subject.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    except Exception as error:
        ending = ending_of(error)
        return {"outcome": ending.outcome, "reason": ending.reason, "peak_bytes": None}
    peak = resident("VmHWM") - before
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return {"outcome": FITS, "reason": "", "peak_bytes": peak, **named}


def _named(subject: Any, device: Any) -> dict[str, Any]:
    """The kernels of a step, then their implementations from a step that is listened to, which may hold more."""
    from attnlab_kernels.operations.softmax.provenance import provenance_of
    from attnlab_kernels.operations.triton_platform import noting_launches

    from .probes.timing import kernels_that_ran

    with noting_launches() as launched:
        kernels = kernels_that_ran(subject.step, device)
    heard: dict[str, None] = {}
    subject.prepare()
    subject.step(lambda call: heard.setdefault(call.implementation))
    return {
        "kernels": kernels,
        "implementations": list(heard),
        "provenance": provenance_of(heard, launched),
    }


def hold_to(memory_bytes: int, device: Any) -> None:
    """Let this process allocate so many bytes more than it has: on the device, or of private memory on a CPU."""
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        # a device without an index is the current one, which only its absence says here
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total), device.index)
        return
    from .probes.memory import resident

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = resident("VmData") + memory_bytes
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


if __name__ == "__main__":
    main()
