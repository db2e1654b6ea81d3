"""Every implementation of every operation against what a user would reach for, as ratios within one run.

    PYTHONPATH=kernels python benchmarks/operations.py --out operations.json

The same command is the CPU set and, where torch sees a CUDA device, the GPU set; ``operation_cases.py`` has the cases.
All calls of a case run in turn, a sample of each after the other in an order that is drawn anew each time, so that
clocks and neighbours hit them alike. The measure is the best of what a user would reach for; SDPA's answer is what is
right. A call that is further from it than the inputs' dtype allows shows no time. On a CPU the processor time stands
beside the wall time; with ``--threads 1`` it is what the bar judges, for it is the same where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from operation_cases import Call, Case, cases
from softmax_attention import environment, flush_cache
from torch import Tensor

from attnlab_kernels.operations.softmax.api import Unsupported

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Row:
    """One implementation of one case; ratios are of its medians over those of the best baseline."""

    case: str
    implementation: str
    ours: bool
    limit: float | None = None
    """of the judged ratio, for what ``auto`` runs"""
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    processor_samples_ms: list[float] = field(default_factory=list)
    """empty on CUDA"""
    median_ms: float | None = None
    ratio: float | None = None
    processor_ratio: float | None = None
    judged: float | None = None
    """the ratio that the bar is for: of processor times where there is one thread, else of wall times"""

    @property
    def above(self) -> bool:
        """Whether it misses its bar."""
        return self.limit is not None and (self.judged is None or self.judged > self.limit)


def main() -> int:
    options = read_options()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device here")
        return 0
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for case in cases(options, device):
        if options.auto:
            case.ours = {"auto": case.ours["auto"]}
        rows += measure(case, options.repeats, device)
    summarise(rows)
    document = {
        "command": " ".join(sys.argv),
        "environment": environment(device),
        "rows": [asdict(row) for row in rows],
    }
    if options.out:
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {options.out}", file=sys.stderr)
    return 1 if any(row.status in ("incorrect", "error") for row in rows) else 0


def read_options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    lengths = [4096, 16_384] if on_gpu else [512, 1024, 4096]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help="multiples of 64")
    parser.add_argument("--heads", type=int, default=16 if on_gpu else 8)
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--repeats", type=int, default=30 if on_gpu else 7)
    parser.add_argument("--threads", type=int, help="of torch on a CPU; by default torch's own choice")
    parser.add_argument("--cases", nargs="+", help="only cases whose name has one of these words in it")
    parser.add_argument("--auto", action="store_true", help="of ours only what auto runs")
    parser.add_argument(
        "--flex", action="store_true", help="compiled FlexAttention too: a minute on a CPU for each case"
    )
    parser.add_argument("--out", help="JSON file for all samples and the environment")
    return parser.parse_args()


def measure(case: Case, repeats: int, device: torch.device) -> list[Row]:
    """Check each call once, then take a sample of each in turn."""
    calls = case.theirs | case.ours
    rows = {name: Row(case.name, name, name in case.ours) for name in calls}
    rows["auto"].limit = case.limit
    want = case.theirs[case.right]().float()
    for name, call in calls.items():
        check(rows[name], call, want)
    running = [name for name, row in rows.items() if row.status == "ok"]
    drawn = random.Random(0)
    for _ in range(repeats):
        for name in drawn.sample(running, len(running)):
            sample(rows[name], calls[name], device)
    compare(list(rows.values()))
    absent = [Row(case.name, name, False, status="absent", reason=why) for name, why in case.absent.items()]
    return show(case, [*rows.values(), *absent])


def check(row: Row, call: Call, want: Tensor) -> None:
    """What cannot run, or is wrong, shows no time."""
    try:
        got = call()
    except Unsupported as error:
        row.status, row.reason = "unsupported", str(error)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        row.status, row.reason = "error", f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        row.error = float((got.float() - want).abs().max())
        if not row.error <= TOLERANCE[got.dtype] * max(1.0, float(want.abs().max())):
            row.status, row.reason = "incorrect", f"off by {row.error:.2g}"


def sample(row: Row, call: Call, device: torch.device) -> None:
    """Milliseconds of one call: events around it on CUDA with a cold cache, else wall and processor time."""
    if device.type != "cuda":
        start, used = time.perf_counter(), time.process_time()
        call()
        row.processor_samples_ms.append(1e3 * (time.process_time() - used))
        row.samples_ms.append(1e3 * (time.perf_counter() - start))
        return
    flush_cache(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    row.samples_ms.append(begin.elapsed_time(end))


def compare(rows: list[Row]) -> None:
    """Medians, and their ratios over the best baseline."""
    timed = [row for row in rows if row.samples_ms]
    for row in timed:
        row.median_ms = statistics.median(row.samples_ms)
    base = min(statistics.median(row.samples_ms) for row in timed if not row.ours)
    for row in timed:
        row.ratio = row.judged = statistics.median(row.samples_ms) / base
    if not all(row.processor_samples_ms for row in timed):
        return
    base = min(statistics.median(row.processor_samples_ms) for row in timed if not row.ours)
    for row in timed:
        row.processor_ratio = statistics.median(row.processor_samples_ms) / base
        row.judged = row.processor_ratio if torch.get_num_threads() == 1 else row.ratio


def show(case: Case, rows: list[Row]) -> list[Row]:
    print(f"\n{case.name}\n  {'':24} {'median':>10}     over the best baseline (processor time)")
    for row in rows:
        if row.median_ms is None:
            print(f"  {row.implementation:24} {row.status}: {row.reason[:80]}")
            continue
        processor = "" if row.processor_ratio is None else f"({row.processor_ratio:.3f})"
        said = "" if row.limit is None else f"{'ABOVE' if row.above else 'within'} {row.limit}"
        print(f"  {row.implementation:24} {row.median_ms:10.2f} ms  {row.ratio:7.3f} {processor:10} {said}")
    sys.stdout.flush()
    return rows


def summarise(rows: list[Row]) -> None:
    judged = [row for row in rows if row.limit is not None]
    above = [row for row in judged if row.above]
    print(f"\n{len(judged) - len(above)} of {len(judged)} cases within their bar")
    for row in above:
        print(
            f"  above: {row.case}: {row.reason if row.judged is None else f'{row.judged:.3f} > {row.limit}'}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
