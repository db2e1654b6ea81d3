"""Our numbers against packages that nobody here wrote; those that match one mechanism only are in that one's file.

``make test`` installs them all: the extra ``oracles``, and next to it, in ``.venv/oracles`` and on no other path, those
whose dependencies would replace torch (see ``.ci/make_environment.sh``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnlab_kernels import (
    ChunkedPrefill,
    DifferentialAttention,
    GroupedQueryAttention,
    RingAttention,
    SoftmaxMap,
)
from attnlab_kernels.masks import Causal, Full, Mask, Window
from attnlab_kernels.neighborhood import Neighborhood
from attnlab_kernels.operations.latent.reference import LatentInputs, latent_attend
from attnlab_kernels.operations.linear.api import linear_attend
from attnlab_kernels.operations.neighborhood.reference import run as neighborhood_run
from attnlab_kernels.operations.softmax import lower
from attnlab_kernels.operations.softmax.api import attend


def tensors(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(2, *shape, 16, generator=generator) for shape in shapes]


def tokens_first(*parts: Tensor) -> list[Tensor]:
    return [part.transpose(1, 2) for part in parts]


@pytest.mark.parametrize(
    ("window", "implementation"),
    [(1, "eager"), (5, "eager"), (40, "eager"), (1, "banded"), (5, "banded"), (5, "flex")],
)
def test_a_window_is_flash_linear_attentions(window, implementation):
    naive = pytest.importorskip("fla.ops.attn.naive", reason="needs flash-linear-attention")
    q, k, v = tensors(33, 33)
    want = naive.naive_parallel_attn(*tokens_first(q, k, v), window_size=window)[0].transpose(1, 2)
    got = attend(q, k, v, mask=Window(window - 1), implementation=implementation).output
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [1, 4, 8])
def test_a_window_is_local_attentions_which_counts_one_key_more(window):
    package = pytest.importorskip("local_attention", reason="needs local-attention")
    q, k, v = tensors(32, 32, heads=2)
    local = package.LocalAttention(
        window, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )
    got = attend(q, k, v, mask=Window(window)).output
    torch.testing.assert_close(got, local(q, k, v), atol=1e-6, rtol=0)


def test_linear_attention_is_the_causal_one_of_linear_attention_transformer():
    package = pytest.importorskip(
        "linear_attention_transformer.linear_attention_transformer",
        reason="needs linear-attention-transformer",
    )
    q, k, v = tensors(19, 19, heads=2)
    want = package.causal_linear_attn(q, k, v, bucket_size=1, eps=0.0)
    got = linear_attend(q.softmax(-1), k.exp(), v, causal=True, eps=0.0).output
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def merged_by_yunchang(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    update = pytest.importorskip("yunchang.ring.utils", reason="needs yunchang").update_out_and_lse
    out = lse = None
    for part, part_lse in parts:
        out, lse = update(out, lse, part.transpose(1, 2), part_lse)
    assert out is not None
    assert lse is not None
    return out.transpose(1, 2), lse.squeeze(-1).transpose(1, 2)


def merged_by_natten(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    natten = pytest.importorskip("natten", reason="needs natten")
    out, lse = natten.merge_attentions(
        [part.transpose(1, 2).contiguous() for part, _ in parts],
        [part.transpose(1, 2).contiguous() for _, part in parts],
        torch_compile=False,
        use_autograd_fix=False,
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


@pytest.mark.filterwarnings("ignore")  # both call torch by names that are going away
@pytest.mark.parametrize("merged", [merged_by_yunchang, merged_by_natten])
def test_parts_are_merged_as_elsewhere(merged, apart):
    q, k, v = tensors(9, 24)
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 24)):
        result = attend(q, k[:, :, start:stop], v[:, :, start:stop])
        assert result.lse is not None
        parts.append((result.output, result.lse))
    output, lse = lower.merge(parts)
    want, want_lse = merged(parts)
    torch.testing.assert_close(output, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=0)


def flash_reference(apart: Path) -> Callable[..., Any]:
    """``attention_ref`` of flash-attn-4, whose package itself imports only where its compiler is."""
    path = apart / "flash_attn/cute/testing.py"
    spec = importlib.util.spec_from_file_location("flash_attn_4_testing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attention_ref


@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (5, 17), (1, 9), (17, 5)])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(3), Window(2, 4)], ids=str)
def test_output_and_lse_are_flash_attention_4s_reference(queries, keys, mask, apart):
    pytest.importorskip("einops", reason="needs einops")
    band = mask.band()
    q, k, v = tensors(queries, keys)
    call: dict[str, Any] = {"causal": mask == Causal(), "return_lse": True}
    if isinstance(mask, Window):
        call["window_size"] = (band.left, band.right)
    want, _, lse = flash_reference(apart)(*tokens_first(q, k, v), **call)
    result = attend(q, k, v, mask=mask)
    torch.testing.assert_close(result.output, want.transpose(1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.lse, lse, atol=1e-6, rtol=0)


def test_absorbed_latent_attention_is_flash_attention_4s_with_its_own_scale(apart):
    pytest.importorskip("einops", reason="needs einops")
    generator = torch.Generator().manual_seed(0)
    heads, rank, rope, nope, value = 3, 12, 4, 6, 5
    inputs = LatentInputs(
        torch.randn(2, heads, 7, nope, generator=generator),
        torch.randn(2, heads, 7, rope, generator=generator),
        torch.randn(2, 7, rank, generator=generator),
        torch.randn(2, 7, rope, generator=generator),
        torch.randn(heads, nope + value, rank, generator=generator),
    )
    ours = latent_attend(inputs, form="absorbed", mask=Causal(), scale=(nope + rope) ** -0.5).output
    up_key, up_value = inputs.up.split((nope, value), dim=1)
    absorbed = torch.einsum("bhnd,hdr->bnhr", inputs.query_nope, up_key)
    # theirs divides by sqrt(rope + rank)
    factor = ((rope + rank) / (nope + rope)) ** 0.5
    key, latent = inputs.key_rope[:, :, None], inputs.latent[:, :, None]
    theirs = flash_reference(apart)(
        inputs.query_rope.transpose(1, 2) * factor, key, latent, causal=True, qv=absorbed * factor
    )[0]
    want = torch.einsum("bnhr,hvr->bhnv", theirs, up_value)
    torch.testing.assert_close(ours, want, atol=2e-6, rtol=1e-6)


@pytest.fixture
def xformers_masks(apart: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # it would take flash-attn-4, which lies beside it, for flash-attn 2
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    return importlib.import_module("xformers.ops.fmha.attn_bias")


def as_ours(bias: Any, queries: int, keys: int) -> np.ndarray[Any, Any]:
    return (bias.materialize((queries, keys)) == 0).numpy()


@pytest.mark.filterwarnings("ignore")  # xformers looks for kernels that a CPU has not
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 8), (8, 3)])
def test_masks_are_those_of_xformers(queries, keys, xformers_masks):

    def ours(mask: Mask) -> np.ndarray[Any, Any]:
        return mask.allowed(np.arange(queries), np.arange(keys), num_queries=queries, num_keys=keys)

    corner = xformers_masks.LowerTriangularFromBottomRightMask()
    assert np.array_equal(ours(Causal()), as_ours(corner, queries, keys))
    window = xformers_masks.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=3)
    assert np.array_equal(ours(Window(2)), as_ours(window, queries, keys))


@pytest.mark.filterwarnings("ignore")
def test_ragged_caches_are_masked_as_in_xformers(xformers_masks):
    theirs = xformers_masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[2, 1, 3], kv_padding=6, kv_seqlen=[4, 6, 3]
    )
    dense = as_ours(theirs, 6, 18)
    first = 0
    for sequence, (queries, length) in enumerate(((2, 4), (1, 6), (3, 3))):
        size = {"num_queries": queries, "num_keys": length}
        block = Causal().allowed(np.arange(queries), np.arange(length), **size)
        rows = dense[first : first + queries]
        assert np.array_equal(rows[:, 6 * sequence : 6 * sequence + length], block)
        assert rows.sum() == block.sum()
        first += queries


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_attention_and_its_map_are_those_of_onnx_attention_23(causal):
    pytest.importorskip("onnx", reason="needs onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    q, k, v = tensors(9, 9)
    outputs = ["out", "", "", "map"]
    # 3: what comes out of the softmax
    node = helper.make_node(
        "Attention", ["q", "k", "v"], outputs, is_causal=int(causal), qk_matmul_output_mode=3
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, part.shape)
            for name, part in zip("qkv", (q, k, v), strict=True)
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("out", "map")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    inputs = {name: part.numpy() for name, part in zip("qkv", (q, k, v), strict=True)}
    want, maps = (np.asarray(part) for part in ReferenceEvaluator(model).run(None, inputs))
    mask = Causal() if causal else Full()
    got = attend(q, k, v, mask=mask)
    torch.testing.assert_close(got.output, torch.as_tensor(want), atol=1e-6, rtol=0)
    assert got.lse is not None
    for head in range(4):
        own = SoftmaxMap(q[1, head].numpy(), k[1, head // 2].numpy(), got.lse[1, head].numpy(), 0.25, mask)
        np.testing.assert_allclose(own.tile(slice(None), slice(None)), np.asarray(maps)[1, head], atol=1e-6)


IN_JAX = """
import sys
import numpy as np
import jax
from jax import numpy as jnp
q, k, v = (jnp.asarray(np.load(sys.argv[1])[name]) for name in "qkv")
found = {}
for name, window in {"window": (4, 0), "both": (3, 2)}.items():
    found[name] = jax.nn.dot_product_attention(q, k, v, local_window_size=window)
