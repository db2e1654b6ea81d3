"""The four stacks that are named together, as experiments that compose their mechanisms."""

from __future__ import annotations

from attnlab.presets.grid import Grid, Preset, Size
from attnlab.presets.quoted_memory import K
from attnlab.starter import TEXT

MODERN = Preset(
    name="stack-modern-llm",
    title="Modern language model",
    about=(
        "Grouped-query for the cache, FlashAttention for the memory of a step, a sliding window for length, RoPE for "
        "position: on SmolLM2, whose weights have grouped-query and RoPE, and as a bare module."
    ),
    grids=(
        Grid(
            "stack: grouped-query and RoPE in trained weights, with flash and a window",
            ("multi_head", "flash", {"sliding_window": {"window_size": 32}}),
            Size(0, 0, (64,), repeats=1),
            Size(0, 0, (2 * K,), repeats=10),
            record=("maps", "accuracy"),
            layers=(0, 14, 29),
            model="smollm2-135m",
            text=TEXT,
        ),
        Grid(
            "stack: grouped-query, flash, and both with a window",
            (
                "multi_head",
                "flash",
                {"grouped_query": {"num_kv_heads": 2}},
                {"sliding_window": {"window_size": 128, "num_kv_heads": 2}},
            ),
            Size(256, 8, (256, 512), repeats=3),
            Size(1024, 8, (2 * K, 16 * K), repeats=20),
            record=("maps", "timing", "memory"),
        ),
    ),
    correction=(
        "Not all of it in each: Llama 3 has no sliding window (Mistral 7B v0.1 had one of 4096, its successors none; "
        "Gemma 2 and 3 alternate it with full layers)."
    ),
)

SERVING = Preset(
    name="stack-serving",
    title="Serving",
    about="Pages for the cache, chunks for the prompt, fewer key heads or a latent for its size.",
    grids=(
        Grid(
            "stack: a decoding step from pages",
            (
                "multi_head",
                {"paged": {"num_kv_heads": 8}},
                {"paged": {"num_kv_heads": 2}},
                "multi_head_latent",
            ),
            Size(
                256,
                8,
                (256,),
                batches=(1, 4),
                parameters={
                    "multi_head_latent": {
                        "kv_lora_rank": 64,
                        "qk_rope_head_dim": 16,
                        "qk_nope_head_dim": 32,
                        "v_head_dim": 32,
                    }
                },
            ),
            Size(1024, 8, (4 * K,), batches=(1, 16), repeats=30, parameters={"paged": {"num_blocks": 8192}}),
            phase="decode",
        ),
        Grid(
            "stack: a prompt in chunks",
            ("multi_head", {"chunked_prefill": {"chunk_size": 128, "num_kv_heads": 2}}),
            Size(256, 8, (512,)),
            Size(1024, 8, (16 * K,), repeats=20, parameters={}),
            record=("maps", "timing", "memory"),
        ),
    ),
)

RESEARCH = Preset(
    name="stack-research",
    title="Research",
    about="Differential attention for quality, a latent for the cache, experts for capacity, beside multi-head.",
    grids=(
        Grid(
            "stack: differential, latent, experts",
            (
                "multi_head",
                "differential",
                "multi_head_latent",
                {"switch_head": {"num_experts": 4, "top_k": 2}},
            ),
            Size(
                256,
                4,
                (256,),
                parameters={
                    "multi_head_latent": {
                        "kv_lora_rank": 64,
                        "qk_rope_head_dim": 16,
                        "qk_nope_head_dim": 48,
                        "v_head_dim": 64,
                    }
                },
            ),
            Size(2048, 16, (4 * K,), repeats=20),
            record=("maps", "timing", "memory", "statistics"),
        ),
    ),
    correction=(
        "DeepSeek-V3, named as its example, has the latent and experts in its feed-forward, no differential attention."
    ),
)

VISION = Preset(
    name="stack-vision",
    title="Vision",
    about="Neighbourhoods for what is near, a coarser grid of keys for what is far, cross-attention to read features.",
    grids=(
        Grid(
            "stack: stages of a pyramid",
            (
                "multi_head",
                {"neighborhood": {"kernel_size": 7, "dims": 2}},
                {"efficient": {"variant": "spatial_reduction", "reduction": 2}},
                {"cross": {"context_length": 64}},
            ),
            Size(128, 4, (64, 256, 1024), repeats=3),
            Size(512, 8, (256, 1024, 4096), repeats=20),
            causal=False,
            record=("maps", "timing", "memory"),
        ),
    ),
)

STACKS = (MODERN, SERVING, RESEARCH, VISION)
