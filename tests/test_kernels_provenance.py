"""What is kept of a kernel: the numbers it was launched with, and which build of another package it is."""

import hashlib
import sys
from types import SimpleNamespace

import pytest

from attnlab_kernels.operations import triton_platform
from attnlab_kernels.operations.softmax import hub, provenance
from attnlab_kernels.operations.softmax.provenance import source_of
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
    assert load_kernels("kernels") is kernels
    kernels.first_kernel[(1,)](BLOCK_M=1)
    assert len(launched) == 2


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
