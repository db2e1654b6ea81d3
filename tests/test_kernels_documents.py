"""Laws of packed documents: each is attended to as if it were alone, and what cannot keep them apart refuses."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnlab_kernels
from attnlab_kernels import GroupedQueryAttention, SlidingWindowAttention, SoftmaxMap
from attnlab_kernels.masks import Causal, Documents, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax import chunked, flex, lower
from attnlab_kernels.operations.softmax.api import (
    IMPLEMENTATIONS,
    READ_DOCUMENTS,
    Unsupported,
    attend,
    supports,
)

LENGTHS = (5, 1, 17, 9)
HERE = ("eager", "sdpa_math", "sdpa_flash", "flex", "auto")


def tensors(queries: int, keys: int, batch: int = 1, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(batch, *shape, 16, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(3), Window(2, 1)], ids=str)
@pytest.mark.parametrize("name", HERE)
def test_each_document_is_attended_to_as_if_it_were_alone(name, mask):
    q, k, v = tensors(32, 32)
    packed = attend(q, k, v, mask=mask & Documents(LENGTHS), implementation=name)
    assert packed.lse is not None
    for queries, keys, values, output, lse in zip(
        *(part.split(LENGTHS, dim=2) for part in (q, k, v, packed.output, packed.lse)), strict=True
    ):
        alone = attend(queries, keys, values, mask=mask, implementation="eager")
        torch.testing.assert_close(output, alone.output, atol=1e-6, rtol=0)
        torch.testing.assert_close(lse, alone.lse, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 32), (11, 32), (32, 11), (40, 32)])
@pytest.mark.parametrize("name", [*HERE, "chunked"])
def test_documents_of_a_ragged_batch_agree_with_the_reference(name, queries, keys):
    q, k, v = tensors(queries, keys, batch=3)
    mask = Causal() & Documents((LENGTHS, (32,), (3, 29))) & Padding(((0, 32), (2, 30), (5, 9)))
    k[1, :, :2] = v[1, :, :2] = torch.nan
    want = attend(q, k, v, mask=mask, implementation="eager")
    if name == "chunked":
        output, lse = chunked.run(q, k, v, mask=mask, scale=0.25, chunk=7)
    else:
        found = attend(q, k, v, mask=mask, implementation=name)
        output, lse = found.output, found.lse
    torch.testing.assert_close(output, want.output, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, want.lse, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["eager", "sdpa_math", "sdpa_flash"])
def test_no_gradient_crosses_from_one_document_to_another(name):
    q, k, v = (part.requires_grad_() for part in tensors(32, 32))
    output = attend(q, k, v, mask=Causal() & Documents(LENGTHS), implementation=name).output
    grads = torch.autograd.grad(output[:, :, 6:23].square().sum(), (q, k, v))
    for grad in grads:
        assert grad[:, :, 6:23].abs().amin(dim=(0, 1, 3)).gt(0).any()
        assert not grad[:, :, :6].any()
        assert not grad[:, :, 23:].any()


def test_the_effective_map_keeps_documents_apart():
    q, k, v = tensors(32, 32)
    mask = Causal() & Documents(LENGTHS)
    result = attend(q, k, v, mask=mask)
    assert result.lse is not None
    drawn = SoftmaxMap(q[0, 3].numpy(), k[0, 1].numpy(), result.lse[0, 3].numpy(), 0.25, mask)
    tile = drawn.tile(slice(None), slice(None))
    np.testing.assert_allclose(tile @ v[0, 1].numpy(), result.output[0, 3].numpy(), atol=1e-6)
    np.testing.assert_allclose(drawn.row_sums(), 1, atol=1e-6)
    assert np.count_nonzero(tile) == mask.count(32, 32) == sum(n * (n + 1) // 2 for n in LENGTHS)


@pytest.mark.parametrize(("mask", "kind"), [(Full(), "full"), (Causal(), "causal")], ids=str)
def test_cost_follows_the_documents(mask, kind):
    """Blocks of the fused kernels hold each document's square and no more; flex visits the blocks on the diagonal."""
    size: dict[str, Any] = {"num_queries": 1024, "num_keys": 1024, "batch_size": 2}
    packed = mask & Documents((256,) * 4)
    blocks = lower.plan(packed, **size, has_bias=False, merge=True)
    assert {block.kind for block in blocks} == {kind}
    assert [(block.rows, block.keys) for block in blocks] == [
        (slice(start, start + 256), slice(start, start + 256)) for start in range(0, 1024, 256)
    ]
    listed = flex.block_mask(packed, 2, 1024, 1024, torch.device("cpu"))
    assert listed is not None
    assert listed.full_kv_num_blocks is not None
    assert int((listed.kv_num_blocks + listed.full_kv_num_blocks).sum()) == (16 if kind == "full" else 12)


