"""Claims about memory: relative to multi-head, cache sizes, and the lengths at which each is said to run out."""

from __future__ import annotations

from attnlab.presets.claim import Claim, Which
from attnlab.presets.grid import Grid, Preset, Size

K = 1024
GUIDE = "Attention Mechanisms, the guide that this lab started from"
# a quarter of a 7B model's head size, so that r + d_rope stands to 2 H d as 512 + 64 does to 2 · 32 · 128
SMALL_LATENT = {"kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
CPU = Size(1024, 32, (256,), repeats=5, parameters={"multi_head_latent": SMALL_LATENT})
GPU = Size(4096, 32, (8 * K,), repeats=20)
MULTI_HEAD = Which("multi_head")
CACHE_HOW = (
    "bytes that the cache of a decoding step holds (cache.nbytes()), over multi-head's for the same tokens"
)
FOLKLORE = (
    "The cache is exactly Hkv / H; more than that counts weights and activations, which depend on the model"
)


def _cache(claim_id: str, says: str, share: float, which: Which, note: str, source: str) -> Claim:
    return Claim(claim_id, says, "cache_bytes", share, share, which, MULTI_HEAD, CACHE_HOW, source, note=note)


RELATIVE = Preset(
    name="memory-relative",
    title="Memory relative to multi-head",
    about="The bar chart of memory by mechanism that guides show without saying memory of what, at which length.",
    grids=(
        Grid(
            "claims: cache of a decoding step",
            (
                "multi_head",
                {"grouped_query": {"num_kv_heads": 8}},
                {"grouped_query": {"num_kv_heads": 4}},
                "multi_head_latent",
                "linear",
                "paged",
            ),
            CPU,
            GPU,
            phase="decode",
            record=("memory",),
        ),
        Grid(
            "claims: peak of the standard and the tiled kernel",
            ("multi_head",),
            Size(512, 8, (2048,)),
            GPU,
            implementations=("eager", "sdpa_flash"),
            record=("memory",),
        ),
    ),
    claims=(
        _cache(
            "gqa-4",
            "Grouped-query, g = 4: 85 %",
            0.85,
            Which("grouped_query", {"num_kv_heads": 8}),
            FOLKLORE,
            GUIDE,
        ),
        _cache(
            "gqa-8",
            "Grouped-query, g = 8: 55 %",
            0.55,
            Which("grouped_query", {"num_kv_heads": 4}),
            FOLKLORE,
            GUIDE,
        ),
        _cache(
            "mla",
            "Multi-head latent: 10 %",
            0.1,
            Which("multi_head_latent"),
            "It is (r + d_rope) / (2 H d), so it falls with the number of heads",
            GUIDE,
        ),
        _cache(
            "linear",
            "Linear attention: 20 %",
            0.2,
            Which("linear"),
            "The state is constant, so the ratio is what one likes by choice of the length",
            GUIDE,
        ),
        _cache(
            "paged",
            "PagedAttention: 65 % (optimal)",
            0.65,
            Which("paged"),
            "For the same tokens pages hold a little more; what they save is room set aside for tokens that never come",
            GUIDE,
        ),
        Claim(
            "flash",
            "FlashAttention: 65 % of the peak",
            "attention_peak_memory_bytes",
            0.65,
            0.65,
            Which("multi_head", implementation="sdpa_flash"),
            Which("multi_head", implementation="eager"),
            "peak of the attention kernel alone, over the eager one's that forms the scores",
            GUIDE,
            note="The scores grow with n², what is left with n: the ratio falls with the length",
        ),
    ),
)

CACHE_SIZES = Preset(
    name="cache-sizes",
    title="Cache sizes and speed-ups",
    about="The table of cache-optimised mechanisms: how much smaller the cache, how much faster the step.",
    grids=(
        Grid(
            "claims: a decoding step by cache",
            ("multi_head", "grouped_query", "multi_head_latent", "paged"),
            Size(1024, 32, (1024,), 8, repeats=15, parameters={"multi_head_latent": SMALL_LATENT}),
            Size(4096, 32, (16 * K,), 8, repeats=50, parameters={"paged": {"num_blocks": 2 * K}}),
            phase="decode",
        ),
        Grid(
            "claims: FlashAttention-3 beside the standard",
            ("multi_head", "flash_attention_3"),
            Size(256, 8, (512,)),
            Size(4096, 32, (8 * K,), repeats=20),
            record=("timing",),
        ),
    ),
    claims=(
        _cache(
            "gqa-size",
            "Grouped-query: 1 / g of multi-head's cache (g = 4)",
            0.25,
            Which("grouped_query"),
            "",
            GUIDE,
        ),
        _cache(
            "mla-size",
            "Multi-head latent: 1 / 16 of multi-head's cache",
            1 / 16,
            Which("multi_head_latent"),
            "No law: (r + d_rope) / (2 H d) is 1 / 14.2 for 32 heads of 128, and 1 / 57 for DeepSeek-V3's 128",
            GUIDE,
        ),
        Claim(
            "gqa-speed",
            "Grouped-query: 1.5 to 2 times as fast",
            "latency_ms",
            1.5,
            2,
            Which("grouped_query"),
            MULTI_HEAD,
            "time of one decoding step of a bare module, over multi-head's",
            GUIDE,
            note="A step of one small module is mostly its projections",
        ),
        Claim(
            "mla-speed",
            "Multi-head latent: 1.5 times as fast",
            "latency_ms",
            1.5,
            1.5,
            Which("multi_head_latent"),
            MULTI_HEAD,
            "time of one decoding step of a bare module, over multi-head's",
            GUIDE,
        ),
        Claim(
            "paged-speed",
            "PagedAttention: 2 to 3 times as fast",
            "latency_ms",
            2,
            3,
            Which("paged"),
            MULTI_HEAD,
            "time of one decoding step at the same batch, over multi-head's from a contiguous cache",
            GUIDE,
            note="Pages make room for a larger batch; at the same batch they only add a table",
        ),
        Claim(
            "fa3-speed",
            "FlashAttention-3: 2 times as fast",
            "latency_ms",
            2,
            2,
            Which("flash_attention_3"),
            MULTI_HEAD,
            "time of a forward pass, over multi-head's",
            GUIDE,
            device="H100",
        ),
    ),
)


def _length(
    claim_id: str, says: str, tokens: int, which: Which, runs_out: bool, note: str = "", why: str = ""
) -> Claim:
    how = "the longest run of its grid, and how it ended"
    quantity = "runs_out" if runs_out else "reaches"
    return Claim(claim_id, says, quantity, tokens, tokens, which, None, how, GUIDE, note=note, open=why)


SCALING = Preset(
    name="context-scaling",
    title="Context scaling from 2K to 256K",
    about="The lengths at which each mechanism is said to run out of memory, and those that it is said to reach.",
    grids=(
        Grid(
            "claims: how far the standard goes",
            ("multi_head",),
            Size(64, 2, (2 * K, 4 * K), repeats=1),
            Size(4096, 32, (2 * K, 4 * K, 8 * K, 16 * K, 32 * K), repeats=1),
            implementations=("eager",),
            record=("memory",),
        ),
        Grid(
            "claims: how far the tiled kernel goes",
            ("flash",),
            Size(16, 1, (2 * K, 64 * K), repeats=1),
            Size(4096, 32, (2 * K, 64 * K, 128 * K), repeats=1),
            record=("memory",),
        ),
        Grid(
            "claims: how far linear and sparse go",
            ("linear", {"sparse": {"sparsity_pattern": "local", "local_window": 64}}),
            Size(16, 1, (2 * K, 256 * K), repeats=1),
            Size(1024, 8, (2 * K, 64 * K, 256 * K), repeats=1),
            record=("memory",),
        ),
    ),
    claims=(
        _length(
            "standard",
            "Standard attention runs out of memory at 4K tokens",
            4 * K,
            Which("multi_head", implementation="eager"),
            True,
            "Its scores take n² · heads · batch numbers: 4K tokens of 32 heads in 16 bits are 1 GiB a layer",
        ),
        _length(
            "flash",
            "FlashAttention runs out of memory at 64K tokens",
            64 * K,
            Which("flash"),
            True,
            "Its own memory grows with n; a model's weights, cache and activations may run out, not the kernel",
        ),
        _length("linear", "Linear attention reaches 256K tokens", 256 * K, Which("linear"), False),
        _length("sparse", "Sparse attention reaches 256K tokens", 256 * K, Which("sparse"), False),
        _length(
            "ring",
            "Ring attention reaches 256K tokens (distributed)",
            256 * K,
            Which("ring"),
            False,
            why="said of several devices; here all ranks are simulated on one, which then holds all their keys",
        ),
    ),
)

MEMORY_PRESETS = (RELATIVE, CACHE_SIZES, SCALING)
