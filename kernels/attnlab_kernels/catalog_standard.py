"""Catalog: attention as it was first written, and the forms that share or bound its keys."""

from __future__ import annotations

from attnlab_kernels.catalog_record import Mechanism, Parameter, every_head, key_heads, window

KEY_HEADS = Parameter(
    "num_kv_heads",
    "int",
    None,
    minimum=1,
    help="key and value heads, a divisor of the query heads; empty: as the model has them, a quarter in a bare module",
)

STANDARD_RECORDS = (
    Mechanism(
        id="multi_head",
        title="Multi-head attention",
        class_name="MultiHeadAttention",
        summary="Every head compares each query with each key and averages the values by the softmax of the scores.",
        formula="O = concat_h softmax(Q_h K_hᵀ / √d + mask) V_h · W_O",
        complexity="O(n² d) time; O(n²) memory when the scores are formed, O(n) through a fused kernel",
        year=2017,
        paper_title="Attention Is All You Need (Vaswani et al.)",
        paper_url="https://arxiv.org/abs/1706.03762",
        use_cases=("the baseline of every comparison", "encoders and decoders of moderate length"),
        not_for="long decoding: its cache grows with every head",
        parameters=(),
        operation="softmax",
        swap="exact",
        swap_note="the model's own attention, computed by our kernels",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import MultiHeadAttention\n\n"
            "attn = MultiHeadAttention(hidden_size=768, num_heads=12, dropout=0.1).eval()\n"
            "output, _ = attn(torch.randn(1, 64, 768))\n"
        ),
        cache=every_head,
        cache_formula="2 · L · H · d · b · n",
    ),
    Mechanism(
        id="self",
        title="Self-attention",
        class_name="SelfAttention",
        summary="Queries, keys and values come from the same sequence: each token gathers from the others.",
        formula="O = softmax(X W_Q (X W_K)ᵀ / √d + mask) X W_V",
        complexity="O(n² d) time; O(n²) memory when the scores are formed",
        year=2016,
        paper_title="Long Short-Term Memory-Networks for Machine Reading (Cheng et al.)",
        paper_url="https://arxiv.org/abs/1601.06733",
        use_cases=("sequence modelling", "the layer inside every transformer block"),
        not_for="relating two sequences: that is cross-attention",
        parameters=(),
        operation="softmax",
        swap="exact",
        swap_note="what a decoder-only or encoder-only model has already",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import SelfAttention\n\n"
            "attn = SelfAttention(hidden_size=256, num_heads=4, is_causal=True)\n"
            "output, weights = attn(torch.randn(1, 64, 256), return_attention=True)\n"
        ),
        cache=every_head,
        cache_formula="2 · L · H · d · b · n",
    ),
    Mechanism(
        id="cross",
        title="Cross-attention",
        class_name="CrossAttention",
        summary="Queries come from one sequence, keys and values from another, with lengths of their own.",
        formula="O = softmax(X W_Q (C W_K)ᵀ / √d) C W_V",
        complexity="O(n m d) time for n queries and m context tokens; never causal",
        year=2014,
        paper_title="Neural Machine Translation by Jointly Learning to Align and Translate (Bahdanau et al.)",
        paper_url="https://arxiv.org/abs/1409.0473",
        use_cases=("encoder-decoder models", "text that reads an image or audio"),
        not_for="decoder-only language models",
        parameters=(
            Parameter(
                "context_dim", "int", None, minimum=1, help="width of the context; empty: as the queries"
            ),
            Parameter(
                "context_length",
                "int",
                None,
                minimum=1,
                maximum=1 << 20,
                help="tokens of the context that a bare module reads; empty: as many as there are queries",
            ),
        ),
        operation="softmax",
        swap="exact",
        swap_note=(
            "in the cross-attention of an encoder-decoder; not applicable to a model that reads one sequence, whose "
            "weights were trained on no second one"
        ),
        snippet=(
            "import torch\n"
            "from attnlab_kernels import CrossAttention\n\n"
            "attn = CrossAttention(query_dim=512, key_dim=768, num_heads=8)\n"
            "output = attn(torch.randn(1, 64, 512), torch.randn(1, 100, 768))\n"
        ),
        cache=key_heads,
        cache_formula="2 · L · Hkv · d · b · m, once for the whole context",
    ),
    Mechanism(
        id="grouped_query",
        title="Grouped-query attention",
        class_name="GroupedQueryAttention",
        summary="Groups of query heads share one key and value head; one group is multi-query attention.",
        formula="O_h = softmax(Q_h K_{⌊h/g⌋}ᵀ / √d + mask) V_{⌊h/g⌋},  g = H / Hkv",
        complexity="O(n² d) time; the cache and its traffic shrink by Hkv / H",
        year=2023,
        paper_title="GQA: Training Generalized Multi-Query Transformer Models (Ainslie et al.)",
        paper_url="https://arxiv.org/abs/2305.13245",
        use_cases=(
            "decoding of large language models (Llama 2 70B, Llama 3, Mistral, Qwen)",
            "long contexts",
        ),
        not_for="making prefill cheaper: its scores cost the same",
        parameters=(KEY_HEADS,),
        operation="softmax",
        swap="approximate",
        swap_note="key and value heads of a group are averaged, as the paper starts; the loss is measured",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import GroupedQueryAttention\n\n"
            "attn = GroupedQueryAttention(dim=512, num_heads=8, num_kv_heads=2)\n"
            "output, _, cache = attn(torch.randn(1, 64, 512), use_cache=True)\n"
        ),
        cache=key_heads,
        cache_formula="2 · L · Hkv · d · b · n",
    ),
    Mechanism(
        id="sliding_window",
        title="Sliding-window attention",
        class_name="SlidingWindowAttention",
        summary="Each query sees the last w keys only; distance grows by w - 1 with every layer.",
        formula="P_ij = softmax_j(q_i·k_j / √d) over 0 ≤ i − j < w",
        complexity="O(n w d) time with kernels that skip tiles; O(n) memory",
        year=2020,
        paper_title="Longformer: The Long-Document Transformer (Beltagy et al.)",
        paper_url="https://arxiv.org/abs/2004.05150",
        use_cases=(
            "long decoding with a bounded cache (Mistral 7B v0.1)",
            "layers that alternate with full ones",
        ),
        not_for="recalling a single fact far behind the window",
        parameters=(
            Parameter(
                "window_size",
                "int",
                256,
                minimum=1,
                help="keys a query sees, its own included; Mistral 7B used 4096",
            ),
            KEY_HEADS,
        ),
        operation="softmax",
        swap="approximate",
        swap_note="keys behind the window are cut off; the loss is measured",
        snippet=(
            "import torch\n"
            "from attnlab_kernels import SlidingWindowAttention\n\n"
            "attn = SlidingWindowAttention(dim=512, num_heads=8, window_size=32)\n"
            "output, _, cache = attn(torch.randn(1, 64, 512), use_cache=True)\n"
        ),
        cache=window,
        cache_formula="2 · L · Hkv · d · b · min(n, w)",
    ),
)
