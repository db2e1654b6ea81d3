"""Multi-head, self- and cross-attention: what the others are measured against."""

from attnlab_kernels.mechanism_record import Mechanism, Parameter, all_heads_cache, grouped_cache

TRANSFORMER = "Attention Is All You Need (Vaswani et al.)"
TRANSFORMER_URL = "https://arxiv.org/abs/1706.03762"

MULTI_HEAD = Mechanism(
    id="multi_head",
    title="Multi-head attention",
    class_name="MultiHeadAttention",
    summary="Every head compares every query with every key it may see; the reference for all others.",
    formula="O = concat_h softmax(Q_h K_hᵀ / √d + mask) V_h · W_O",
    complexity="O(n² d) time, O(n²) memory if the map is formed, O(n) in a fused kernel",
    year=2017,
    paper_title=TRANSFORMER,
    paper_url=TRANSFORMER_URL,
    use_cases=(
        "short and medium contexts",
        "encoders and classification (ViT, BERT)",
        "the baseline of a study",
    ),
    not_for="Long contexts: its key-value cache holds every head of every token.",
    swap="exact",
    swap_note="The model's own attention, computed by the chosen kernel.",
    snippet=(
        "from attnlab_kernels import MultiHeadAttention\n\n"
        "attention = MultiHeadAttention(hidden_size=768, num_heads=12, dropout=0.1)\n"
        "output, _ = attention(x)  # x: [batch, tokens, 768]"
    ),
    cache_bytes=all_heads_cache,
    built=True,
)

SELF = Mechanism(
    id="self",
    title="Self-attention",
    class_name="SelfAttention",
    summary="Queries, keys and values come from one sequence, bidirectional or causal.",
    formula="Q, K, V = x W_Q, x W_K, x W_V;  O = softmax(Q Kᵀ / √d + mask) V",
    complexity="O(n² d) time",
    year=2017,
    paper_title=TRANSFORMER,
    paper_url=TRANSFORMER_URL,
    use_cases=("sequence modelling", "encoders", "teaching"),
    not_for="Two sequences of different kinds: that is cross-attention.",
    swap="exact",
    swap_note="The same function as multi-head attention over one sequence.",
    snippet=(
        "from attnlab_kernels import SelfAttention\n\n"
        "attention = SelfAttention(hidden_size=512, num_heads=8, is_causal=True)\n"
        "output, weights = attention(x, return_attention=True)"
    ),
    cache_bytes=all_heads_cache,
    parameters=(
        Parameter(
            name="is_causal", kind="bool", default=False, help="Each token sees only itself and the past."
        ),
    ),
)

CROSS = Mechanism(
    id="cross",
    title="Cross-attention",
    class_name="CrossAttention",
    summary="Queries of one sequence attend to keys and values of another: text to image, decoder to encoder.",
    formula="Q = x W_Q;  K, V = c W_K, c W_V;  O = softmax(Q Kᵀ / √d + mask_c) V",
    complexity="O(n m d) time for n queries and m context tokens",
    year=2017,
    paper_title=TRANSFORMER,
    paper_url=TRANSFORMER_URL,
    use_cases=("encoder-decoder models", "text and image or audio together", "detection (DETR)"),
    not_for="One sequence alone.",
    swap="not_applicable",
    swap_note="Needs a model with a second sequence; a decoder-only model has none.",
    snippet=(
        "from attnlab_kernels import CrossAttention\n\n"
        "attention = CrossAttention(query_dim=512, key_dim=768, num_heads=8)\n"
        "output = attention(x, context)"
    ),
    # tokens here are the context's: computed once, then static
    cache_bytes=grouped_cache,
)

RECORDS = (MULTI_HEAD, SELF, CROSS)
