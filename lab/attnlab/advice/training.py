"""Advice: training language models, by context length."""

from __future__ import annotations

from attnlab.advice.tree import Avoid, Choice, Leaf, Part, Question, Source, Trial

K = 1024
FLASH_2 = Source(
    "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning (Dao, July 2023)",
    "https://arxiv.org/abs/2307.08691",
)
LLAMA_3 = Source("The Llama 3 Herd of Models", "https://arxiv.org/abs/2407.21783")
MISTRAL = Source("Mistral 7B", "https://arxiv.org/abs/2310.06825")

UNDER_8K = Leaf(
    key="training/under_8k",
    parts=(
        Part("multi_head", "every head keeps keys and values of its own: the most expressive form"),
        Part("flash", "computes it without the n × n scores in memory"),
    ),
    reason=(
        "Below 8K tokens the projections and the feed-forward cost more than the attention scores, and training "
        "keeps no cache: fewer key heads would save little and cost quality. FlashAttention gives the same "
        "numbers and takes the n × n scores out of memory."
    ),
    sources=(FLASH_2,),
    avoid=(
        Avoid("linear", "the scores are the smaller part of a step here: little to save, and recall suffers"),
        Avoid("sparse", "the skipped work is less than the bookkeeping"),
    ),
    correction=(
        "If the model will be served, choose grouped-query already in training, whatever the context: turning "
        "multi-head weights into it later needs further training."
    ),
    cache="multi_head",
    trial=Trial(
        asks="How much time and memory does the tiled kernel save in a training step, for the same numbers?",
        mechanisms=("multi_head", "flash"),
        phase="train",
    ),
)

FROM_8K = Leaf(
    key="training/8k_to_32k",
    parts=(
        Part("grouped_query", "a quarter or an eighth of the key heads: a cache that can be served later"),
        Part("flash", "memory that grows with n, not n²"),
    ),
    reason=(
        "The cache that the model will need in use grows with every token, so its width is decided here: "
        "grouped-query keeps the quality of multi-head within noise at a fraction of it. FlashAttention keeps "
        "the memory of a step linear in the length."
    ),
    sources=(FLASH_2, LLAMA_3),
    avoid=(
        Avoid("multi_head", "its cache in use is H / Hkv times larger for next to no gain"),
        Avoid("multi_head_latent", "smaller still, but more work in training: worth it when memory decides"),
    ),
    correction=(
        "Grouped-query does not make the scores cheaper: prefill and training cost nearly the same. It saves the "
        "cache, its traffic in decoding, and a part of the projections."
    ),
    cache="grouped_query",
    trial=Trial(
        asks="What do fewer key heads change in a training step, and what does the tiled kernel?",
        mechanisms=("multi_head", "grouped_query", "flash"),
        phase="train",
        lengths=(512, 2048),
    ),
)

FROM_32K = Leaf(
    key="training/32k_to_128k",
    parts=(
        Part("grouped_query", "keeps the cache small"),
        Part(
            "sparse", "global tokens or blocks carry what is far away", {"sparsity_pattern": "local_global"}
        ),
        Part(
            "sliding_window", "the simplest pattern: most layers local, a few full", {}, instead_of="sparse"
        ),
    ),
    reason=(
        "The scores now cost more than everything else and grow with the square. Most heads look nearby, so most "
        "layers may be bounded; what is far away travels through global tokens or through the few layers left full."
    ),
    sources=(MISTRAL,),
    avoid=(
        Avoid(
            "sliding_window", "in every layer at once: a single fact beyond the window of all layers is lost"
        ),
        Avoid("efficient", "exact in chunks saves memory and no time"),
    ),
    correction=(
        "Llama 3 does not use sliding windows: it trains on 128K with full attention and spreads it over devices. "
        "Mistral 7B v0.1 used a window of 4096, its later versions none."
    ),
    cache="grouped_query",
    trial=Trial(
        asks="Does a training step with a bounded pattern cost what its pairs say, against full attention?",
        mechanisms=(
            "multi_head",
            "grouped_query",
            {"sparse": {"sparsity_pattern": "local_global"}},
            "sliding_window",
        ),
        phase="train",
        lengths=(512, 2048),
    ),
)

OVER_128K = Leaf(
    key="training/over_128k",
    parts=(
        Part("ring", "spreads the sequence over devices; every pair is still attended to"),
        Part("grouped_query", "the keys that travel round the ring shrink by H / Hkv"),
    ),
    reason=(
        "The activations of one sequence no longer fit one device. Ring attention leaves each device its queries and "
        "passes keys and values on, in exact arithmetic; grouped-query cuts what has to travel."
    ),
    sources=(
        Source("Striped Attention (Brandon et al., 2023)", "https://arxiv.org/abs/2311.09431"),
        LLAMA_3,
    ),
    avoid=(
        Avoid("flash", "alone on one device: the scores are no problem, keys, values and activations are"),
        Avoid("linear", "fits one device, and is another model: it forgets what its state cannot hold"),
    ),
    correction=(
        "With a causal mask a contiguous split leaves the first device idle most of the time: stripe it or zigzag "
        "(largest load over mean, 4 devices: contiguous 1.74, striped 1.05, zigzag 1.00)."
    ),
    cache="ring",
    trial=Trial(
        asks="Does the ring compute the same numbers, and what does a step cost beside one device's?",
        mechanisms=("multi_head", "grouped_query", {"ring": {"ring_size": 4}}),
        phase="train",
        lengths=(256, 1024),
    ),
)

TRAINING = Question(
    "context",
    "How many tokens does a training sequence have?",
    (
        Choice("under_8k", "under 8K tokens", "scores are the smaller part of a step", UNDER_8K, 8 * K - 1),
        Choice("8k_to_32k", "8K to 32K", "memory and the later cache decide", FROM_8K, 32 * K),
        Choice("32k_to_128k", "32K to 128K", "the square of the length decides", FROM_32K, 128 * K),
        Choice("over_128k", "over 128K", "one device cannot hold the sequence", OVER_128K),
    ),
)
