"""Less time or less memory: flash, linear, sparse, sliding window, efficient."""

from typing import Any

from attnlab_kernels.mechanism_record import Mechanism, Parameter, all_heads_cache, grouped_cache, no_cache


def window_cache(*, tokens: int, window_size: int = 256, **shape: Any) -> int:
    """A rolling buffer: no more than ``window_size`` tokens are kept."""
    return grouped_cache(tokens=min(tokens, window_size), **shape)


def linear_state(*, heads: int, head_dim: int, layers: int, feature_dim: int | None = None, **_: Any) -> int:
    """State ``S [f, d]`` and normaliser ``z [f]`` of each head in float32, whatever the length."""
    features = feature_dim or head_dim
    return layers * heads * (features * head_dim + features) * 4


FLASH = Mechanism(
    id="flash",
    title="FlashAttention",
    class_name="FlashAttention",
    summary="Exact attention in tiles with an online softmax: the n x n matrix is never written to memory.",
    formula="for each key tile: m' = max(m, rowmax S);  l = e^{m-m'} l + Σ e^{S-m'};  O = e^{m-m'} O + e^{S-m'} V",
    complexity="O(n² d) time, O(n) extra memory (the log-sum-exp)",
    year=2022,
    paper_title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (Dao et al.)",
    paper_url="https://arxiv.org/abs/2205.14135",
    use_cases=("training", "prefill", "any exact attention on a GPU"),
    not_for="Getting the whole map out of the kernel: rebuild it from Q, K and LSE instead.",
    swap="exact",
    swap_note="The same numbers up to rounding, by a fused kernel.",
    snippet=(
        "from attnlab_kernels import FlashAttention\n\n"
        "attention = FlashAttention(hidden_size=2048, num_heads=16, block_size=1024, causal=True)\n"
        "output = attention(x)"
    ),
    cache_bytes=all_heads_cache,
    parameters=(
        Parameter(
            name="block_size",
            kind="int",
            default=1024,
            minimum=16,
            maximum=65536,
            help="Logical key-value chunk of the tiled reference; a GPU kernel chooses its own tiles and reports them.",
        ),
    ),
    built=True,
)

LINEAR = Mechanism(
    id="linear",
    title="Linear attention",
    class_name="LinearAttention",
    summary="A feature map replaces the softmax, so that the past fits into one matrix a head.",
    formula="O_i = φ(q_i)ᵀ S_i / (φ(q_i)ᵀ z_i + ε);  S_i = Σ_{j≤i} φ(k_j) v_jᵀ;  z_i = Σ_{j≤i} φ(k_j)",
    complexity="O(n f d) time, O(f d) state",
    year=2020,
    paper_title="Transformers are RNNs (Katharopoulos et al.); Performers (Choromanski et al., 2009.14794)",
    paper_url="https://arxiv.org/abs/2006.16236",
    use_cases=("very long sequences", "constant memory while decoding", "edge devices"),
    not_for="Sharp retrieval of single tokens; weights trained with softmax.",
    operation="linear",
    swap="approximate",
    swap_note="Runs in trained weights, but what it computes is far from softmax: the loss is measured.",
    snippet=(
        "from attnlab_kernels import LinearAttention\n\n"
        "attention = LinearAttention(dim=512, num_heads=8, feature_map='elu')\n"
        "output, state = attention(x, use_cache=True)"
    ),
    cache_bytes=linear_state,
    parameters=(
        Parameter(
            name="feature_map",
            kind="choice",
            default="elu",
            choices=("elu", "relu", "favor+"),
            help="φ; elu is elu(x) + 1, favor+ the Performer's positive random features.",
        ),
    ),
)

