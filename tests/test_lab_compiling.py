"""What is compiled and tuned in a run is told apart from its times: by Triton's listeners and torch's own metrics."""

from types import SimpleNamespace

import pytest
import torch

from attnlab.probes.compiling import watching_compilation
from attnlab_webui.timing_view import compilation_words

SECOND = 1_000_000


def knobs_of(**listeners):
    return SimpleNamespace(
        compilation=SimpleNamespace(listener=listeners.get("compiling")),
        autotuning=SimpleNamespace(listener=listeners.get("tuning")),
    )


def compiled(knobs, name: str, seconds: float, *, cached: bool) -> None:
    times = SimpleNamespace(total=int(seconds * SECOND))
    knobs.compilation.listener(
        src=object(), metadata={"name": name}, metadata_group={}, times=times, cache_hit=cached
    )


def test_every_kernel_that_triton_compiles_is_told_with_its_seconds_and_its_cache():
    heard = []
    before = lambda **told: heard.append(told["metadata"]["name"])  # noqa: E731
    knobs = knobs_of(compiling=before)
    with watching_compilation(triton=True, knobs=knobs) as found:
        compiled(knobs, "forward", 2.5, cached=False)
        compiled(knobs, "backward", 0.25, cached=True)
        configurations = {"a": [1.0], "b": [2.0]}
        knobs.autotuning.listener(
            fn=SimpleNamespace(__name__="scan"),
            key=(),
            best_config=None,
            configs_timings=configurations,
            duration=0.75,
            cache_hit=False,
        )
    assert found["triton"] == [
        {"kernel": "forward", "seconds": 2.5, "cached": False},
        {"kernel": "backward", "seconds": 0.25, "cached": True},
    ]
    assert found["tuned"] == [{"kernel": "scan", "seconds": 0.75, "cached": False, "configurations": 2}]
    assert (found["seconds"], found["autotune_seconds"]) == (2.75, 0.75)
    assert heard == ["forward", "backward"]
    assert knobs.compilation.listener is before
    assert knobs.autotuning.listener is None
    words = compilation_words(found)
    assert "<b>2.8 s</b>" in words
    assert "2 Triton kernels, 1 of them from the cache, 0.8 s of trying configurations" in words


def test_the_listeners_are_as_before_when_a_run_fails():
    knobs = knobs_of()
    with pytest.raises(ZeroDivisionError), watching_compilation(triton=True, knobs=knobs):
        raise ZeroDivisionError
    assert knobs.compilation.listener is None


def test_what_torch_compiles_in_the_block_counts_and_what_it_compiled_before_does_not():
    first, second = (torch.compile(lambda x, by=by: x * by, backend="eager") for by in (2, 3))
    first(torch.ones(3))
    with watching_compilation(triton=False) as found:
        assert second(torch.ones(3)).tolist() == [3, 3, 3]
    made = found["torch_compile"]
    assert 0 < made["seconds"] < 60
    assert (made["cache_hits"], made["cache_misses"], made["autotune_seconds"]) == (0, 0, 0)
    assert found["seconds"] == made["seconds"]
    assert "torch.compile" in compilation_words(found)
    with watching_compilation(triton=False) as nothing:
        second(torch.ones(3))
    assert nothing["torch_compile"] is None
    assert nothing["seconds"] == 0
    assert compilation_words(nothing) == "nothing was compiled"


def test_triton_has_the_listeners_that_are_used():
    knobs = pytest.importorskip("triton.knobs")
    with watching_compilation(triton=True) as found:
        assert callable(knobs.compilation.listener)
        times = knobs.CompileTimes(
            ir_initialization=SECOND, lowering_stages=[("ptx", SECOND)], store_results=0
        )
        knobs.compilation.listener(
            src=None, metadata={"name": "k"}, metadata_group={}, times=times, cache_hit=True
        )
    assert found["triton"] == [{"kernel": "k", "seconds": 2.0, "cached": True}]
    assert knobs.compilation.listener is None