def test_those_who_read_no_documents_say_so_by_name():
    q, k, v = tensors(32, 32)
    mask = Causal() & Documents(LENGTHS)
    for name in set(IMPLEMENTATIONS) - set(READ_DOCUMENTS):
        support = supports(name, q, k, v, mask=mask)
        assert not support
        assert "reads no document ids; got causal and 4 documents; use eager" in support.reason
        with pytest.raises(Unsupported, match="reads no document ids"):
            attend(q, k, v, mask=mask, implementation=name)


APART: dict[str, dict[str, Any]] = {
    "MultiHeadAttention": {},
    "SelfAttention": {},
    "GroupedQueryAttention": {},
    "SlidingWindowAttention": {"window_size": 20},
    "MultiHeadLatentAttention": {"kv_lora_rank": 8, "qk_rope_head_dim": 4},
    "FlashAttention": {},
    "MemoryEfficientAttention": {},
    "EfficientAttention": {},
    "DifferentialAttention": {},
    "SwitchHeadAttention": {},
}
REFUSING: dict[str, dict[str, Any]] = {
    "LinearAttention": {},
    "LinformerAttention": {"max_seq_length": 32, "num_slots": 4},
    "SparseAttention": {},
    "BlockSparseAttention": {"block_size": 4},
    "RingAttention": {"ring_size": 2},
    "PagedAttention": {"num_blocks": 16},
}


@pytest.mark.parametrize("name", APART)
def test_a_module_keeps_documents_apart(name):
    torch.manual_seed(0)
    module = getattr(attnlab_kernels, name)(32, 4, **APART[name]).eval()
    x = torch.randn(1, 32, 32)
    other = x.clone()
    other[:, 6:23] += 1
    with torch.no_grad():
        found = [module(given, attention_mask=Documents(LENGTHS)) for given in (x, other)]
    first, second = (part[0] if isinstance(part, tuple) else part for part in found)
    change = (first - second).abs().amax(dim=-1)[0]
    assert change[6:23].max() > 0.1
    assert torch.cat((change[:6], change[23:])).max() < 1e-6


@pytest.mark.parametrize("name", REFUSING)
def test_a_module_that_reads_one_band_refuses_documents(name):
    module = getattr(attnlab_kernels, name)(32, 4, **REFUSING[name]).eval()
    with pytest.raises(ValueError, match="one band of keys here; got document ids"):
        module(torch.randn(1, 32, 32), attention_mask=Documents(LENGTHS))


def test_a_module_prefills_packed_documents_and_decodes_into_the_last():
    torch.manual_seed(0)
    module = GroupedQueryAttention(32, 4, 2).eval()
    x, mask = torch.randn(1, 32, 32), Documents(LENGTHS)
    with torch.no_grad():
        _, _, cache = module(x[:, :29], attention_mask=mask, use_cache=True)
        steps = [
            module(x[:, i : i + 1], attention_mask=mask, past_key_value=cache, use_cache=True)[0]
            for i in (29, 30, 31)
        ]
        alone = module(x[:, 23:])[0]
    torch.testing.assert_close(torch.cat(steps, dim=1), alone[:, -3:], atol=1e-6, rtol=0)


def test_documents_are_refused_where_a_cache_has_dropped_keys():
    module = SlidingWindowAttention(32, 4, window_size=4).eval()
    x = torch.randn(1, 9, 32)
    with torch.no_grad():
        _, _, cache = module(x, attention_mask=Documents((3, 6)), use_cache=True)
        with pytest.raises(ValueError, match="documents once a cache has dropped keys"):
            module(x[:, :1], attention_mask=Documents((3, 6)), past_key_value=cache, use_cache=True)


@pytest.mark.filterwarnings("ignore")  # xformers looks for kernels that a CPU has not
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("BlockDiagonalMask", Full()),
        ("BlockDiagonalCausalMask", Causal()),
        ("BlockDiagonalCausalLocalAttentionMask", Window(2)),
    ],
)
def test_packed_documents_are_masked_as_in_xformers(theirs, ours: Mask, apart: Path, monkeypatch):
    # it would take flash-attn-4, which lies beside it, for flash-attn 2
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    base = bias.BlockDiagonalCausalMask if theirs.endswith("LocalAttentionMask") else getattr(bias, theirs)
    made = base.from_seqlens(list(LENGTHS))
    if base.__name__ != theirs:
        made = made.make_local_attention(3)
    assert type(made).__name__ == theirs
    want = (made.materialize((32, 32)) == 0).numpy()
    rows = np.arange(32)
    np.testing.assert_array_equal(
        (ours & Documents(LENGTHS)).allowed(rows, rows, num_queries=32, num_keys=32), want
    )
