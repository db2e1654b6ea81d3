"""Ring, differential, neighborhood, SwitchHead, chunked prefill."""

import math
from typing import Any

from attnlab_kernels.mechanism_record import Mechanism, Parameter, all_heads_cache, grouped_cache, no_cache


def ring_cache(*, tokens: int, ring_size: int = 4, **shape: Any) -> int:
    """One rank's share."""
    return grouped_cache(tokens=math.ceil(tokens / ring_size), **shape)


RING = Mechanism(
    id="ring",
    title="Ring attention",
    class_name="RingAttention",
    summary="Each device owns a slice of the sequence; keys and values travel round the ring.",
    formula="lse' = log(e^lse + e^lse_b);  o' = o e^{lse-lse'} + o_b e^{lse_b-lse'}",
    complexity="O(n² d / P) time and O(n / P) memory on each of P devices",
    year=2023,
    paper_title="Ring Attention with Blockwise Transformers for Near-Infinite Context (Liu et al.)",
    paper_url="https://arxiv.org/abs/2310.01889",
    use_cases=("training beyond 128K tokens", "several devices with a fast link"),
    not_for="One device.",
    operation="ring",
    swap="exact",
    swap_note="The same numbers up to the order of summation.",
    snippet=(
        "from attnlab_kernels import RingAttention\n\n"
        "attention = RingAttention(dim=2048, num_heads=16, ring_size=4)\n"
        "output = attention(x)  # under torch.distributed"
    ),
    cache_bytes=ring_cache,
    parameters=(
        Parameter(
            name="ring_size", kind="int", default=4, minimum=1, maximum=1024, help="Devices in the ring."
        ),
    ),
)

DIFFERENTIAL = Mechanism(
    id="differential",
    title="Differential attention",
    class_name="DifferentialAttention",
    summary="The difference of two softmax maps: what both attend to alike is cancelled.",
    formula="O = (softmax(Q₁K₁ᵀ/√d) - λ softmax(Q₂K₂ᵀ/√d)) V, then RMSNorm and (1 - λ_init)",
    complexity="O(n² d) time, two maps a head",
    year=2024,
    paper_title="Differential Transformer (Ye et al.)",
    paper_url="https://arxiv.org/abs/2410.05258",
    use_cases=("research on noise and sinks", "retrieval in long contexts"),
    not_for="Weights that were not trained with it.",
    operation="differential",
    swap="not_applicable",
    swap_note="Needs training: a model has neither the second map nor λ.",
    snippet=(
        "from attnlab_kernels import DifferentialAttention\n\n"
        "attention = DifferentialAttention(dim=1024, num_heads=8)\n"
        "output, _, cache = attention(x, use_cache=True)"
    ),
    cache_bytes=all_heads_cache,
    parameters=(
        Parameter(
            name="lambda_init",
            kind="float",
            default=0.8,
            minimum=0.0,
            maximum=1.0,
            help="λ at the start of training.",
        ),
    ),
)

NEIGHBORHOOD = Mechanism(
    id="neighborhood",
    title="Neighborhood attention",
    class_name="NeighborhoodAttention",
    summary="Each pixel sees its k x k nearest neighbours; at the border the window shifts and keeps its size.",
    formula="O_i = softmax over j ∈ ρ_k(i) of q_i·k_j / √d + b_{i-j}, times V",
    complexity="O(N k² d) time for N pixels",
    year=2022,
    paper_title="Neighborhood Attention Transformer (Hassani et al.)",
    paper_url="https://arxiv.org/abs/2204.07143",
    use_cases=("images", "high resolution", "video (3-D)"),
    not_for="Text decoding.",
    operation="neighborhood",
    swap="not_applicable",
    swap_note="Lives on a grid of pixels; a text model has none.",
    snippet=(
        "from attnlab_kernels import NeighborhoodAttention\n\n"
        "attention = NeighborhoodAttention(d_model=128, num_heads=4, kernel_size=7)\n"
        "output, _ = attention(x)  # x: [batch, height, width, 128]"
    ),
    cache_bytes=no_cache,
    parameters=(
        Parameter(name="kernel_size", kind="int", default=7, minimum=1, help="Neighbours an axis."),
        Parameter(name="dilation", kind="int", default=1, minimum=1, help="Distance between neighbours."),
    ),
)

SWITCH_HEAD = Mechanism(
    id="switch_head",
    title="SwitchHead",
    class_name="SwitchHeadAttention",
    summary="Few heads, but each picks experts for its values (by key token) and outputs (by query token).",
    formula="v_j = Σ_{e ∈ top-k} σ(W_S x_j)_e V_e x_j;  y_i = Σ_h Σ_{e ∈ top-k} σ(W_D x_i)_e O_e (A_h v)_i",
    complexity="O(n² d) time for H maps instead of H · E",
    year=2023,
    paper_title="SwitchHead: Accelerating Transformers with Mixture-of-Experts Attention (Csordás et al.)",
    paper_url="https://arxiv.org/abs/2312.07987",
    use_cases=("mixture-of-experts research", "fewer maps at equal quality"),
    not_for="Weights that were not trained with it.",
    operation="expert_projection",
    swap="not_applicable",
    swap_note="Needs training: a model has no experts and no router.",
    snippet=(
        "from attnlab_kernels import SwitchHeadAttention\n\n"
        "attention = SwitchHeadAttention(d_model=512, num_heads=2, num_experts=4, top_k=2)\n"
        "output, _, aux_loss = attention(x)"
    ),
    cache_bytes=all_heads_cache,
    parameters=(
        Parameter(name="num_experts", kind="int", default=4, minimum=1, help="Experts of a head."),
        Parameter(name="top_k", kind="int", default=1, minimum=1, help="Experts that a token uses."),
    ),
)

CHUNKED_PREFILL = Mechanism(
    id="chunked_prefill",
    title="Chunked prefill",
    class_name="ChunkedPrefill",
    summary="A long prompt is read in chunks, so that decoding of other sequences goes on between them.",
    formula="chunk c attends to all cached keys and, causally, to itself",
    complexity="O(n² d) time, O(C n) scores at once",
    year=2023,
    paper_title="SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills (Agrawal et al.)",
    paper_url="https://arxiv.org/abs/2308.16369",
    use_cases=("long prompts", "serving with steady latency"),
    not_for="Bidirectional encoders.",
    swap="exact",
    swap_note="The same numbers; only the order of the work changes.",
    snippet=(
        "from attnlab_kernels import ChunkedPrefill, GroupedQueryAttention\n\n"
        "inner = GroupedQueryAttention(dim=1024, num_heads=16, num_kv_heads=4)\n"
        "output, cache = ChunkedPrefill(chunk_size=512, attention_module=inner)(x)"
    ),
    cache_bytes=grouped_cache,
    parameters=(
        Parameter(name="chunk_size", kind="int", default=512, minimum=1, help="Tokens read at once."),
    ),
)

RECORDS = (RING, DIFFERENTIAL, NEIGHBORHOOD, SWITCH_HEAD, CHUNKED_PREFILL)
