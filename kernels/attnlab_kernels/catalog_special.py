"""Catalog: one machine's kernel, many machines, noise cancelling, images, routed experts, long prompts."""

from __future__ import annotations

from dataclasses import replace

from attnlab_kernels.catalog_efficient import GRID_HEIGHT
from attnlab_kernels.catalog_record import Mechanism, Parameter, every_head, key_heads, nothing, pairs, shard
from attnlab_kernels.catalog_standard import KEY_HEADS

SPECIAL_RECORDS = (
    Mechanism(
        id="flash_attention_3",
        title="FlashAttention-3",
        class_name="FlashAttention3",
        summary="FlashAttention for Hopper: asynchronous copies, softmax beside matrix products, scaled FP8.",
        formula="as FlashAttention; FP8: S = (q̂·k̂) s_q s_k / √d with q̂, k̂ turned by a Hadamard matrix",
        complexity="O(n² d) time; O(n) extra memory",
        year=2024,
        paper_title="FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision (Shah et al.)",
        paper_url="https://arxiv.org/abs/2407.08608",
        use_cases=("training and prefill on H100 and H200",),
        not_for="any GPU that is not Hopper",
        parameters=(
            Parameter("use_fp8", "bool", False, help="forward in FP8 e4m3 with block scales"),
            Parameter("fp8_block_size", "int", 128, minimum=1, help="rows that share one scale"),
        ),
        operation="softmax",
        swap="exact",
        swap_note="same function in 16 bits; with use_fp8 the rounding is measured",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import FlashAttention3\n\n"
            'attn = FlashAttention3({"embed_dim": 512, "num_heads": 8})\n'
            "output = attn(torch.randn(1, 64, 512), causal=True)\n"
        ),
        cache=key_heads,
        cache_formula="2 · L · Hkv · d · b · n",
    ),
    Mechanism(
        id="ring",
        title="Ring attention",
        class_name="RingAttention",
        summary="Each rank keeps its queries while keys and values travel round a ring; parts merge by log-sum-exp.",
        formula="O = Σ_r e^{LSE_r − LSE} O_r,  LSE = ln Σ_r e^{LSE_r}",
        complexity="O(n² / P) time and O(n / P) memory a rank; 2 (P−1) n / P · Hkv · d · b bytes sent a rank",
        year=2023,
        paper_title="Ring Attention with Blockwise Transformers for Near-Infinite Context (Liu et al.)",
        paper_url="https://arxiv.org/abs/2310.01889",
        use_cases=("contexts that do not fit one device",),
        not_for="a single device",
        parameters=(
            Parameter(
                "ring_size", "int", 4, minimum=1, maximum=1024, help="ranks, simulated in one process here"
            ),
            Parameter(
                "layout",
                "choice",
                "contiguous",
                choices=("contiguous", "striped", "zigzag"),
                help="who owns which token; causal work is even in the last two",
            ),
            Parameter("block_size", "int", None, minimum=1, help="keys met at a time; empty: a rank's"),
            KEY_HEADS,
        ),
        operation="ring",
        swap="exact",
        swap_note="same numbers, from ranks that are simulated in one process",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import RingAttention\n\n"
            "attn = RingAttention(dim=512, num_heads=8, ring_size=4)\n"
            "output = attn(torch.randn(1, 64, 512))\n"
        ),
        cache=shard,
        cache_formula="2 · L · Hkv · d · b · n / P a rank",
    ),
    Mechanism(
        id="differential",
        title="Differential attention",
        class_name="DifferentialAttention",
        summary="Two softmax maps a head, the second subtracted: what both attend to cancels out.",
        formula="O = (softmax(Q₁K₁ᵀ/√d) − λ softmax(Q₂K₂ᵀ/√d)) V,  then RMSNorm and × (1 − λ_init)",
        complexity="as multi-head attention with twice the heads",
        year=2024,
        paper_title="Differential Transformer (Ye et al.)",
        paper_url="https://arxiv.org/abs/2410.05258",
        use_cases=("language models trained for retrieval in noisy contexts",),
        not_for="weights trained with plain attention",
        parameters=(
            Parameter(
                "lambda_init",
                "float",
                0.8,
                minimum=0,
                maximum=1,
                help="λ_init, constant over the layers",
                used_with=("lambda_schedule", (False,)),
            ),
            Parameter(
                "lambda_schedule",
                "bool",
                False,
                help="λ_init of the paper's layer instead: 0.8 - 0.6 e^(-0.3 l)",
                used_with=("variant", ("v1",)),
            ),
            Parameter(
                "lambda_learnable",
                "bool",
                True,
                help="learn λ, or keep it at λ_init",
                used_with=("variant", ("v1",)),
            ),
            Parameter(
                "variant", "choice", "v1", choices=("v1", "v2"), help="v2: λ from each token, and no norm"
            ),
            Parameter(
                "layout",
                "choice",
                "paper",
                choices=("paper", "halves"),
                help="rows of one head in the projections (v1): neighbours, or halves as in DiffLlama",
                used_with=("variant", ("v1",)),
            ),
            KEY_HEADS,
        ),
        operation="differential",
        swap="not_applicable",
        swap_note="needs training: plain weights have no second map",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import DifferentialAttention\n\n"
            "attn = DifferentialAttention(dim=512, num_heads=4)\n"
            "output, _, cache = attn(torch.randn(1, 64, 512), use_cache=True)\n"
        ),
        cache=pairs,
        cache_formula="4 · L · H · d · b · n (two keys of d and a value of 2d a head)",
    ),
    Mechanism(
        id="neighborhood",
        title="Neighborhood attention",
        class_name="NeighborhoodAttention",
        summary="Each pixel attends to the k nearest on every axis; at a border the window shifts, it never shrinks.",
        formula="P_ij = softmax_j(q_i·k_j / √d) over the k (or k × k) neighbours of i",
        complexity="O(n k d) in one dimension, O(n k² d) in two",
        year=2022,
        paper_title="Neighborhood Attention Transformer (Hassani et al.)",
        paper_url="https://arxiv.org/abs/2204.07143",
        use_cases=("images, video and audio",),
        not_for="autoregressive text",
        parameters=(
            Parameter("kernel_size", "int", 7, minimum=2, help="neighbours on each axis, the pixel included"),
            Parameter("dilation", "int", 1, minimum=1, help="distance between neighbours"),
            Parameter("stride", "int", 1, minimum=1, help="neighbouring queries that share a window"),
            Parameter("dims", "int", 1, minimum=1, maximum=2, help="axes: a sequence, or an image"),
            Parameter(
                "relative_position_bias", "bool", False, help="learn a bias for each place in the window"
            ),
            replace(GRID_HEIGHT, used_with=("dims", (2,))),
        ),
        operation="neighborhood",
        swap="approximate",
        swap_note="tokens outside the neighbourhood are cut off, causal where the model is; the loss is measured",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import NeighborhoodAttention2D\n\n"
            "attn = NeighborhoodAttention2D(d_model=256, num_heads=8, kernel_size=7)\n"
            "output, _ = attn(torch.randn(1, 16, 16, 256))  # [batch, height, width, channels]\n"
        ),
        cache=nothing,
        cache_formula="none",
    ),
    Mechanism(
        id="switch_head",
        title="SwitchHead",
        class_name="SwitchHeadAttention",
        summary="Few heads, many experts: each token's value and output projections are chosen by sigmoid gates.",
        formula="v_j = Σ_e s^V_e(x_j) x_j V_e,  y_i = Σ_h Σ_e s^O_e(x_i) (A_h v)_i O_{h,e}",
        complexity="O(n² H d) time with a small H; projections of the chosen experts only",
        year=2023,
        paper_title="SwitchHead: Accelerating Transformers with Mixture-of-Experts Attention (Csordás et al.)",
        paper_url="https://arxiv.org/abs/2312.07987",
        use_cases=("training with fewer attention maps at the same quality",),
        not_for="weights trained without experts",
        parameters=(
            Parameter("num_experts", "int", 4, minimum=1, help="experts of a head"),
            Parameter(
                "top_k", "int", 1, minimum=1, help="experts that each token uses; the paper uses 2 or 3"
            ),
            Parameter(
                "router",
                "choice",
                "sigmoid",
                choices=("sigmoid", "softmax"),
                help="gates of the experts; the paper's are sigmoid",
            ),
            Parameter("aux_loss_coeff", "float", 0.01, minimum=0, help="weight of the balancing loss"),
        ),
        operation="expert_projection",
        swap="not_applicable",
        swap_note="needs training: plain weights have no experts",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import SwitchHeadAttention\n\n"
            "attn = SwitchHeadAttention(d_model=512, num_heads=2, num_experts=4, top_k=2)\n"
            "output, _, aux_loss = attn(torch.randn(1, 64, 512))\n"
        ),
        cache=every_head,
        cache_formula="2 · L · H · d · b · n, with a small H",
    ),
    Mechanism(
        id="chunked_prefill",
        title="Chunked prefill",
        class_name="ChunkedPrefill",
        summary="A long prompt enters in chunks that attend to all before them, so decoding steps fit in between.",
        formula="chunk c: softmax(Q_c [K_{<c}, K_c]ᵀ / √d + mask) [V_{<c}, V_c]",
        complexity="O(n² d) time in all; scores of one chunk in memory; keys are read n / (2 C) times more",
        year=2023,
        paper_title="SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills (Agrawal et al.)",
        paper_url="https://arxiv.org/abs/2308.16369",
        use_cases=("serving with bounded delay between tokens",),
        not_for="bidirectional models",
        parameters=(
            Parameter("chunk_size", "int", 512, minimum=1, help="prompt tokens of a chunk"),
            KEY_HEADS,
        ),
        operation="softmax",
        swap="exact",
        swap_note="same numbers, chunk after chunk",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import ChunkedPrefill, GroupedQueryAttention\n\n"
            "attn = GroupedQueryAttention(dim=512, num_heads=8, num_kv_heads=2)\n"
            "prefill = ChunkedPrefill(chunk_size=16, attention_module=attn)\n"
            "output, cache = prefill(torch.randn(1, 64, 512))\n"
        ),
        cache=key_heads,
        cache_formula="as the attention that it wraps",
    ),
)
