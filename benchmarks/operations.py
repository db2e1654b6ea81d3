"""Every implementation of every operation against what a user would reach for, as ratios within one run.

    PYTHONPATH=kernels python benchmarks/operations.py --out operations.json

The same command is the CPU set and, where torch sees a CUDA device, the GPU set. All calls of a case run in turn, a
sample of each after the other, so that clocks and neighbours hit them alike. The first that a user would reach for is
the measure: SDPA with a dense mask (causal SDPA where the mask is dense itself); then compiled FlexAttention with
``--flex``, and NATTEN where it is installed. A call that is further from the measure than the inputs' dtype allows
shows no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from softmax_attention import environment, flush_cache
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnlab_kernels.masks import Causal, Documents, Full, Mask, Window
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.differential import api as differential
from attnlab_kernels.operations.linear import api as linear
from attnlab_kernels.operations.neighborhood import api as neighborhood
from attnlab_kernels.operations.softmax import api as softmax
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_kernels.operations.sparse import api as sparse
from attnlab_kernels.patterns import BigBird, Fixed, Local, Longformer, Pattern, Strided

Call = Callable[[], Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Row:
    """One implementation of one case; ``ratio`` is its median over the measure's."""

    case: str
    implementation: str
    limit: float | None
    """of the ratio, for what ``auto`` runs"""
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    ratio: float | None = None


@dataclass
class Case:
    """One operation on one shape: the user's calls first, then ours."""

    name: str
    limit: float
    theirs: dict[str, Call]
    ours: dict[str, Call]


def main() -> int:
    options = read_options()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device here")
        return 0
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rows: list[Row] = []
    for case in cases(options, device):
        if options.cases and not any(word in case.name for word in options.cases):
            continue
        rows += measure(case, options.repeats, device)
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
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16_384] if on_gpu else [1024, 4096])
    parser.add_argument("--heads", type=int, default=16 if on_gpu else 8)
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--repeats", type=int, default=30 if on_gpu else 5)
    parser.add_argument("--cases", nargs="+", help="only cases whose name has one of these words in it")
    parser.add_argument(
        "--flex", action="store_true", help="compiled FlexAttention too: a minute on a CPU for each case"
    )
    parser.add_argument("--out", help="JSON file for all samples and the environment")
    return parser.parse_args()


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The grid; tensors are made when their case is due."""
    for length in options.lengths:

        def made(heads: int = options.heads, tokens: int = length) -> list[Tensor]:
            size = (1, heads, tokens, options.head_dim)
            return [torch.randn(size, device=device, dtype=getattr(torch, options.dtype)) for _ in range(3)]

        for mask in masks(length):
            yield softmax_case(mask, made(), options.flex)
        for pattern in patterns():
            yield sparse_case(pattern, made())
        yield differential_case(made(), made())
        yield linear_case(made())
        side = int(length**0.5)
        yield neighborhood_case(side, made(tokens=side * side))


def masks(length: int) -> list[Mask]:
    """Dense ones first."""
    return [Full(), Causal(), Window(255), Causal() & Documents([length // 4] * 4)]


def patterns() -> list[Pattern]:
    return [
        Local(True, 256),
        Strided(True, 64),
        Fixed(True, 64, 4),
        Longformer(True, 256, 16),
        BigBird(True, 64, 3),
    ]


def softmax_case(mask: Mask, tensors: list[Tensor], flex: bool) -> Case:
    q, k, v = tensors
    tokens = q.shape[2]
    rows = np.arange(tokens)
    theirs: dict[str, Call]
    if mask in (Full(), Causal()):
        theirs = {"sdpa": partial(scaled_dot_product_attention, q, k, v, is_causal=mask == Causal())}
    else:
        dense = torch.from_numpy(mask.allowed(rows, rows, num_queries=tokens, num_keys=tokens)).to(q.device)
        theirs = {"sdpa, dense mask": partial(scaled_dot_product_attention, q, k, v, attn_mask=dense)}
    if flex:
        theirs["compiled flex"] = compiled_flex(mask, q, k, v)
    names = [name for name in softmax.IMPLEMENTATIONS if name not in ("eager", "sdpa_math", "flex")]

    def ours(name: str) -> Tensor:
        return softmax.attend(q, k, v, mask=mask, implementation=name).output

    limit = 1.1 if mask in (Full(), Causal()) else 1.0
    return Case(
        f"{mask.describe()}, {tokens:,} tokens",
        limit,
        theirs,
        {name: partial(ours, name) for name in ("auto", *names)},
    )


def compiled_flex(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlexAttention through torch.compile, with the blocks of the mask made beforehand."""
    from torch.nn.attention.flex_attention import flex_attention

    from attnlab_kernels.operations.softmax.flex import block_mask

    compiled = torch.compile(flex_attention)
    blocks = block_mask(mask, 1, q.shape[2], k.shape[2], q.device)
    return lambda: compiled(q, k, v, block_mask=blocks)  # pyright: ignore[reportReturnType]


