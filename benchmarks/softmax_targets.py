"""The figures that softmax attention should reach on an H100, each beside what was measured in this run.

    PYTHONPATH=kernels python benchmarks/softmax_targets.py --out softmax_targets.json

Needs torch and numpy (triton for our kernels) and a CUDA device; without one every row says "not measured". bfloat16,
D 128, 16,384 tokens unless a row says otherwise. What is compared is measured in the same process, a sample of each
after the other, with a cold second-level cache. A wrong result has no figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Full, Mask, Window
from attnlab_kernels.operations.paged.api import attend_paged
from attnlab_kernels.operations.softmax.api import IMPLEMENTATIONS, attend, supports

TOKENS, HEADS, DIM = 16_384, 16, 128
UNFUSED = ("eager", "sdpa_math")
NOTHING = "not measured"


@dataclass
class Target:
    """One row of the table."""

    what: str
    wanted: str
    least: float
    measured: float | None = None
    detail: str = NOTHING

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return NOTHING
        return "reached" if self.measured >= self.least else "missed"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", help="JSON file for the table")
    options = parser.parse_args()
    targets = table()
    here = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if here else "no CUDA device"
    if here:
        measure(targets, options.repeats)
    print(f"{card}\n{'':<44}{'wanted':>22}{'measured':>12}  verdict")
    for row in targets:
        figure = "-" if row.measured is None else f"{row.measured:.2f}"
        print(f"{row.what:<44}{row.wanted:>22}{figure:>12}  {row.verdict}  {row.detail}")
    if options.out:
        document = {"device": card, "torch": torch.__version__, "rows": [asdict(row) for row in targets]}
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {options.out}", file=sys.stderr)
    return 0


def table() -> list[Target]:
    return [
        Target("forward, our Triton", ">= 480 TFLOP/s", 480),
        Target("forward, our Triton / best installed", ">= 0.95", 0.95),
        Target("forward and backward, ours: the backward", ">= 450 TFLOP/s", 450),
        Target("decoding, one query over 16,384 keys", ">= 0.80 of copy", 0.8),
        Target("paged decoding, 16 sequences of 8,192", ">= 0.80 of copy", 0.8),
        Target("window of 1,024: speed-up / ideal", ">= 0.80", 0.8),
    ]


def measure(targets: list[Target], repeats: int) -> None:
    forward, best, backward, decode, paged, window = targets
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    if not (support := supports("triton", q, k, v)):
        forward.detail = support.reason
        return
    steps = {
        name: lambda name=name: attend(q, k, v, mask=Full(), implementation=name)
        for name in IMPLEMENTATIONS
        if name not in UNFUSED and supports(name, q, k, v, mask=Full())
    }
    with torch.inference_mode():
        times = in_turn({name: step for name, step in steps.items() if right(q, k, v, name)}, repeats)
    if "triton" not in times:
        forward.detail = "our kernel is wrong or fails here, so nothing of it is measured"
        return
    flops = 4 * HEADS * TOKENS * TOKENS * DIM
    forward.measured = flops / times["triton"] / 1e9
    forward.detail = f"{times['triton']:.3f} ms"
    others = {name: ms for name, ms in times.items() if name != "triton"}
    if others:
        winner = min(others, key=lambda name: others[name])
        best.measured, best.detail = others[winner] / times["triton"], f"against {winner}"
    attempt(backward, lambda: measure_backward(backward, q, k, v, times["triton"], repeats))
    attempt(decode, lambda: measure_decode(decode, repeats))
    attempt(paged, lambda: measure_paged(paged, repeats))
    attempt(window, lambda: measure_window(window, q, k, v, repeats))


def attempt(row: Target, step: Callable[[], None]) -> None:
    """What fails is told in its row, and the others are measured."""
    try:
        step()
    except Exception as error:
        row.detail = f"{type(error).__name__}: {error}".splitlines()[0]


def right(q: Tensor, k: Tensor, v: Tensor, name: str) -> bool:
    """Whether the last 128 rows of one head are the reference's; what fails is named and left out."""
    try:
        got = attend(q, k, v, mask=Full(), implementation=name).output[:, :1, -128:]
    except Exception as error:
        print(f"{name} is left out: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return False
    part = (q[:, :1, -128:].double(), k[:, :1].double(), v[:, :1].double())
    want = attend(*part, mask=Full(), implementation="eager").output
    return bool((got.double() - want).abs().max() < 1e-2)


def measure_backward(row: Target, q: Tensor, k: Tensor, v: Tensor, forward_ms: float, repeats: int) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    gradient = torch.randn_like(q)

    def step() -> None:
        attend(*leaves, mask=Full(), implementation="triton").output.backward(gradient)

    both = in_turn({"both": step}, repeats)["both"]
    row.measured = 10 * HEADS * TOKENS * TOKENS * DIM / (both - forward_ms) / 1e9
    row.detail = f"{both:.3f} ms with the forward"


def measure_decode(row: Target, repeats: int) -> None:
    q = torch.randn(16, 32, 1, DIM, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(16, 8, TOKENS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    with torch.inference_mode():
        times = in_turn(
            {
                "decode": lambda: attend(q, k, v, mask=Causal(), implementation="triton"),
                "copy": lambda: k.clone(),
            },
            repeats,
        )
    # a copy reads and writes k; decoding reads k and v
    row.measured = times["copy"] / times["decode"]
    row.detail = f"copy {2 * k.nbytes / times['copy'] / 1e6:.0f} GB/s"


def measure_paged(row: Target, repeats: int) -> None:
    sequences, length, block = 16, 8192, 16
    blocks = sequences * length // block
    pools = [torch.randn(blocks, block, 8, DIM, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
    tables = torch.randperm(blocks, device="cuda").to(torch.int32).view(sequences, -1)
    held = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
    q = torch.randn(sequences, 32, DIM, dtype=torch.bfloat16, device="cuda")
    times = in_turn(
        {
            "paged": lambda: attend_paged(q, pools[0], pools[1], tables, held, implementation="triton"),
            "copy": lambda: pools[0].clone(),
        },
        repeats,
    )
    row.measured, row.detail = times["copy"] / times["paged"], "host checks of tables and lengths included"


def measure_window(row: Target, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> None:
    masks: dict[str, Mask] = {"window": Window(1023), "causal": Causal()}
    with torch.inference_mode():
        times = in_turn(
            {
                name: lambda mask=mask: attend(q, k, v, mask=mask, implementation="triton")
                for name, mask in masks.items()
            },
            repeats,
        )
    ideal = masks["causal"].count(TOKENS, TOKENS) / masks["window"].count(TOKENS, TOKENS)
    speed_up = times["causal"] / times["window"]
    row.measured, row.detail = speed_up / ideal, f"{speed_up:.1f} times causal, ideal {ideal:.1f}"


def in_turn(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one sample after another, the second-level cache overwritten before each."""
    device = torch.cuda.get_device_properties(0)
    scratch = torch.empty(2 * device.L2_cache_size, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 3):
        for name, step in steps.items():
            scratch.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                samples[name].append(begin.elapsed_time(end))
    return {name: median(taken) for name, taken in samples.items()}


if __name__ == "__main__":
    raise SystemExit(main())
