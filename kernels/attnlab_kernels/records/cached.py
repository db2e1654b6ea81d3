"""A smaller or better kept cache: grouped-query, latent, paged; and FlashAttention-3."""

import math
from typing import Any

from attnlab_kernels.mechanism_record import Mechanism, Parameter, all_heads_cache, grouped_cache


def latent_cache(
    *,
    tokens: int,
    layers: int,
    bytes_per_element: int,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    **_: Any,
) -> int:
    """One latent and one rotary key a token, shared by all heads: ``L (r + dr) b``."""
    return layers * (kv_lora_rank + qk_rope_head_dim) * bytes_per_element * tokens


def paged_cache(*, tokens: int, block_size: int = 16, **shape: Any) -> int:
    """Whole blocks, and a four-byte block id for each."""
    blocks = math.ceil(tokens / block_size)
    return grouped_cache(tokens=blocks * block_size, **shape) + 4 * blocks


GROUPED_QUERY = Mechanism(
    id="grouped_query",
    title="Grouped-query attention",
    class_name="GroupedQueryAttention",
    summary="Several query heads share one key-value head, which divides the cache by the group's size.",
    formula="O_h = softmax(Q_h K_gᵀ / √d) V_g,  g = ⌊h / (H / Hkv)⌋",
    complexity="O(n² d) time, cache Hkv / H of multi-head",
    year=2023,
    paper_title="GQA: Training Generalized Multi-Query Transformer Models (Ainslie et al.)",
    paper_url="https://arxiv.org/abs/2305.13245",
    use_cases=("serving language models", "long contexts", "decoding that is bound by memory bandwidth"),
    not_for="Saving arithmetic in prefill: the scores cost the same.",
    swap="approximate",
    swap_note="Exact with the model's own key-value heads; fewer are made by mean-pooling, and the loss is measured.",
    snippet=(
        "from attnlab_kernels import GroupedQueryAttention\n\n"
        "attention = GroupedQueryAttention(dim=4096, num_heads=32, num_kv_heads=8)\n"
        "output, _, cache = attention(x, use_cache=True)"
    ),
    cache_bytes=grouped_cache,
    parameters=(
        Parameter(
            name="num_kv_heads",
            kind="int",
            default=None,
            minimum=1,
            maximum=1024,
            help="Key-value heads; must divide the query heads. Empty keeps the model's own.",
        ),
    ),
    built=True,
)

MULTI_HEAD_LATENT = Mechanism(
    id="multi_head_latent",
    title="Multi-head latent attention",
    class_name="MultiHeadLatentAttention",
    summary="Keys and values are expanded from one small latent a token, which alone is cached.",
    formula="c = RMS(W_DKV x);  s = (q_nope·W_UK c + q_rope·k_rope) / √(d_n + d_r);  o = W_UV (P c)",
    complexity="O(n² d) time; decode reads r + d_r numbers a token instead of 2 H d",
    year=2024,
    paper_title="DeepSeek-V2 (DeepSeek-AI)",
    paper_url="https://arxiv.org/abs/2405.04434",
    use_cases=("the smallest cache at full quality", "long-context serving"),
    not_for="Prefill in the absorbed form: it multiplies the arithmetic there.",
    operation="latent",
    swap="approximate",
    swap_note="Trained keys and values can be factored by SVD; the loss is measured.",
    snippet=(
        "from attnlab_kernels import MultiHeadLatentAttention\n\n"
        "attention = MultiHeadLatentAttention(dim=2048, num_heads=16, kv_lora_rank=512)\n"
        "output, _, cache = attention(x, use_cache=True)"
    ),
    cache_bytes=latent_cache,
    parameters=(
        Parameter(name="kv_lora_rank", kind="int", default=512, minimum=1, help="Size of the latent."),
        Parameter(
            name="qk_rope_head_dim",
            kind="int",
            default=64,
            minimum=2,
            help="Size of the shared rotary key; even.",
        ),
    ),
)

PAGED = Mechanism(
    id="paged",
    title="PagedAttention",
    class_name="PagedAttention",
    summary="The cache lives in blocks that a table maps, so that sequences grow, fork and share without copying.",
    formula="position p of sequence s lies in block table[s][p // B], slot p mod B",
    complexity="O(n² d) time; under one block of waste a sequence",
    year=2023,
    paper_title="Efficient Memory Management for Large Language Model Serving with PagedAttention (Kwon et al.)",
    paper_url="https://arxiv.org/abs/2309.06180",
    use_cases=("serving many sequences", "prefix sharing", "beam search"),
    not_for="Training.",
    operation="paged",
    swap="exact",
    swap_note="The same numbers; only where the cache lies changes.",
    snippet=(
        "from attnlab_kernels import PagedAttention\n\n"
        "attention = PagedAttention(d_model=4096, num_heads=32, block_size=16, num_blocks=1024)\n"
        "output, _, state = attention(x, seq_id=0, use_cache=True)"
    ),
    cache_bytes=paged_cache,
    parameters=(
        Parameter(
            name="block_size", kind="int", default=16, minimum=1, maximum=1024, help="Tokens of a block."
        ),
        Parameter(name="num_blocks", kind="int", default=1024, minimum=1, help="Blocks of the pool."),
    ),
)

FLASH_ATTENTION_3 = Mechanism(
    id="flash_attention_3",
    title="FlashAttention-3",
    class_name="FlashAttention3",
    summary="FlashAttention for Hopper: asynchronous copies and products, and FP8 with block scales.",
    formula="as FlashAttention; FP8: (Q M)(K M)ᵀ = Q Kᵀ with a random orthogonal M, one scale a block",
    complexity="O(n² d) time, O(n) extra memory",
    year=2024,
    paper_title="FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision (Shah et al.)",
    paper_url="https://arxiv.org/abs/2407.08608",
    use_cases=("training and prefill on H100 and H200",),
    not_for="Anything before Hopper; gradients in FP8.",
    swap="exact",
    swap_note="The same numbers in 16 bit; with FP8 the rounding error is measured.",
    snippet=(
        "from attnlab_kernels import FlashAttention3\n\n"
        "attention = FlashAttention3(embed_dim=2048, num_heads=16, use_fp8=True)\n"
        "output = attention(x, causal=True)"
    ),
    cache_bytes=all_heads_cache,
    parameters=(
        Parameter(
            name="use_fp8", kind="bool", default=False, help="FP8 e4m3 with block scales, forward only."
        ),
        Parameter(
            name="fp8_block_size", kind="int", default=128, minimum=16, help="Rows that share one scale."
        ),
    ),
)

RECORDS = (GROUPED_QUERY, MULTI_HEAD_LATENT, PAGED, FLASH_ATTENTION_3)
