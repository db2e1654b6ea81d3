"""Advice: serving language models, and the devices that serve themselves."""

from __future__ import annotations

from attnlab.advice.tree import Avoid, Choice, Leaf, Part, Question, Source, Trial

VLLM = Source(
    "Efficient Memory Management for Large Language Model Serving with PagedAttention (vLLM)",
    "https://arxiv.org/abs/2309.06180",
)
SARATHI = Source(
    "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
    "https://arxiv.org/abs/2403.02310",
)
DEEPSEEK = Source("DeepSeek-V2", "https://arxiv.org/abs/2405.04434")
MISTRAL = Source("Mistral 7B", "https://arxiv.org/abs/2310.06825")

MEMORY = Leaf(
    key="serving/memory",
    parts=(
        Part("paged", "no memory is set aside for tokens that never come, and prefixes are shared"),
        Part("grouped_query", "fewer key heads: the cache shrinks to Hkv / H"),
        Part(
            "multi_head_latent", "a smaller cache still, if the model is trained for it", {}, "grouped_query"
        ),
    ),
    reason=(
        "Two different savings multiply. Paging wastes less than one block a sequence where a contiguous cache is set "
        "aside for the longest answer possible; grouped-query or a latent makes each token's entry smaller."
    ),
    sources=(VLLM, DEEPSEEK),
    avoid=(
        Avoid("multi_head", "the largest cache of all"),
        Avoid("flash", "saves scores, not the cache: decoding has no n × n scores to save"),
    ),
    correction=(
        "“A sixteenth” is no law of latent attention: the ratio is (r + d_rope) / (2 H d), so it falls with the number "
        "of heads (DeepSeek-V3: 1/57 of plain multi-head). Grouped-query's is exactly Hkv / H."
    ),
    cache="paged",
    trial=Trial(
        asks="How many bytes does each cache take for the same tokens, and what does a decoding step cost?",
        mechanisms=("multi_head", "grouped_query", "paged", "multi_head_latent"),
        phase="decode",
    ),
)

LATENCY = Leaf(
    key="serving/latency",
    parts=(
        Part("flash", "prefill at the speed of the matrix units; decoding split over the keys"),
        Part("grouped_query", "a decoding step reads H / Hkv times fewer bytes"),
    ),
    reason=(
        "The first token waits for prefill, which is arithmetic: a fused kernel. Every further token waits for the "
        "cache to be read, which is bandwidth: fewer key heads."
    ),
    sources=(
        Source("Flash-Decoding for long-context inference", "https://pytorch.org/blog/flash-decoding/"),
        Source("Fast Transformer Decoding (multi-query, Shazeer 2019)", "https://arxiv.org/abs/1911.02150"),
    ),
    avoid=(
        Avoid("paged", "adds a table look-up to every step: it buys memory and batch, not latency"),
        Avoid("flash_attention_3", "the same function, on Hopper only: take it where it runs"),
    ),
    cache="grouped_query",
    trial=Trial(
        asks="How long does one decoding step take with fewer key heads?",
        mechanisms=("multi_head", "flash", "grouped_query"),
        phase="decode",
        lengths=(512, 2048),
    ),
)

LONG_CONTEXT = Leaf(
    key="serving/long_context",
    parts=(
        Part("chunked_prefill", "a long prompt enters in pieces, so nobody else's tokens wait for it"),
        Part("paged", "the long cache grows block by block"),
    ),
    reason=(
        "One prompt of 100K tokens would block every other sequence for seconds and need its activations at once. In "
        "chunks it shares each step with the decoding of others, exactly the same numbers come out, and the pages "
        "it fills are taken when they are needed."
    ),
    sources=(SARATHI, VLLM),
    avoid=(
        Avoid("sliding_window", "bounds the cache by forgetting: only for models trained with it"),
        Avoid("linear", "only for models trained with it"),
    ),
    correction=(
        "Serving more than 256K tokens is often called not recommended. It is a matter of cache bytes: see the figure "
        "for your shape, and divide by the memory of a device."
    ),
    cache="paged",
    trial=Trial(
        asks="What does a prompt in chunks cost against one pass, in time and in memory?",
        mechanisms=("multi_head", {"chunked_prefill": {"chunk_size": 256}}, "paged"),
        lengths=(512, 2048),
    ),
)

BATCH = Leaf(
    key="serving/batch",
    parts=(
        Part("paged", "more sequences fit, so the weights are read once for more tokens"),
        Part("chunked_prefill", "prompts fill what the decoding steps leave of the token budget"),
    ),
    reason=(
        "Throughput comes from the batch. Paging makes room for more sequences in the same memory, and chunked "
        "prefill keeps every step full without letting a prompt stall those that decode."
    ),
    sources=(VLLM, SARATHI),
    avoid=(
        Avoid("ring", "spreads one long sequence; many short ones are spread by giving each device its own"),
        Avoid("multi_head", "fewer sequences fit"),
    ),
    correction=(
        "Paging does not make a step faster (its kernel reads through a table). The gain that is quoted, two to four "
        "times, is what a larger batch gives in the same memory."
    ),
    cache="paged",
    trial=Trial(
        asks="What does a decoding step cost by batch size, from pages and from a contiguous cache?",
        mechanisms=("multi_head", "paged", "grouped_query"),
        phase="decode",
        batch_sizes=(1, 8),
        lengths=(256,),
    ),
)

SERVING = Question(
    "scarce",
    "What is scarce?",
    (
        Choice("memory", "memory for the cache", "the cache decides how many sequences fit", MEMORY),
        Choice("latency", "time to each token", "bandwidth and the fused kernel decide", LATENCY),
        Choice("long_context", "room for long prompts", "prefill must not block decoding", LONG_CONTEXT),
        Choice("batch", "throughput of many sequences", "the batch decides", BATCH),
    ),
)

EDGE = Leaf(
    key="edge",
    parts=(
        Part("linear", "a state of constant size and constant work a token"),
        Part("sliding_window", "ordinary attention with a bounded cache", {}, instead_of="linear"),
    ),
    reason=(
        "A phone or a small board has little memory and less bandwidth, so what grows with the conversation has to be "
        "bounded. Linear attention keeps one state whatever was said; a window keeps the last tokens and their exact "
        "attention."
    ),
    sources=(MISTRAL,),
    avoid=(
        Avoid("multi_head", "its cache grows without bound"),
        Avoid("flash_attention_3", "needs a Hopper GPU"),
        Avoid("paged", "manages many sequences; there is one"),
    ),
    correction=(
        "Linear attention's state is not smaller at every length: it equals a multi-head cache in 16 bits of about d "
        "tokens. For a short context a small model with grouped-query takes less."
    ),
    cache="linear",
    trial=Trial(
        asks="Where does a constant state beat a growing cache, in bytes and in time a token?",
        mechanisms=("multi_head", "linear", {"sliding_window": {"window_size": 128}}),
        phase="decode",
        lengths=(128, 512, 2048),
    ),
)
