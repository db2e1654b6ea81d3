"""Every implementation of softmax attention over a grid of shapes, checked before it is timed.

    PYTHONPATH=kernels python benchmarks/softmax_attention.py --out softmax.json

Needs torch and numpy only. All implementations of a shape run in turn inside one process, a sample of each after
the other, so that clocks and neighbours hit them alike; ratios are within that run. On CUDA a sample is a pair of
events around one call with a cold second-level cache; on a CPU it is wall time. A row that is wrong shows no time,
and running out of memory is a row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask, Window
from attnlab_kernels.operations.softmax.api import IMPLEMENTATIONS, attend, supports

OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory")


@dataclass(frozen=True)
class Shape:
    """One point of the grid."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    mask: str


@dataclass
class Row:
    """One implementation on one shape."""

    shape: Shape
    implementation: str
    status: str = "ok"
    reason: str = ""
    output_error: float | None = None
    lse_error: float | None = None
    error_budget: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    tflops: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    chosen: str = ""


def main() -> int:
    options = read_options()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device here")
        return 0
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    for shape in grid(options):
        try:
            rows += measure(shape, options, device)
        except RuntimeError as error:
            rows.append(Row(shape, "inputs", "error", str(error).splitlines()[0]))
        show([row for row in rows if row.shape == shape], options.baseline)
    document = {
        "command": " ".join(sys.argv),
        "environment": environment(device),
        "baseline": options.baseline,
        "timing": "CUDA events, cold second-level cache" if device.type == "cuda" else "wall time",
        "rows": [asdict(row) for row in rows],
    }
    if options.out:
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {options.out}", file=sys.stderr)
    return 1 if any(row.status in ("incorrect", "error") for row in rows) else 0


def read_options() -> argparse.Namespace:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    small = default_device == "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--implementations", nargs="+", default=["auto", *IMPLEMENTATIONS])
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 4096] if small else [1024, 4096, 16384]
    )
    parser.add_argument(
        "--queries", type=int, help="query rows, if not as many as keys (1 is a decoding step)"
    )
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64] if small else [64, 128])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8 if small else 16)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--dtypes", nargs="+", default=["float32"] if small else ["bfloat16"])
    parser.add_argument(
        "--masks", nargs="+", default=["causal", "window:256"], help="full, causal, window:KEYS"
    )
    parser.add_argument("--repeats", type=int, default=5 if small else 50)
    parser.add_argument("--warmup", type=int, default=1 if small else 5)
    parser.add_argument(
        "--baseline", default="sdpa_flash", help="ratios are against this one on the same shape"
    )
    parser.add_argument(
        "--max-score-gib", type=float, default=2.0, help="skip what would form more scores than this"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file for all samples and the environment")
    return parser.parse_args()


def grid(options: argparse.Namespace) -> list[Shape]:
    points = itertools.product(options.dtypes, options.head_dims, options.lengths, options.masks)
    return [
        Shape(
            options.batch,
            options.heads,
            options.kv_heads or options.heads,
            options.queries or length,
            length,
            head_dim,
            dtype,
            mask,
        )
        for dtype, head_dim, length, mask in points
    ]


def read_mask(words: str) -> Mask:
    """``full``, ``causal`` or ``window:KEYS`` (causal, the query's own key included)."""
    if words == "full":
        return Full()
    if words == "causal":
        return Causal()
    name, _, size = words.partition(":")
    if name == "window" and size.isdigit() and int(size) > 0:
        return Window(int(size) - 1)
    raise SystemExit(f"--masks must be full, causal or window:KEYS; got {words!r}")


def measure(shape: Shape, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """All implementations on one shape: checked one by one, then timed in turn."""
    mask, dtype = read_mask(shape.mask), getattr(torch, shape.dtype)
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.head_dim, dtype=dtype, device=device)
    k, v = (
        torch.randn(shape.batch, shape.kv_heads, shape.keys, shape.head_dim, dtype=dtype, device=device)
        for _ in range(2)
    )
    rows = [Row(shape, name) for name in options.implementations]
    with torch.inference_mode():
        for row in rows:
            guarded(row, lambda row=row: check(row, q, k, v, mask, options.max_score_gib))
        ready = [row for row in rows if row.status == "ok"]
        for _ in range(options.warmup):
            for row in ready:
                guarded(row, lambda row=row: call(row, q, k, v, mask))
        for _ in range(options.repeats):
            for row in ready:
                if row.status == "ok":
                    guarded(row, lambda row=row: row.samples_ms.append(sample(row, q, k, v, mask)))
    finish(rows, mask, options.baseline)
    return rows


def guarded(row: Row, step: Callable[[], Any]) -> None:
    """Run a step; what goes wrong becomes the row's status."""
    try:
        step()
    except Exception as error:  # a compiler's or another package's own, too: the other rows go on
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            part in words.lower() for part in OUT_OF_MEMORY_WORDS
        )
        row.status, row.reason = ("out_of_memory" if ran_out else "error"), words
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # a fault has ended the context, and every row after it says so
                torch.cuda.empty_cache()