found["causal"] = jax.nn.dot_product_attention(q, k, v, is_causal=True)
np.savez(sys.argv[2], **found)
"""


def test_windows_are_those_of_jax(apart, tmp_path):
    q, k, v = tensors(21, 21)
    first = [part.numpy() for part in tokens_first(q, k, v)]
    np.savez(tmp_path / "in.npz", q=first[0], k=first[1], v=first[2])
    # in a process of its own: jax starts threads, and this one forks
    done = subprocess.run(
        [sys.executable, "-c", IN_JAX, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")],
        env=os.environ | {"PYTHONPATH": str(apart), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    for name, mask in (("window", Window(4)), ("both", Window(3, 2)), ("causal", Causal())):
        want = torch.from_numpy(found[name]).transpose(1, 2)
        torch.testing.assert_close(attend(q, k, v, mask=mask).output, want, atol=1e-6, rtol=0)


def timms_attention(apart: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's layer without the rest of timm, which wants a torchvision that fits this torch."""
    for name, path in (("timm", "timm"), ("timm.layers", "timm/layers")):
        package = ModuleType(name)
        package.__path__ = [str(apart / path)]
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("config", "norm", "attention", "diff_attention"):
        monkeypatch.delitem(sys.modules, f"timm.layers.{name}", raising=False)
    return importlib.import_module("timm.layers.diff_attention").DiffAttention


