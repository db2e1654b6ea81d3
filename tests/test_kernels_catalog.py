"""The catalog: seventeen records, parameters that check themselves, cache bytes of known models."""

import pytest

from attnlab_kernels.catalog import MECHANISMS, validate_parameters

SEVENTEEN = [
    *("multi_head", "self", "cross"),
    *("flash", "linear", "sparse", "sliding_window", "efficient"),
    *("grouped_query", "multi_head_latent", "paged", "flash_attention_3"),
    *("ring", "differential", "neighborhood", "switch_head", "chunked_prefill"),
]
LLAMA_3_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128, "layers": 32, "bytes_per_element": 2}
KIB = 1024


def test_all_seventeen_mechanisms_are_recorded():
    assert sorted(MECHANISMS) == sorted(SEVENTEEN)


@pytest.mark.parametrize("record", MECHANISMS.values(), ids=lambda record: record.id)
def test_every_record_is_whole(record):
    assert record.summary.endswith(".")
    assert record.not_for.endswith(".")
    assert record.use_cases
    assert record.paper_url.startswith("https://arxiv.org/abs/")
    assert record.class_name in record.snippet
    assert 2017 <= record.year <= 2026
    compile(record.snippet, record.id, "exec")


@pytest.mark.parametrize("record", MECHANISMS.values(), ids=lambda record: record.id)
def test_defaults_satisfy_their_own_rules(record):
    defaults = validate_parameters(record.id, {})
    assert defaults == {parameter.name: parameter.default for parameter in record.parameters}
    assert record.cache_bytes(tokens=100, **LLAMA_3_8B, **defaults) >= 0


def cache(mechanism, tokens=1, **arguments):
    return MECHANISMS[mechanism].cache_bytes(tokens=tokens, **(LLAMA_3_8B | arguments))


def test_cache_formulas_match_published_models():
    assert cache("multi_head") == 512 * KIB  # as Llama 2 7B
    assert cache("grouped_query") == 128 * KIB  # Llama 3 8B
    assert cache("grouped_query", num_kv_heads=1) == 16 * KIB
    assert cache("multi_head_latent", layers=61) == 61 * 576 * 2  # DeepSeek-V3
    assert cache("sliding_window", tokens=32_768, window_size=4096) == 512 * KIB * KIB  # Mistral 7B
    assert cache("linear") == 32 * 32 * (128 * 128 + 128) * 4
    assert cache("neighborhood") == 0


def test_window_and_linear_caches_stop_growing():
    for name in ("sliding_window", "linear"):
        assert cache(name, tokens=100_000) == cache(name, tokens=1_000_000)


def test_paged_cache_wastes_less_than_a_block_and_a_table():
    exact = cache("grouped_query", tokens=33)
    assert exact < cache("paged", tokens=33) <= cache("grouped_query", tokens=33 + 15) + 4 * 3


@pytest.mark.parametrize(
    ("mechanism", "given", "words"),
    [
        ("sliding_window", {"window_size": 0}, ["window_size", "from 1", "0"]),
        ("sliding_window", {"window_size": 2.5}, ["window_size", "whole number", "2.5"]),
        ("sliding_window", {"window_size": True}, ["window_size", "True"]),
        ("sliding_window", {"window": 4}, ["window", "choices", "window_size"]),
        ("multi_head", {"window_size": 4}, ["no parameters"]),
        ("linear", {"feature_map": "tanh"}, ["feature_map", "elu", "tanh"]),
        ("attention", {}, ["multi_head", "attention"]),
    ],
)
def test_a_bad_parameter_names_argument_rule_value_and_choices(mechanism, given, words):
    with pytest.raises(ValueError) as caught:
        validate_parameters(mechanism, given)
    assert all(word in str(caught.value) for word in words)