def sparse_case(pattern: Pattern, tensors: list[Tensor]) -> Case:
    q, k, v = tensors
    tokens, heads = q.shape[2], q.shape[1]
    rows = np.arange(tokens)
    count = heads if isinstance(pattern, BigBird) else 1
    each = [pattern.allowed(rows, rows, num_keys=tokens, head=head) for head in range(count)]
    dense = torch.from_numpy(np.stack(each)).to(q.device)[None]

    def ours(name: str) -> Tensor:
        return sparse.sparse_attend(q, k, v, pattern, implementation=name).result.output

    return Case(
        f"{pattern.describe()}, {tokens:,} tokens",
        1.0,
        {"sdpa, dense mask": partial(scaled_dot_product_attention, q, k, v, attn_mask=dense)},
        {name: partial(ours, name) for name in ("auto", *sparse.IMPLEMENTATIONS)},
    )


def differential_case(tensors: list[Tensor], others: list[Tensor]) -> Case:
    (q, k, v), (q2, k2, _) = tensors, others
    query, key = differential.Pair(q, q2), differential.Pair(k, k2)
    weight = torch.tensor(0.3, device=q.device)

    def twice() -> Tensor:
        first, second = (scaled_dot_product_attention(a, b, v, is_causal=True) for a, b in ((q, k), (q2, k2)))
        return first - 0.3 * second

    def ours(name: str) -> Tensor:
        return differential.difference_attend(
            query, key, v, weight, mask=Causal(), implementation=name
        ).output

    names = [name for name in ("auto", *differential.IMPLEMENTATIONS) if name != "maps"]
    return Case(
        f"differential, causal, {q.shape[2]:,} tokens",
        1.1,
        {"two calls of sdpa": twice},
        {name: partial(ours, name) for name in names},
    )


def linear_case(tensors: list[Tensor]) -> Case:
    q, k, v = (part.abs() for part in tensors)

    def naive() -> Tensor:
        scores = torch.tril(q @ k.transpose(-1, -2))
        return scores @ v / scores.sum(-1, keepdim=True)

    def ours(name: str) -> Tensor:
        return linear.linear_attend(q, k, v, causal=True, form=name).output

    theirs: dict[str, Call] = {"masked product": naive}
    return Case(
        f"linear, causal, {q.shape[2]:,} tokens",
        1.0,
        theirs,
        {name: partial(ours, name) for name in ("auto", *linear.IMPLEMENTATIONS)},
    )


def neighborhood_case(side: int, tensors: list[Tensor]) -> Case:
    q, k, v = tensors
    windows = Neighborhood((side, side), (7, 7), (1, 1), (1, 1), (False, False))
    pixels = np.arange(side * side)
    dense = torch.from_numpy(windows.allowed(pixels, pixels)).to(q.device)
    grids = [part.unflatten(2, (side, side)) for part in tensors]
    theirs: dict[str, Call] = {
        "sdpa, dense mask": partial(scaled_dot_product_attention, q, k, v, attn_mask=dense)
    }
    try:
        from natten.functional import na2d  # pyright: ignore[reportMissingImports]

        swapped = [part.permute(0, 2, 3, 1, 4) for part in grids]
        theirs["natten"] = lambda: na2d(*swapped, kernel_size=7).permute(0, 3, 1, 2, 4).flatten(2, 3)
    except ImportError:
        pass

    def ours(name: str) -> Tensor:
        made = neighborhood.neighborhood_attend(grids[0], grids[1], grids[2], windows, implementation=name)
        return made.result.output.flatten(2, 3)

    names = ("auto", *neighborhood.IMPLEMENTATIONS)
    return Case(
        f"neighborhood 7 x 7, {side} x {side} pixels",
        1.0,
        theirs,
        {name: partial(ours, name) for name in names},
    )


def measure(case: Case, repeats: int, device: torch.device) -> list[Row]:
    """Check each call once, then take a sample of each in turn."""
    calls = case.theirs | case.ours
    rows = {name: Row(case.name, name, case.limit if name == "auto" else None) for name in calls}
    first = next(iter(case.theirs))
    want = calls[first]().float()
    for name, call in calls.items():
        check(rows[name], call, want)
    running = [name for name, row in rows.items() if row.status == "ok"]
    for _ in range(repeats):
        for name in running:
            rows[name].samples_ms.append(sample(calls[name], device))
    for name in running:
        rows[name].median_ms = statistics.median(rows[name].samples_ms)
    base = rows[first].median_ms
    print(f"\n{case.name}")
    for row in rows.values():
        if row.median_ms is None or base is None:
            print(f"  {row.implementation:18} {row.status}: {row.reason[:80]}")
            continue
        row.ratio = row.median_ms / base
        said = "" if row.limit is None else f"  {'within' if row.ratio <= row.limit else 'ABOVE'} {row.limit}"
        print(f"  {row.implementation:18} {row.median_ms:10.2f} ms  {row.ratio:7.3f} x{said}")
    return list(rows.values())


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


def sample(call: Call, device: torch.device) -> float:
    """Milliseconds of one call: events around it on CUDA with a cold cache, else wall time."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    flush_cache(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


if __name__ == "__main__":
    raise SystemExit(main())