SPARSE = Mechanism(
    id="sparse",
    title="Sparse attention",
    class_name="SparseAttention",
    summary="Each query sees a fixed pattern of keys: local, strided, global, random blocks.",
    formula="O_i = softmax over j ∈ A(i) of q_i·k_j / √d, times V",
    complexity="O(n √n d) strided or fixed, O(n (w + g + r) d) for Longformer and BigBird",
    year=2019,
    paper_title="Generating Long Sequences with Sparse Transformers (Child et al.)",
    paper_url="https://arxiv.org/abs/1904.10509",
    use_cases=("long documents", "training at 32-128K tokens", "global tokens with local context"),
    not_for="Short inputs, where the pattern covers nearly everything and its bookkeeping costs more.",
    swap="approximate",
    swap_note="Drops keys that the weights were trained to see: the loss is measured.",
    snippet=(
        "from attnlab_kernels import SparseAttention\n\n"
        "attention = SparseAttention(dim=512, num_heads=8, sparsity_pattern='strided', stride=64)\n"
        "output, _, _ = attention(x)"
    ),
    cache_bytes=all_heads_cache,
    parameters=(
        Parameter(
            name="sparsity_pattern",
            kind="choice",
            default="local",
            choices=("local", "strided", "fixed", "local_global", "longformer", "bigbird"),
            help="Which keys a query sees.",
        ),
        Parameter(name="local_window", kind="int", default=256, minimum=1, help="Keys of the local part."),
        Parameter(name="stride", kind="int", default=64, minimum=1, help="Distance between strided keys."),
    ),
)

SLIDING_WINDOW = Mechanism(
    id="sliding_window",
    title="Sliding-window attention",
    class_name="SlidingWindowAttention",
    summary="A token sees itself and the window_size - 1 tokens before it; layers widen the view.",
    formula="O_i = softmax over i - W < j ≤ i of q_i·k_j / √d, times V",
    complexity="O(n W d) time, O(W) cache",
    year=2023,
    paper_title="Mistral 7B (Jiang et al.); the idea: Longformer (Beltagy et al., 2004.05150)",
    paper_url="https://arxiv.org/abs/2310.06825",
    use_cases=("long autoregressive contexts", "a bounded key-value cache", "edge devices"),
    not_for="Looking things up further back than the window times the number of layers.",
    swap="approximate",
    swap_note="Exact while the window covers the input; otherwise the loss (KL, perplexity) is measured.",
    snippet=(
        "from attnlab_kernels import SlidingWindowAttention\n\n"
        "attention = SlidingWindowAttention(dim=4096, num_heads=32, window_size=4096, num_kv_heads=8)\n"
        "output, _, cache = attention(x, use_cache=True)"
    ),
    cache_bytes=window_cache,
    parameters=(
        Parameter(
            name="window_size",
            kind="int",
            default=256,
            minimum=1,
            maximum=1_048_576,
            help="Keys that a query sees, its own included. Mistral 7B used 4,096.",
        ),
    ),
    built=True,
)

EFFICIENT = Mechanism(
    id="efficient",
    title="Efficient attention",
    class_name="EfficientAttention",
    summary="Three ideas of that name: chunks (Rabe-Staats), two softmaxes (Shen), fewer keys (PVT, SegFormer).",
    formula="Shen: softmax_d(Q) (softmax_n(K)ᵀ V)",
    complexity="O(n² d) time and O(√n) memory; O(n d²); O(n² / R² d)",
    year=2021,
    paper_title="Self-attention Does Not Need O(n²) Memory (Rabe, Staats); Shen et al., 1812.01243",
    paper_url="https://arxiv.org/abs/2112.05682",
    use_cases=("memory-bound training", "segmentation (spatial reduction)"),
    not_for="Causal decoding with the two-softmax form, which normalises over the whole sequence.",
    swap="exact",
    swap_note="The chunked form is exact; the other two need training.",
    snippet=(
        "from attnlab_kernels import EfficientAttention\n\n"
        "attention = EfficientAttention(hidden_size=512, num_heads=8, variant='memory_efficient')\n"
        "output = attention(x)"
    ),
    cache_bytes=no_cache,
    parameters=(
        Parameter(
            name="variant",
            kind="choice",
            default="memory_efficient",
            choices=("memory_efficient", "linear", "spatial_reduction"),
            help="Rabe-Staats, Shen, or spatial reduction.",
        ),
    ),
)

RECORDS = (FLASH, LINEAR, SPARSE, SLIDING_WINDOW, EFFICIENT)