@pytest.mark.parametrize("depth", [0, 3])
def test_differential_attention_is_timms_in_the_papers_layout(depth, apart, monkeypatch):
    torch.manual_seed(0)
    theirs = timms_attention(apart, monkeypatch)(32, num_heads=4, depth=depth).eval()
    torch.nn.init.uniform_(theirs.sub_norm.weight, 0.5, 2.0)
    ours = DifferentialAttention(
        32, 4, lambda_init="schedule", layer_idx=depth, causal=False, layout="paper"
    ).eval()
    state = theirs.state_dict()
    query, key, value = state["qkv.weight"].chunk(3)
    named = {name: state[name] for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")}
    named |= {"q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value}
    named |= {"norm.weight": state["sub_norm.weight"], "o_proj.weight": state["proj.weight"]}
    ours.load_state_dict(named, strict=True)
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        want = theirs(x) - state["proj.bias"]
        torch.testing.assert_close(ours(x)[0], want, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("causal", [True, False])
def test_the_lse_of_a_neighborhood_is_nattens(causal, apart):
    natten = pytest.importorskip("natten", reason="needs natten")
    where = Neighborhood((9, 7), (4, 3), (1, 2), (1, 1), (causal, False))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 7, 16, generator=generator) for _ in range(3))
    with torch.no_grad():
        want, lse = natten.na2d(
            *(part.movedim(1, -2).contiguous() for part in (q, k, v)),
            kernel_size=(4, 3),
            dilation=(1, 2),
            is_causal=(causal, False),
            return_lse=True,
        )
    found = neighborhood_run(q, k, v, where)
    torch.testing.assert_close(found.output, want.movedim(-2, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.lse, lse.movedim(-1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", [3, 5, 16])
def test_chunks_through_a_cache_are_transformers_own(chunk):
    from transformers import DynamicCache, LlamaConfig
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = LlamaAttention(config, layer_idx=0).eval()
    ours = ChunkedPrefill(chunk, GroupedQueryAttention(64, 8, 2, use_rotary=True)).eval()
    assert ours.attention_module is not None
    ours.attention_module.load_state_dict(theirs.state_dict(), strict=True)
    x, rotary, cache = torch.randn(1, 16, 64), LlamaRotaryEmbedding(config), DynamicCache(config=config)
    parts = []
    with torch.no_grad():
        for start in range(0, 16, chunk):
            part = x[:, start : start + chunk]
            positions = torch.arange(start, start + part.shape[1])[None]
            mask = create_causal_mask(config, part, None, cache, position_ids=positions)
            parts.append(theirs(part, rotary(part, positions), mask, cache)[0])
        torch.testing.assert_close(ours(x)[0], torch.cat(parts, dim=1), atol=1e-6, rtol=0)


AS_A_RANK = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from ring_attention_pytorch import RingAttention
from ring_attention_pytorch.tree_attn_decoding import tree_attn_decode
from ring_attention_pytorch.zig_zag_attention import zig_zag_attn, zig_zag_pad_seq, zig_zag_shard
from safetensors.torch import load_file, save_file
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
wait = timedelta(seconds=60)
dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=4, timeout=wait)
given = load_file(folder / "in.safetensors")
found = {}
for name, group, striped, rotary in (
    ("plain", 1, False, False), ("striped", 1, True, False), ("grouped", 2, False, False),
    ("rotary", 1, False, True), ("striped rotary", 1, True, True),
):
    layer = RingAttention(
        24, dim_head=8, heads=4, num_grouped_query_heads=group, causal=True, bucket_size=4, ring_attn=True,
        ring_seq_size=8, striped_ring_attn=striped, auto_shard_seq=True, prenorm=False, use_cuda_kernel=False,
        rotary_embed=rotary,
    )
    layer.to_qkv[1].weight.data = given[f"{name}.qkv"]
    layer.to_out.weight.data = given[f"{name}.out"]
    with torch.no_grad():
        found[name] = layer(given["x"][rank : rank + 1]).contiguous()
with torch.no_grad():
    padded, unpad = zig_zag_pad_seq(given["x"][:1])
    (own, queries, keys), gather = zig_zag_shard(padded)
    parts = [part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (own @ given["zigzag.qkv"].T).chunk(3, dim=-1)]
    heads = zig_zag_attn(*parts, attn_mask=queries[:, None] >= keys)
    found["zigzag"] = unpad(gather(heads.transpose(1, 2).flatten(2) @ given["zigzag.out"].T)).contiguous()
    found["tree"] = tree_attn_decode(*(given["tree." + name] for name in "qkv"))
save_file(found, folder / f"{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_ring_is_ring_attention_pytorchs_on_four_gloo_ranks(tmp_path):
    """31 tokens of 32 slots; forward only: the package's gradients of keys and values are wrong on a CPU."""
    from safetensors.torch import load_file, save_file

    if importlib.util.find_spec("ring_attention_pytorch") is None:
        pytest.skip("needs ring-attention-pytorch")
    torch.manual_seed(0)
    x = torch.randn(4, 31, 24)
    layers = {
        name: RingAttention(24, 4, head_dim=8, ring_size=4, **settings)
        for name, settings in {
            "plain": {},
            "striped": {"layout": "striped"},
            "grouped": {"num_kv_heads": 2},
            "rotary": {"use_rotary": True},
            "striped rotary": {"layout": "striped", "use_rotary": True},
            "zigzag": {"layout": "zigzag"},
        }.items()
    }
    given = {"x": x}
    for name, layer in layers.items():
        query, out = layer.q_proj.weight, layer.o_proj.weight
        if name == "grouped":
            # theirs reads key head h % 2, ours h // 2
            query = query.unflatten(0, (2, 2, 8)).transpose(0, 1).flatten(0, 2)
            out = out.unflatten(1, (2, 2, 8)).transpose(1, 2).flatten(1, 3)
        given[f"{name}.qkv"] = torch.cat((query, layer.k_proj.weight, layer.v_proj.weight)).detach()
        given[f"{name}.out"] = out.detach().contiguous()
    newest, keys, values = tensors(1, 31, heads=4, kv_heads=4)
    given |= {"tree.q": newest, "tree.k": keys, "tree.v": values}
    save_file(given, tmp_path / "in.safetensors")
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AS_A_RANK, str(rank), str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | loopback,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    shards = [attend(newest, k, v) for k, v in zip(keys.chunk(4, dim=2), values.chunk(4, dim=2), strict=True)]
    tree, _ = lower.merge([(part.output, part.lse) for part in shards if part.lse is not None])
    for rank in range(4):
        theirs = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(tree, theirs["tree"], atol=1e-6, rtol=0)
        for name, layer in layers.items():
            own = 0 if name == "zigzag" else rank
            with torch.no_grad():
                ours = layer(x[own : own + 1])
            torch.testing.assert_close(ours, theirs[name], atol=1e-6, rtol=0)


def test_what_the_extra_pins_is_what_is_installed():
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for line in project["project"]["optional-dependencies"]["oracles"]:
        name, _, pinned = line.partition("==")
        if not pinned:
            continue
        try:
            assert version(name) == pinned
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