def call(row: Row, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Any:
    return attend(q, k, v, mask=mask, implementation=row.implementation)


def call_measured(row: Row, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Any:
    """One call, and the peak of CUDA memory above what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call(row, q, k, v, mask)
    torch.cuda.synchronize()
    row.peak_bytes = torch.cuda.max_memory_allocated() - before
    return result


def check(row: Row, q: Tensor, k: Tensor, v: Tensor, mask: Mask, max_score_gib: float) -> None:
    """Refuse what cannot run, and compare the last rows of one group of heads with float64."""
    if row.implementation != "auto":
        support = supports(row.implementation, q, k, v, mask=mask)
        row.reason = support.reason
        if not support:
            row.status = "unsupported"
            return
        scores = 4 * row.shape.batch * row.shape.heads * row.shape.queries * row.shape.keys / 2**30
        # on a CPU the system kills what it cannot hold, so the row is refused before it starts
        unfused = row.implementation in ("eager", "sdpa_math", "flex")
        if q.device.type == "cpu" and unfused and scores > max_score_gib:
            row.status, row.reason = "out_of_memory", f"would form {scores:.1f} GiB of scores"
            return
    result = call(row, q, k, v, mask) if q.device.type != "cuda" else call_measured(row, q, k, v, mask)
    row.chosen = result.aux["implementation"]
    group, last = row.shape.heads // row.shape.kv_heads, min(128, row.shape.queries)
    part_q, part_k, part_v = q[:1, :group, -last:], k[:1, :1], v[:1, :1]
    exact = attend(part_q.double(), part_k.double(), part_v.double(), mask=mask, implementation="eager")
    assert exact.lse is not None
    row.output_error = worst(result.output[:1, :group, -last:], exact.output)
    row.lse_error = worst(result.lse[:1, :group, -last:], exact.lse)
    row.error_budget = 2 * worst(plain(part_q, part_k, part_v, mask), exact.output) + 2e-6
    if not row.output_error <= row.error_budget:
        row.status, row.reason = "incorrect", f"error {row.output_error:.2e} above {row.error_budget:.2e}"


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """What a careful PyTorch user writes in the inputs' own dtype: the measure of a fair error."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    keep = mask.allowed(
        np.arange(num_queries), np.arange(num_keys), num_queries=num_queries, num_keys=num_keys
    )
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.from_numpy(keep).to(q.device), -torch.inf)
    return torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v


def worst(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())


def sample(row: Row, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> float:
    """Milliseconds of one call."""
    if q.device.type != "cuda":
        start = time.perf_counter()
        call(row, q, k, v, mask)
        return 1e3 * (time.perf_counter() - start)
    flush_cache(q.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(row, q, k, v, mask)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


_flush: dict[torch.device, Tensor] = {}


def flush_cache(device: torch.device) -> None:
    """Write twice the device's own second-level cache."""
    if device not in _flush:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        _flush[device] = torch.empty(size, dtype=torch.int8, device=device)
    _flush[device].zero_()


def finish(rows: list[Row], mask: Mask, baseline: str) -> None:
    for row in rows:
        if row.status != "ok" or len(row.samples_ms) == 0:
            row.samples_ms = []
            continue
        ordered = sorted(row.samples_ms)
        row.median_ms = statistics.median(ordered)
        row.p10_ms = ordered[len(ordered) // 10]
        row.p90_ms = ordered[-1 - len(ordered) // 10]
        shape = row.shape
        pairs = mask.count(shape.queries, shape.keys)
        row.tflops = 4 * shape.batch * shape.heads * pairs * shape.head_dim / row.median_ms / 1e9
    against = next((row.median_ms for row in rows if row.implementation == baseline), None)
    for row in rows:
        if row.median_ms and against:
            row.ratio = row.median_ms / against


def show(rows: list[Row], baseline: str) -> None:
    shape = rows[0].shape
    print(
        f"\n{shape.dtype} batch {shape.batch} heads {shape.heads}/{shape.kv_heads} D {shape.head_dim} "
        f"queries {shape.queries} keys {shape.keys} {shape.mask}"
    )
    print(
        f"{'implementation':<18}{'median ms':>11}{'p10':>9}{'p90':>9}{'x ' + baseline:>14}{'TFLOP/s':>10}  error"
    )
    for row in rows:
        name = (
            row.implementation
            if row.implementation == row.chosen or not row.chosen
            else f"auto: {row.chosen}"
        )
        if row.median_ms is None:
            print(f"{name:<18}{row.status:>14}  {row.reason}")
            continue
        ratio = f"{row.ratio:.3f}" if row.ratio else "-"
        print(
            f"{name:<18}{row.median_ms:>11.3f}{row.p10_ms:>9.3f}{row.p90_ms:>9.3f}{ratio:>14}"
            f"{row.tflops:>10.3f}  {row.output_error:.1e}"
        )
    sys.stdout.flush()


def environment(device: torch.device) -> dict[str, Any]:
    """What somebody needs to repeat the run."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "git": output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": output_of(
                "nvidia-smi",
                "--query-gpu=driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu",
                "--format=csv,noheader",
            ),
        }
    return facts


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    raise SystemExit(main())
