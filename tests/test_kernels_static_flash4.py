"""flash-attn 4 on the static panel, with a stand-in of its package that leaves what its compiler leaves."""

from __future__ import annotations

import pytest

from attnlab_kernels import static_flash4, static_kernels
from attnlab_kernels.static_facts import CAPABILITIES, StaticFacts
from attnlab_kernels.static_flash4 import FORMS, Form

INTERFACE = """
import os
from pathlib import Path

def flash_attn_func(q, k, v, causal=False):
    assert q.shape == k.shape == v.shape and q.device.type == "cuda" and os.environ["FLASH_ATTENTION_FAKE_TENSOR"]
    folder = Path(os.environ["CUTE_DSL_DUMP_DIR"])
    assert os.environ["CUTE_DSL_KEEP_PTX"] == os.environ["CUTE_DSL_KEEP_CUBIN"] == "1"
    target = os.environ["CUTE_DSL_ARCH"]
    (folder / f"helper.{target}.cubin").write_bytes(b"small")
    (folder / f"forward.{target}.cubin").write_bytes(f"{q.shape[-1]} {causal} {target}".encode())
    (folder / f"forward.{target}.ptx").write_text(".reqntid 384, 1, 1 wgmma.mma_async")
"""
FACTS = StaticFacts(168, 0, 0, 0, 12, 1, 0.19, ("wgmma",), {"HGMMA": 48}, 10, 196)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """flash-attn 4 "installed" for child processes; returns what its machine code was read as."""
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "interface.py").write_text(INTERFACE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(static_flash4, "installed", lambda: "4.9")
    read: list[tuple] = []

    def read_cubin(*given):
        read.append(given)
        return FACTS

    monkeypatch.setattr(static_flash4, "read_cubin", read_cubin)
    return read


def test_its_kernel_is_compiled_for_the_card_that_is_named_and_read(stand_in):
    facts = static_flash4.compile_form(Form(128, "causal"), 90)
    assert stand_in == [(b"128 True sm_90a", 90, 12, 0, ("wgmma",))]
    assert facts["registers"] == 168
    assert facts["shared_bytes"] is facts["occupancy"] is None
    assert static_flash4.names(Form(128, "causal"), 90)["form"] == "bf16 D 128, causal, version 4.9"


def test_a_compiler_that_fails_is_a_row_with_its_last_words(stand_in, tmp_path):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    (tmp_path / "flash_attn/cute/interface.py").write_text("raise ImportError('no cutlass here')")
    made = static_kernels.walk((100,), keep=lambda kernel: kernel == static_flash4.KERNEL)["rows"]
    assert [row["facts"] for row in made] == [None] * len(FORMS)
    assert {row["error"] for row in made} == {"RuntimeError: ImportError: no cutlass here"}


@pytest.mark.parametrize("version", ["4.9", None])
def test_it_stands_beside_ours_where_it_is_installed_and_says_how_where_not(version, monkeypatch):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    monkeypatch.setattr(static_flash4, "installed", lambda: version)
    monkeypatch.setattr(static_flash4, "compile_form", lambda form, capability: {"form": form})
    document = static_kernels.walk(keep=lambda kernel: kernel == static_flash4.KERNEL)
    if version is None:
        assert document["rows"] == []
        assert document["notes"] == ["flash-attn 4 is not installed: pip install --pre flash-attn-4"]
    else:
        assert [row["facts"]["form"] for row in document["rows"]] == [*FORMS] * len(CAPABILITIES)
        assert len({row["key"] for row in document["rows"]}) == len(document["rows"])
        assert document["notes"] == []
