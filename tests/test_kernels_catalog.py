"""The catalog: seventeen records, parameters that check themselves, cache bytes of known models."""

import subprocess
import sys
from typing import Any

import pytest

from attnlab_kernels.catalog import MECHANISMS, has_module, validate_parameters

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


def test_every_record_builds_its_own_class():
    from attnlab_kernels.mechanisms.build import BUILDERS, build_mechanism

    assert list(BUILDERS) == list(MECHANISMS)
    for record in MECHANISMS.values():
        assert type(build_mechanism(record.id, dim=32, num_heads=4)).__name__ == record.class_name
    with pytest.raises(ValueError, match="mechanism must be one of multi_head"):
        build_mechanism("attention", dim=32, num_heads=4)


def test_the_catalog_loads_neither_torch_nor_triton():
    code = (
        "import sys, attnlab_kernels, attnlab_kernels.catalog, attnlab_kernels.effective_map\n"
        "assert not {'torch', 'triton', 'ray'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("record", MECHANISMS.values(), ids=lambda record: record.id)
def test_a_snippet_runs(record):
    names: dict[str, Any] = {}
    exec(record.snippet, names)
    output = names["output"]
    assert output.shape[0] == 1
    assert output[0, ..., 0].numel() in (64, 256)  # as many tokens, or pixels, as went in
    assert output.isfinite().all()


@pytest.mark.parametrize("record", MECHANISMS.values(), ids=lambda record: record.id)
def test_every_record_is_whole(record):
    assert record.summary.endswith(".")
    assert record.not_for
    assert record.swap_note
    assert record.use_cases
    assert record.paper_url.startswith("https://arxiv.org/abs/")
    assert record.class_name in record.snippet
    assert 2014 <= record.year <= 2026
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


@pytest.mark.parametrize("mechanism", ["multi_head", "grouped_query", "sliding_window"])
@pytest.mark.parametrize("tokens", [1, 13, 40])
def test_the_formula_is_what_the_cache_weighs(mechanism, tokens):
    import torch

    from attnlab_kernels.mechanisms.build import build_mechanism

    parameters = {
        "multi_head": {},
        "grouped_query": {"num_kv_heads": 2},
        "sliding_window": {"num_kv_heads": 4, "window_size": 16},
    }[mechanism]
    module = build_mechanism(mechanism, dim=64, num_heads=8, **parameters)
    held = module(torch.randn(1, tokens, 64), use_cache=True, return_dict=True).cache
    shape = {"heads": 8, "kv_heads": 8, "head_dim": 8, "layers": 1, "bytes_per_element": 4}
    assert held.nbytes() == MECHANISMS[mechanism].cache_bytes(tokens=tokens, **shape, **parameters)


def test_paged_cache_wastes_less_than_a_block_and_a_table():
    exact = cache("grouped_query", tokens=33)
    assert exact < cache("paged", tokens=33) <= cache("grouped_query", tokens=33 + 15) + 4 * 3


@pytest.mark.parametrize(
    ("mechanism", "given", "words"),
    [
        ("sliding_window", {"window_size": 0}, ["window_size", "at least 1", "0"]),
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


def test_every_class_of_the_catalog_can_be_imported():
    assert [record.id for record in MECHANISMS.values() if not has_module(record)] == []


def test_a_parameter_depends_on_values_that_another_parameter_of_the_mechanism_can_take():
    for record in MECHANISMS.values():
        known = {parameter.name: parameter for parameter in record.parameters}
        for parameter in record.parameters:
            if parameter.used_with:
                other, values = parameter.used_with
                assert other != parameter.name
                assert [known[other].check(record.id, value) for value in values] == list(values)
