"""What was compiled and tuned while something ran, apart from the times that are measured.

Triton tells its listeners of every kernel, with the time of each stage and whether its cache had it; torch.compile
counts its own seconds. Compilers that neither sees (a package that calls nvcc) are in the first call's time alone.
"""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

COMPILED = "_compile.compile_inner"
"""what torch.compile calls the whole of a compilation in its own metrics"""
TUNED = ("benchmark_all_configs", "_template_autotuning", "_template_precompiling")
"""how the names of its metrics end that are of trying configurations"""


@contextmanager
def watching_compilation(*, triton: bool, knobs: Any = None) -> Iterator[dict[str, Any]]:
    """Keep what is compiled in the block: the value is filled at its end.

    ``triton`` lists each kernel with ``seconds`` and ``cached`` (its cache had it), ``tuned`` each choice that
    Triton's autotuner made; ``torch_compile`` has ``seconds``, ``autotune_seconds`` and the hits and misses of its
    cache, None where it compiled nothing; ``seconds`` and ``autotune_seconds`` are sums.

    Args:
        triton: listen to Triton, which is imported for it; on a CPU it compiles nothing.
        knobs: ``triton.knobs``, or what stands for it in a test.
    """
    found: dict[str, Any] = {"triton": [], "tuned": []}
    if triton and knobs is None and importlib.util.find_spec("triton") is not None:
        from triton import knobs
    before = _torch_compiled()
    try:
        with _listening(knobs, found) if knobs is not None else _nothing():
            yield found
    finally:
        found["torch_compile"] = _since(before)
        made = found["torch_compile"] or {"seconds": 0.0, "autotune_seconds": 0.0}
        found["seconds"] = made["seconds"] + sum(one["seconds"] for one in found["triton"])
        tuned = sum(one["seconds"] for one in found["tuned"])
        found["autotune_seconds"] = made["autotune_seconds"] + tuned


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _listening(knobs: Any, found: dict[str, Any]) -> Iterator[None]:
    """Hear of every kernel that Triton compiles, beside whoever listens already."""
    compilation, autotuning = knobs.compilation, knobs.autotuning
    heard, tuned = compilation.listener, getattr(autotuning, "listener", None)

    def compiled(**told: Any) -> None:
        seconds = told["times"].total / 1e6
        name = str(told["metadata"].get("name", "kernel"))
        found["triton"].append({"kernel": name, "seconds": seconds, "cached": bool(told["cache_hit"])})
        if heard is not None:
            heard(**told)

    def chosen(**told: Any) -> None:
        name = getattr(told["fn"], "__name__", "kernel")
        seconds = told["duration"] or 0.0
        one = {"kernel": name, "seconds": seconds, "cached": bool(told["cache_hit"])}
        found["tuned"].append(one | {"configurations": len(told["configs_timings"] or ())})
        if tuned is not None:
            tuned(**told)

    compilation.listener = compiled
    if hasattr(autotuning, "listener"):
        autotuning.listener = chosen
    try:
        yield
    finally:
        compilation.listener = heard
        if hasattr(autotuning, "listener"):
            autotuning.listener = tuned


def _torch_compiled() -> dict[str, float]:
    """Seconds by the name of a metric and counts by that of a counter, of this process until now."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return {}
    found = {name: float(sum(times)) for name, times in utils.compilation_time_metrics.items()}
    counted: Mapping[str, int] = utils.counters["inductor"]
    return found | {name: float(counted[name]) for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}


def _since(before: Mapping[str, float]) -> dict[str, Any] | None:
    now = _torch_compiled()
    more = {name: value - before.get(name, 0.0) for name, value in now.items()}
    if more.get(COMPILED, 0.0) <= 0:
        return None
    tuned = sum(value for name, value in more.items() if name.endswith(TUNED))
    return {
        "seconds": more[COMPILED],
        "autotune_seconds": tuned,
        "cache_hits": int(more["fxgraph_cache_hit"]),
        "cache_misses": int(more["fxgraph_cache_miss"]),
    }
