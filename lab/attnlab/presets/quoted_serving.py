"""Claims about serving many requests at once: tokens a second by cache, in one and the same memory."""

from __future__ import annotations

from attnlab.presets.claim import Claim, Which
from attnlab.presets.grid import Preset, ServedGrid, ServedSize
from attnlab.presets.quoted_memory import GUIDE, K

HOW = (
    "tokens that the engine writes a second for the same requests and the same memory for the cache, over those of "
    "multi-head with room for the longest sequence set aside for each"
)
DEPENDS = "It is what the larger batch gives: it grows with the time that a step takes whatever its batch"
BASE = Which("multi_head", {"cache": "contiguous"})
# a token's latent and rotary key are a sixteenth of its keys and values
CPU = ServedSize(
    512,
    8,
    {
        "workload": {
            "requests": 32,
            "prompt_tokens": {"distribution": "lognormal", "median": 24, "sigma": 0.7, "high": 128},
            "output_tokens": {"distribution": "lognormal", "median": 24, "sigma": 0.7, "high": 128},
        },
        # three sequences of the greatest length, of multi-head
        "cache_bytes": 3 * 256 * 4 * 2 * 512 * 4,
        "max_length": 256,
        "layers": 4,
        "token_budget": 128,
        "chunk_size": 64,
    },
    parameters={
        "multi_head_latent": {
            "kv_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
        }
    },
)
GPU = ServedSize(
    4096,
    32,
    {
        "workload": {
            "requests": 256,
            "prompt_tokens": {"distribution": "lognormal", "median": 512, "sigma": 1.0, "high": 4 * K},
            "output_tokens": {"distribution": "lognormal", "median": 256, "sigma": 0.7, "high": 2 * K},
        },
        "cache_bytes": 8 << 30,
        "max_length": 8 * K,
        "layers": 8,
        "token_budget": 2 * K,
        "chunk_size": 512,
        "max_batch": 256,
    },
)


def _claim(claim_id: str, says: str, factor: float, which: Which) -> Claim:
    return Claim(claim_id, says, "tokens_per_second", factor, factor, which, BASE, HOW, GUIDE, note=DEPENDS)


BATCH_SERVING = Preset(
    name="batch-serving",
    title="Throughput of batch serving",
    about="Relative throughput of many requests at once, all given the same memory for their cache.",
    grids=(
        ServedGrid(
            "claims: many requests in one memory",
            ("multi_head", "grouped_query", "multi_head_latent"),
            CPU,
            GPU,
        ),
    ),
    claims=(
        _claim("gqa", "Grouped-query: 1.5 times", 1.5, Which("grouped_query", {"cache": "contiguous"})),
        _claim("paged", "PagedAttention: 2.5 times", 2.5, Which("multi_head", {"cache": "paged"})),
        _claim(
            "paged-gqa", "Paged and grouped-query: 3.0 times", 3.0, Which("grouped_query", {"cache": "paged"})
        ),
        _claim(
            "paged-mla",
            "Paged and multi-head latent: 3.5 times",
            3.5,
            Which("multi_head_latent", {"cache": "paged"}),
        ),
    ),
    correction="Pages make no step faster; they make room for more sequences in it.",
)
