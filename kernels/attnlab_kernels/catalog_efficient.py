"""Catalog: the same numbers at another cost, and other numbers at a lower one."""

from __future__ import annotations

from dataclasses import replace

from attnlab_kernels.catalog_record import (
    Mechanism,
    Parameter,
    exact_only,
    key_heads,
    latent,
    local_window,
    pages,
    state,
)
from attnlab_kernels.catalog_standard import KEY_HEADS

GRID_HEIGHT = Parameter(
    "grid_height",
    "int",
    None,
    minimum=1,
    help="rows of the image that the tokens of a bare module form; empty: as near to a square as they allow",
)

EFFICIENT_RECORDS = (
    Mechanism(
        id="flash",
        title="FlashAttention",
        class_name="FlashAttention",
        summary="Exact attention in tiles with a running softmax: the n × n matrix never reaches memory.",
        formula="m' = max(m, rowmax S),  O = e^{m−m'} O + e^{S−m'} V,  LSE = m + ln l",
        complexity="O(n² d) time; O(n) extra memory (the log-sum-exp)",
        year=2022,
        paper_title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (Dao et al.)",
        paper_url="https://arxiv.org/abs/2205.14135",
        use_cases=("training and prefill wherever a kernel exists", "long sequences that eager cannot hold"),
        not_for="reading probabilities from the kernel: rebuild them from Q, K and the log-sum-exp",
        parameters=(),
        operation="softmax",
        swap="exact",
        swap_note="same function, other order of summation",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import FlashAttention\n\n"
            "attn = FlashAttention(hidden_size=512, num_heads=8, block_size=1024, causal=True)\n"
            "output = attn(torch.randn(1, 64, 512))\n"
        ),
        cache=key_heads,
        cache_formula="2 · L · Hkv · d · b · n",
    ),
    Mechanism(
        id="linear",
        title="Linear attention",
        class_name="LinearAttention",
        summary="The softmax becomes a product of feature maps, so keys and values fold into one state.",
        formula="O_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i,  S_i = Σ_{j≤i} φ(k_j) v_jᵀ,  z_i = Σ_{j≤i} φ(k_j)",
        complexity="O(n f d) time; a state of f × d a head, whatever n",
        year=2020,
        paper_title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        paper_url="https://arxiv.org/abs/2006.16236",
        use_cases=("very long sequences", "decoding with constant memory"),
        not_for="sharp retrieval of single tokens; weights trained with a softmax",
        parameters=(
            Parameter(
                "feature_map",
                "choice",
                "elu",
                choices=("elu", "relu", "softmax_kernel", "identity"),
                help="φ; softmax_kernel is Performer's FAVOR+",
                used_with=("variant", ("kernel",)),
            ),
            Parameter(
                "num_features",
                "int",
                None,
                minimum=1,
                help="random features of softmax_kernel; empty: d ln d",
                used_with=("feature_map", ("softmax_kernel",)),
            ),
            Parameter(
                "variant",
                "choice",
                "kernel",
                choices=("kernel", "linformer"),
                help="a feature map, or Linformer's softmax over slots (never causal)",
            ),
            Parameter(
                "num_slots",
                "int",
                64,
                minimum=1,
                help="mixtures of the keys (linformer)",
                used_with=("variant", ("linformer",)),
            ),
            Parameter(
                "max_seq_length",
                "int",
                2048,
                minimum=1,
                help="most keys that slots mix (linformer)",
                used_with=("variant", ("linformer",)),
            ),
            Parameter(
                "eps",
                "float",
                1e-6,
                minimum=0,
                maximum=1,
                help="added to the denominator",
                used_with=("variant", ("kernel",)),
            ),
        ),
        operation="linear",
        swap="approximate",
        swap_note="another similarity than the weights were trained with; the loss is measured",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import LinearAttention\n\n"
            'attn = LinearAttention(dim=512, num_heads=8, feature_map="elu")\n'
            "output, cache = attn(torch.randn(1, 64, 512), use_cache=True)\n"
        ),
        cache=state,
        cache_formula="4 · L · H · (f · d + f), constant",
    ),
    Mechanism(
        id="sparse",
        title="Sparse attention",
        class_name="SparseAttention",
        summary="A fixed pattern of allowed pairs: local, strided, local with global tokens, or BigBird's blocks.",
        formula="P_ij = softmax_j(q_i·k_j / √d) over (i, j) in the pattern",
        complexity="O(n w) local, O(n √n) strided, in kernels that skip blocks",
        year=2019,
        paper_title="Generating Long Sequences with Sparse Transformers (Child et al.)",
        paper_url="https://arxiv.org/abs/1904.10509",
        use_cases=("long documents", "generation of images and audio"),
        not_for="short sequences, where the skipped work is less than the bookkeeping",
        parameters=(
            Parameter(
                "sparsity_pattern",
                "choice",
                "local",
                choices=("local", "strided", "fixed", "local_global", "longformer", "bigbird"),
                help="which pairs are allowed",
            ),
            Parameter(
                "local_window",
                "int",
                256,
                minimum=1,
                help="keys of the local part, the query's own included",
                used_with=("sparsity_pattern", ("local", "local_global", "longformer")),
            ),
            Parameter(
                "global_tokens",
                "int",
                1,
                minimum=0,
                help="first tokens that everyone sees",
                used_with=("sparsity_pattern", ("local_global", "longformer", "bigbird")),
            ),
            Parameter(
                "num_random",
                "int",
                3,
                minimum=0,
                help="random blocks of a BigBird row",
                used_with=("sparsity_pattern", ("bigbird",)),
            ),
            Parameter(
                "stride",
                "int",
                64,
                minimum=1,
                help="distance of strided, block of fixed",
                used_with=("sparsity_pattern", ("strided", "fixed")),
            ),
            Parameter(
                "summary_tokens",
                "int",
                1,
                minimum=1,
                help="last keys of a fixed block that later ones see",
                used_with=("sparsity_pattern", ("fixed",)),
            ),
            Parameter(
                "block_size",
                "int",
                64,
                minimum=1,
                help="tokens of a BigBird block",
                used_with=("sparsity_pattern", ("bigbird",)),
            ),
            Parameter(
                "sliding_blocks",
                "int",
                3,
                minimum=1,
                help="neighbouring BigBird blocks, odd",
                used_with=("sparsity_pattern", ("bigbird",)),
            ),
            Parameter(
                "seed",
                "int",
                0,
                minimum=0,
                help="of BigBird's random blocks, drawn once and for all",
                used_with=("sparsity_pattern", ("bigbird",)),
            ),
            KEY_HEADS,
        ),
        operation="softmax",
        swap="approximate",
        swap_note="pairs outside the pattern are cut off; the loss is measured",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import SparseAttention\n\n"
            'attn = SparseAttention(dim=512, num_heads=8, sparsity_pattern="strided", stride=16)\n'
            "output, _, cache = attn(torch.randn(1, 64, 512))\n"
        ),
        cache=local_window,
        cache_formula="2 · L · Hkv · d · b · n; local: min(n, w) instead of n",
    ),
    Mechanism(
        id="efficient",
        title="Efficient attention",
        class_name="EfficientAttention",
        summary="Three different things under one name: exact in chunks, softmax on each side, or fewer keys.",
        formula="memory_efficient: exact · linear: σ(Q)(σ(K)ᵀ V) · spatial_reduction: K, V of a strided convolution",
        complexity="O(n²) time and O(√n) memory · O(n d²) · O(n² / R²)",
        year=2021,
        paper_title="Self-attention Does Not Need O(n²) Memory (Rabe and Staats)",
        paper_url="https://arxiv.org/abs/2112.05682",
        use_cases=("exact attention where no fused kernel runs", "vision backbones (spatial reduction)"),
        not_for="causal models in its linear and spatial variants",
        parameters=(
            Parameter(
                "variant",
                "choice",
                "memory_efficient",
                choices=("memory_efficient", "linear", "spatial_reduction"),
                help="Rabe and Staats 2021, Shen et al. 2018, or PVT / SegFormer 2021",
            ),
            Parameter(
                "chunk_size",
                "int",
                128,
                minimum=1,
                help="queries and keys of a chunk (memory_efficient)",
                used_with=("variant", ("memory_efficient",)),
            ),
            Parameter(
                "reduction",
                "int",
                2,
                minimum=1,
                help="side of the convolution (spatial_reduction)",
                used_with=("variant", ("spatial_reduction",)),
            ),
            replace(GRID_HEIGHT, used_with=("variant", ("spatial_reduction",))),
        ),
        operation="softmax",
        swap="exact",
        swap_note="the memory_efficient variant only: same function in chunks",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import EfficientAttention\n\n"
            'attn = EfficientAttention(512, 8, variant="memory_efficient", chunk_size=32)\n'
            "output = attn(torch.randn(1, 64, 512), return_dict=True).output\n"
        ),
        cache=exact_only,
        cache_formula="2 · L · H · d · b · n (memory_efficient); none for the others",
    ),
    Mechanism(
        id="multi_head_latent",
        title="Multi-head latent attention",
        class_name="MultiHeadLatentAttention",
        summary="Keys and values of all heads are rebuilt from one small latent a token; only that is cached.",
        formula="c = RMSNorm(W_DKV x),  k_h = [W_UK,h c | k_rope],  v_h = W_UV,h c",
        complexity="O(n² d) time; a cache of r + d_rope numbers a token, whatever the number of heads",
        year=2024,
        paper_title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        paper_url="https://arxiv.org/abs/2405.04434",
        use_cases=("serving with long contexts (DeepSeek V2 and V3)",),
        not_for="prefill in its absorbed form, which costs 3.4 times the scores",
        parameters=(
            Parameter("kv_lora_rank", "int", 512, minimum=1, help="r, width of the latent"),
            Parameter("q_lora_rank", "int", None, minimum=1, help="width of the query latent; empty: none"),
            Parameter("qk_rope_head_dim", "int", 64, minimum=2, help="rotary part of a key, even"),
            Parameter("qk_nope_head_dim", "int", 128, minimum=1, help="part of a key without position"),
            Parameter("v_head_dim", "int", 128, minimum=1, help="width of a value"),
            Parameter(
                "form",
                "choice",
                "auto",
                choices=("auto", "naive", "absorbed"),
                help="build each head's keys, or attend to the latents; auto: whichever is less work",
            ),
        ),
        operation="latent",
        swap="approximate",
        swap_note="a low-rank latent from the singular values of trained keys and values; the loss is measured",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import MultiHeadLatentAttention\n\n"
            "attn = MultiHeadLatentAttention(dim=512, num_heads=4, kv_lora_rank=128)\n"
            "output, _, cache = attn(torch.randn(1, 64, 512), use_cache=True)\n"
        ),
        cache=latent,
        cache_formula="L · (r + d_rope) · b · n",
    ),
    Mechanism(
        id="paged",
        title="PagedAttention",
        class_name="PagedAttention",
        summary="The cache lives in fixed blocks of a pool, found through a table, shared by copy-on-write.",
        formula="softmax(q K[table]ᵀ / √d) V[table]",
        complexity="as the attention it serves; waste below one block a sequence and layer",
        year=2023,
        paper_title="Efficient Memory Management for Large Language Model Serving with PagedAttention (Kwon et al.)",
        paper_url="https://arxiv.org/abs/2309.06180",
        use_cases=("serving many sequences of unknown length (vLLM)", "sharing a common prefix"),
        not_for="training",
        parameters=(
            Parameter("block_size", "int", 16, minimum=1, help="tokens of a block"),
            Parameter("num_blocks", "int", 1024, minimum=1, help="blocks of the pool"),
            KEY_HEADS,
        ),
        operation="paged",
        swap="exact",
        swap_note="same numbers, another home for keys and values",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import PagedAttention\n\n"
            "attn = PagedAttention(d_model=512, num_heads=8, block_size=16, num_blocks=64)\n"
            "output, _, state = attn(torch.randn(1, 64, 512), seq_id=0, use_cache=True)\n"
        ),
        cache=pages,
        cache_formula="⌈n / s⌉ · s · 2 · L · Hkv · d · b + 4 · ⌈n / s⌉",
    ),
)
