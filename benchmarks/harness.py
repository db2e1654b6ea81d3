"""Whether the lab's timing agrees with the timers that everybody knows, and what it costs.

    python benchmarks/harness.py                    # against torch.utils.benchmark
    python benchmarks/harness.py --device cuda      # against triton.testing.do_bench as well
    python benchmarks/harness.py --out harness.json

The same callable is timed by both, call for call inside the harness's own loop, in pairs whose order alternates, so
that what the machine does meanwhile meets both alike. Of every four pairs the least of each counts (a call that waited
for the processor tells nothing of the timers); the figure is the median of their ratios with its 95 % interval, and has
to be within 3 % of 1. Beside it stands the same by the processor's own time, and what a sample costs in per cent of a
10 ms kernel (below 1 %). Ends with 1 where one of the two does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer as TorchTimer

from attnlab.environment import describe_environment
from attnlab.intervals import median_interval
from attnlab.probes.timers import Step, Timer, WallTimer
from attnlab.probes.timing import latency

TORCH, PROCESSOR, TRITON = (
    "torch.utils.benchmark",
    "torch.utils.benchmark, processor time",
    "triton.testing.do_bench",
)
CUDA_TOKENS, CUDA_ROUNDS = 3072, 31
BLOCK = 4
AGREEMENT, OVERHEAD, KERNEL_MS = 0.03, 0.01, 10.0
Measure = Callable[[], float]
Clock = Callable[[], float]


def paired(ours: Measure, theirs: Measure, rounds: int) -> dict[str, Any]:
    """Time in turn, who is first alternating; the ratio of each pair, ours over theirs."""
    ratios = []
    for turn in range(rounds):
        if turn % 2:
            other, own = theirs(), ours()
        else:
            own, other = ours(), theirs()
        ratios.append(own / other)
    return _agreement(ratios)


def _agreement(ratios: list[float]) -> dict[str, Any]:
    ratio = statistics.median(ratios)
    agrees = abs(ratio - 1) <= AGREEMENT
    return {"ratio": ratio, "interval": median_interval(ratios), "ratios": ratios, "agrees": agrees}


class PairedTimer:
    """A timer of the harness that has every call timed by another one too; who is first alternates."""

    name = "paired"

    def __init__(self, ours: Timer, theirs: Measure) -> None:
        self._ours, self._theirs = ours, theirs
        self.pairs: list[tuple[float, float]] = []
        """milliseconds, ours and theirs"""

    def sample(self, step: Step) -> float:
        """Run the step once for each; returns ours."""
        if len(self.pairs) % 2:
            other, own = self._theirs(), self._ours.sample(step)
        else:
            own, other = self._ours.sample(step), self._theirs()
        self.pairs.append((own, other))
        return own


def least_ratios(pairs: Sequence[tuple[float, float]], block: int = BLOCK) -> list[float]:
    """The least of ours over the least of theirs, for every block of pairs; a block that is not full is left out."""
    blocks = [pairs[start : start + block] for start in range(0, len(pairs) - block + 1, block)]
    return [min(own for own, _ in one) / min(other for _, other in one) for one in blocks]


def against_torch(step: Step, rounds: int, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Pairs with ``torch.utils.benchmark.Timer``, call for call; both read the same clock."""
    theirs = TorchTimer("step()", globals={"step": step}, timer=clock, num_threads=torch.get_num_threads())
    timer = PairedTimer(WallTimer(clock), lambda: theirs.timeit(1).median * 1e3)
    row = latency("step", step, rounds, torch.device("cpu"), timer=timer)
    found = _agreement(least_ratios(timer.pairs[-rounds:]))
    return found | {"milliseconds": row.value, "conditions": (row.detail or {})["conditions"]}


def against_triton(step: Step, rounds: int, samples: int) -> dict[str, Any]:
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


def overhead(samples: int, clock: Clock = time.perf_counter) -> dict[str, Any]:
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


def attention(device: str, tokens: int) -> Step:
    """Causal SDPA of 8 heads of 64."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query, key, value = torch.randn(3, 1, 8, tokens, 64, device=device, dtype=dtype)
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--tokens", type=int, default=256, help="of the attention on a CPU, about 1 ms")
    options.add_argument("--rounds", type=int, default=800, help="pairs on a CPU")
    options.add_argument("--samples", type=int, default=7, help="of every figure that is paired on CUDA")
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"environment": describe_environment(asked.device), "overhead": overhead(1000)}
    with torch.inference_mode():
        step = attention("cpu", asked.tokens)
        found[TORCH] = against_torch(step, asked.rounds)
        found[PROCESSOR] = against_torch(step, asked.rounds, time.process_time)
        if asked.device == "cuda":
            step = attention("cuda", CUDA_TOKENS)
            found[TRITON] = against_triton(step, CUDA_ROUNDS, asked.samples)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return report(found)


def report(found: dict[str, Any]) -> int:
    """Print every ratio; returns the exit code."""
    good = found["overhead"]["holds"]
    print(f"overhead  {100 * found['overhead']['share']:.3f} % of {KERNEL_MS:g} ms")
    for name in (TORCH, PROCESSOR, TRITON):
        if pair := found.get(name):
            low, high = pair["interval"] or (float("nan"),) * 2
            print(
                f"{name}  lab / it = {pair['ratio']:.4f} (95 % {low:.4f} to {high:.4f}, {len(pair['ratios'])} ratios)"
            )
            for reason in pair.get("conditions", {}).get("disturbed", []):
                print(f"  disturbed: {reason}")
            good = good and (pair["agrees"] or name == PROCESSOR)
        else:
            print(f"{name}  not measured")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
