"""Whether the lab's timing agrees with the timers that everybody knows, and what it costs.

    python benchmarks/harness.py                    # against torch.utils.benchmark
    python benchmarks/harness.py --device cuda      # against triton.testing.do_bench as well
    python benchmarks/harness.py --out harness.json

The same callable is timed by both in turn, in pairs whose order alternates, so that what the machine does meanwhile
meets both alike. Prints the median ratio of the pairs with its 95 % interval (agreement is within 3 %), and what a
sample costs in per cent of a 10 ms kernel (below 1 %). Ends with 1 where one of the two does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer as TorchTimer

from attnlab.environment import describe_environment
from attnlab.intervals import median_interval
from attnlab.probes.timers import WallTimer
from attnlab.probes.timing import latency

AGREEMENT, OVERHEAD, KERNEL_MS = 0.03, 0.01, 10.0
Measure = Callable[[], float]


def paired(ours: Measure, theirs: Measure, rounds: int) -> dict[str, Any]:
    """Time in turn, who is first alternating; the ratio of each pair, ours over theirs."""
    ratios = []
    for turn in range(rounds):
        if turn % 2:
            other, own = theirs(), ours()
        else:
            own, other = ours(), theirs()
        ratios.append(own / other)
    ratio = statistics.median(ratios)
    agrees = abs(ratio - 1) <= AGREEMENT
    return {"ratio": ratio, "interval": median_interval(ratios), "ratios": ratios, "agrees": agrees}


def against_torch(
    step: Callable[[], object], rounds: int, samples: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Pairs with ``torch.utils.benchmark.Timer``: the median of as many samples of each."""
    timer = TorchTimer("step()", globals={"step": step}, timer=clock, num_threads=torch.get_num_threads())
    cpu = torch.device("cpu")
    return paired(
        lambda: latency("step", step, samples, cpu, timer=WallTimer(clock)).value,
        lambda: statistics.median(timer.timeit(1).median * 1e3 for _ in range(samples)),
        rounds,
    )


def against_triton(step: Callable[[], object], rounds: int, samples: int) -> dict[str, Any]:
    """Pairs with ``triton.testing.do_bench``: both with an overwritten second-level cache."""
    from triton.testing import do_bench

    device = torch.device("cuda")
    # one figure with return_mode "median"; its annotation knows of lists too
    theirs: Callable[..., Any] = do_bench
    return paired(
        lambda: latency("step", step, samples, device, cold=True).value,
        lambda: float(theirs(step, return_mode="median")),
        rounds,
    )


def overhead(samples: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """What the harness adds to a sample (a step that does nothing) and between two, against a 10 ms kernel."""
    timer = WallTimer(clock)
    inside = statistics.median(timer.sample(_nothing) for _ in range(samples))
    ends: list[float] = []
    row = latency(
        "nothing",
        _nothing,
        samples,
        torch.device("cpu"),
        timer=timer,
        progress=lambda _: ends.append(clock()),
    )
    steps = [(after - before) * 1e3 for before, after in pairwise(ends)]
    between = max(0.0, statistics.median(steps) - row.value)
    share = (inside + between) / KERNEL_MS
    return {"inside_ms": inside, "between_ms": between, "share": share, "holds": share < OVERHEAD}


def _nothing() -> None:
    pass


def attention(device: str, tokens: int) -> Callable[[], object]:
    """Causal SDPA of 8 heads of 64."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query, key, value = torch.randn(3, 1, 8, tokens, 64, device=device, dtype=dtype)
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--tokens", type=int, default=768)
    options.add_argument("--rounds", type=int, default=31)
    options.add_argument("--samples", type=int, default=7)
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"environment": describe_environment(asked.device), "overhead": overhead(1000)}
    with torch.inference_mode():
        step = attention("cpu", asked.tokens)
        found["torch.utils.benchmark"] = against_torch(step, asked.rounds, asked.samples)
        if asked.device == "cuda":
            step = attention("cuda", 4 * asked.tokens)
            found["triton.testing.do_bench"] = against_triton(step, asked.rounds, asked.samples)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return report(found)


def report(found: dict[str, Any]) -> int:
    """Print every ratio; returns the exit code."""
    good = found["overhead"]["holds"]
    print(f"overhead  {100 * found['overhead']['share']:.3f} % of {KERNEL_MS:g} ms")
    for name in ("torch.utils.benchmark", "triton.testing.do_bench"):
        if pair := found.get(name):
            low, high = pair["interval"] or (float("nan"),) * 2
            print(
                f"{name}  lab / it = {pair['ratio']:.4f} (95 % {low:.4f} to {high:.4f}, {len(pair['ratios'])} pairs)"
            )
            good = good and pair["agrees"]
        else:
            print(f"{name}  not measured")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
