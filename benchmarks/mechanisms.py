"""Whether the cost of a mechanism follows its mask: a few modules' operations against full attention, as ratios.

    PYTHONPATH=kernels python benchmarks/mechanisms.py --out mechanisms.json

Needs torch and numpy only. The calls of a ratio run in turn inside one process, a sample of each after the other, so
that clocks and neighbours hit them alike. Each row says the limit that the project holds itself to.

Large tensors lie in huge pages where the system has them: an output of 32 MiB is new memory each time, and clearing
8,192 small pages, which no mechanism can help, would be a tenth of the time of linear attention.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once

import torch
from torch import Tensor

from attnlab_kernels.masks import Causal, Window
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.linear.api import linear_attend
from attnlab_kernels.operations.neighborhood.api import neighborhood_attend
from attnlab_kernels.operations.neighborhood.reference import visited_pairs
from attnlab_kernels.operations.softmax.api import attend

Call = Callable[[], object]


@dataclass
class Row:
    """One ratio: samples of both calls, in ms."""

    name: str
    limit: float
    ran: str
    measured_ms: list[float] = field(default_factory=list)
    against_ms: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.measured_ms) / statistics.median(self.against_ms)


def main() -> int:
    options = read_options()
    torch.manual_seed(options.seed)
    torch.set_grad_enabled(False)
    rows = []
    for make in (window, neighborhood, linear):
        row, measured, against = make(options)
        for call in (measured, against):
            call()
        for _ in range(options.repeats):
            row.measured_ms.append(timed(measured))
            row.against_ms.append(timed(against))
        rows.append(row)
        said = "within" if row.ratio <= row.limit else "above"
        print(
            f"{row.name:64} {statistics.median(row.measured_ms):10.1f} ms  "
            f"{row.ratio:6.3f} x  ({said} {row.limit}; {row.ran})"
        )
    document = {
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }
    if options.out:
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {options.out}", file=sys.stderr)
    return 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="of the window, and the longer of the linear"
    )
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--side", type=int, default=64, help="of the image")
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file for all samples")
    return parser.parse_args()


def window(options: argparse.Namespace) -> tuple[Row, Call, Call]:
    q, k, v = tensors(options, options.tokens)
    mask = Window(options.window - 1)
    name = f"window of {options.window} keys / causal SDPA, {options.tokens:,} tokens"
    ran = attend(q, k, v, mask=mask).aux["implementation"]
    return (
        Row(name, 0.10, ran),
        lambda: attend(q, k, v, mask=mask),
        lambda: attend(q, k, v, mask=Causal(), implementation="sdpa_flash"),
    )


def neighborhood(options: argparse.Namespace) -> tuple[Row, Call, Call]:
    side = options.side
    flat = tensors(options, side * side)
    q, k, v = (part.unflatten(2, (side, side)) for part in flat)
    where = Neighborhood((side, side), (options.kernel_size,) * 2, (1, 1), (1, 1), (False, False))
    share = visited_pairs(where) / side**4
    ran = neighborhood_attend(q, k, v, where).implementation
    name = f"neighborhood of {options.kernel_size} x {options.kernel_size} / full attention, {side} x {side} pixels"
    return (
        Row(name, 0.25, f"{ran}, visits {share:.3f} of the pairs"),
        lambda: neighborhood_attend(q, k, v, where),
        lambda: attend(*flat),
    )


def linear(options: argparse.Namespace) -> tuple[Row, Call, Call]:
    longer, shorter = (
        [part.exp() for part in tensors(options, count)] for count in (options.tokens, options.tokens // 2)
    )
    ran = linear_attend(*longer, causal=True).form
    name = f"linear attention, {options.tokens:,} / {options.tokens // 2:,} tokens"
    return (
        Row(name, 2.2, ran),
        lambda: linear_attend(*longer, causal=True),
        lambda: linear_attend(*shorter, causal=True),
    )


def tensors(options: argparse.Namespace, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, options.heads, tokens, options.head_dim)
    return q, k, v


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    raise SystemExit(main())
