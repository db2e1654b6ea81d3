"""What is kept of a kernel: the numbers it was launched with, and which build of another package it is."""

import hashlib
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from attnlab_kernels.operations import triton_platform
from attnlab_kernels.operations.softmax import hub, provenance
from attnlab_kernels.operations.softmax.inductor import SETTINGS, compiled_kernels
from attnlab_kernels.operations.softmax.provenance import provenance_of, source_of
from attnlab_kernels.operations.triton_platform import load_kernels, noting_launches


class Kernel:
    """Launched as a Triton kernel is."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *given, **constants: self.launched.append((grid, given, constants))

    def __call__(self) -> None:
        raise AssertionError("a kernel is launched over a grid")


@pytest.fixture
def kernels(monkeypatch):
    module = SimpleNamespace(INTERPRETED=False, first_kernel=Kernel(), WIDTH=3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_platform, "import_module", lambda name: module)
    return module


def test_launches_are_noted_once_each_and_reach_the_kernel(kernels):
    with noting_launches() as launched:
        for columns in (64, 32, 64):
            loaded = load_kernels("kernels")
            loaded.first_kernel[(4, 2)]("q", BLOCK_M=columns, HAS_BIAS=False, BIAS=None, num_warps=8)
        assert loaded.WIDTH == 3
    told = {"kernel": "first_kernel", "has_bias": False, "num_warps": 8}
    assert launched == [told | {"block_m": 64}, told | {"block_m": 32}]
    assert [(grid, given) for grid, given, _ in kernels.first_kernel.launched] == [((4, 2), ("q",))] * 3
    load_kernels("kernels").first_kernel[(1,)](BLOCK_M=1)
    assert len(launched) == 2


def test_a_launch_of_another_thread_is_noted_as_a_backward_on_a_card_is_one(kernels):
    def backward() -> None:
        load_kernels("kernels").first_kernel[(1,)](BLOCK_N=16)

    with noting_launches() as launched, ThreadPoolExecutor(1) as autograd:
        autograd.submit(backward).result()
    assert launched == [{"kernel": "first_kernel", "block_n": 16}]


def test_what_torch_compile_made_is_known_by_tiles_warps_and_settings(monkeypatch):
    def tuned(*configs, **meta):
        launchers = [SimpleNamespace(config=config) for config in configs]
        return SimpleNamespace(launchers=launchers, inductor_meta=meta, fn=SimpleNamespace(__name__="fn"))

    def config(warps: int, stages: int, **numbers: int):
        return SimpleNamespace(kwargs=numbers, num_warps=warps, num_stages=stages)

    template = {"BLOCK_M": 128, "BLOCK_N": 64, "FLOAT32_PRECISION": "'tf32'", "PRESCALE_QK": False}
    module = SimpleNamespace(
        async_compile=object(),
        attention=tuned(config(8, 3), kernel_name="triton_tem_fused_0", config_args=template),
        pointwise=tuned(config(4, 1, XBLOCK=256)),
    )
    codecache = SimpleNamespace(PyCodeCache=SimpleNamespace(modules=[SimpleNamespace(), module, module]))
    monkeypatch.setitem(sys.modules, "torch._inductor.codecache", codecache)
    monkeypatch.setitem(sys.modules, "torch._inductor.config", SimpleNamespace(max_autotune=True))
    fused = {"kernel": "triton_tem_fused_0", "block_m": 128, "block_n": 64, "prescale_qk": False}
    assert provenance_of(["flex"], []) == {
        "launches": [],
        "package": None,
        "inductor": {
            "settings": {"max_autotune": True, "coordinate_descent_tuning": None, "fx_graph_cache": None},
            "kernels": [
                fused | {"num_warps": 8, "num_stages": 3},
                {"kernel": "fn", "xblock": 256, "num_warps": 4, "num_stages": 1},
            ],
        },
    }
    assert provenance_of(["triton"], [])["inductor"] is None
    monkeypatch.setitem(sys.modules, "torch._inductor.codecache", None)
    assert compiled_kernels() is None


def test_torch_has_what_is_read_of_its_compiler():
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    assert all(hasattr(config, name) for name in SETTINGS)
    assert isinstance(PyCodeCache.modules, list)
    written = inspect.getsource(CachingAutotuner)
    assert "self.launchers" in written
    assert "self.inductor_meta" in written


def test_a_package_is_known_by_its_version_and_the_hash_of_what_was_loaded(tmp_path, monkeypatch):
    compiled, interface = tmp_path / "cuda.so", tmp_path / "interface.py"
    compiled.write_bytes(b"machine code")
    interface.write_bytes(b"python")
    modules = {"flash_attn": interface, "flash_attn_2_cuda": compiled, "flash_attn_else": compiled}
    for name, path in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__=str(path)))
    found = source_of("flash_attn_2")
    assert found == {
        "version": provenance.external.version("flash-attn"),
        "files": {"cuda.so": hashlib.sha256(b"machine code").hexdigest()},
    }
    monkeypatch.delitem(sys.modules, "flash_attn_2_cuda")
    without = source_of("flash_attn_2")
    assert without is not None
    assert without["files"] == {"interface.py": hashlib.sha256(b"python").hexdigest()}
    assert source_of("sdpa_flash") is source_of("triton") is None


def test_a_kernel_of_the_hub_is_known_by_its_revision(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / ("ab" * 20) / "build"
    folder.mkdir(parents=True)
    (folder / "flash.so").write_bytes(b"code")
    monkeypatch.setattr(hub, "load", lambda: SimpleNamespace(__file__=str(folder / "__init__.py")))
    found = source_of("flash_attn_hub")
    assert found is not None
    assert found["revision"] == "ab" * 20
    assert found["files"] == {"flash.so": hashlib.sha256(b"code").hexdigest()}
