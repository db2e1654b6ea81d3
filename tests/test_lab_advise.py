"""Advice: every leaf of the tree, the boundaries between them, cache bytes by the catalog, specs that parse."""

import subprocess
import sys

import pytest

from attnlab.advice.lengths import LENGTHS, length_row
from attnlab.advice.model_shapes import KNOWN_SHAPES, cache_lines, paged_latent_bytes
from attnlab.advise import AdviceError, Answers, ModelShape, advise, leaves, parse_tokens, walk
from attnlab.spec import parse_spec
from attnlab_kernels.catalog import MECHANISMS

K = 1024
TREE = [
    (Answers("training", 8 * K - 1), ("multi_head", "flash"), ()),
    (Answers("training", 8 * K), ("grouped_query", "flash"), ()),
    (Answers("training", 32 * K), ("grouped_query", "flash"), ()),
    (Answers("training", 32 * K + 1), ("grouped_query", "sparse"), ("sliding_window",)),
    (Answers("training", 128 * K), ("grouped_query", "sparse"), ("sliding_window",)),
    (Answers("training", 128 * K + 1), ("ring", "grouped_query"), ()),
    (Answers("serving", scarce="memory"), ("paged", "grouped_query"), ("multi_head_latent",)),
    (Answers("serving", scarce="latency"), ("flash", "grouped_query"), ()),
    (Answers("serving", scarce="long_context"), ("chunked_prefill", "paged"), ()),
    (Answers("serving", scarce="batch"), ("paged", "chunked_prefill"), ()),
    (Answers("vision", task="local"), ("neighborhood",), ()),
    (Answers("vision", task="global_local"), ("sparse",), ()),
    (Answers("vision", task="hierarchical"), ("sliding_window",), ()),
    (Answers("vision", task="classification"), ("multi_head",), ()),
    (Answers("vision", task="detection"), ("cross",), ()),
    (Answers("vision", task="segmentation"), ("efficient",), ()),
    (Answers("vision", task="high_resolution"), ("neighborhood",), ()),
    (Answers("vision", task="video"), ("multi_head",), ()),
    (Answers("multimodal"), ("cross",), ()),
    (Answers("research", aim="novel"), ("differential",), ()),
    (Answers("research", aim="efficiency"), ("linear",), ()),
    (Answers("research", aim="moe"), ("switch_head",), ()),
    (Answers("edge"), ("linear",), ("sliding_window",)),
]


@pytest.mark.parametrize(
    ("answers", "mechanisms", "alternatives"), TREE, ids=[advise(row[0]).leaf.key for row in TREE]
)
def test_every_answer_leads_to_its_mechanisms(answers, mechanisms, alternatives):
    found = advise(answers)
    assert found.mechanisms == mechanisms
    assert found.leaf.alternatives == alternatives


def test_no_leaf_is_out_of_reach():
    assert {advise(answers).leaf.key for answers, *_ in TREE} == {leaf.key for leaf in leaves()}


@pytest.mark.parametrize(
    ("mechanism", "parameter", "value"),
    [
        ("sparse", "sparsity_pattern", "local_global"),
        ("efficient", "variant", "spatial_reduction"),
    ],
)
def test_a_part_that_needs_a_variant_names_it(mechanism, parameter, value):
    parts = [part for leaf in leaves() for part in leaf.parts if part.mechanism == mechanism]
    assert parts
    assert all(part.parameters[parameter] == value for part in parts)


@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: leaf.key)
def test_a_leaf_is_whole(leaf):
    assert leaf.reason.endswith(".")
    assert leaf.trial.asks.endswith("?")
    assert leaf.avoid
    assert not {item.mechanism for item in leaf.avoid} & set(leaf.mechanisms)
    for part in leaf.parts:
        MECHANISMS[part.mechanism].validate(part.parameters)
        assert part.instead_of is None or part.instead_of in leaf.mechanisms
    tried = {next(iter(e)) if isinstance(e, dict) else e for e in leaf.trial.mechanisms}
    assert "multi_head" in tried  # the baseline
    assert tried & {*leaf.mechanisms, *leaf.alternatives}


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: leaf.key)
def test_the_suggested_experiment_is_a_spec(leaf, scale):
    answers = next(answers for answers, *_ in TREE if advise(answers).leaf is leaf)
    found = advise(answers, KNOWN_SHAPES["llama-3-8b"].shape, scale)
    points = parse_spec(found.experiment).points()
    assert {point.gpus for point in points} == {int(scale == "gpu")}
    assert max(point.sequence_length for point in points) <= (32 * K if scale == "gpu" else 4 * K)


@pytest.mark.parametrize("context", [4 * K, 32 * K, 256 * K])
@pytest.mark.parametrize("scarce", ["memory", "long_context", "batch"])
def test_the_pool_of_a_suggested_experiment_holds_its_longest_run(scarce, context):
    found = advise(Answers("serving", context, scarce=scarce), KNOWN_SHAPES["llama-3-8b"].shape, "gpu")
    points = [point for point in parse_spec(found.experiment).points() if point.mechanism == "paged"]
    assert points
    for point in points:
        assert point.parameters["num_blocks"] * 16 >= point.batch_size * point.sequence_length


def test_an_experiment_on_a_gpu_has_the_shape_of_the_reader_and_one_on_a_cpu_its_grouping():
    shape = ModelShape(heads=16, kv_heads=4, head_dim=64, dtype="float16", context=4096)
    answers = Answers("serving", context=4096, scarce="latency")
    on_gpu = advise(answers, shape, "gpu").experiment
    assert on_gpu["module"] == {"dim": 1024, "num_heads": 16, "num_kv_heads": 4, "causal": True}
    assert on_gpu["vary"]["sequence_length"] == [1024, 2048, 4096]
    assert on_gpu["vary"]["dtype"] == ["float16"]
    on_cpu = advise(answers, shape, "cpu").experiment
    assert on_cpu["module"]["num_heads"] == 4 * on_cpu["module"]["num_kv_heads"]


def test_cache_bytes_are_those_of_published_models():
    sizes = {
        line.mechanism: line for line in cache_lines(ModelShape(32, 32, 8, 128, "bfloat16", 8192, 3), "paged")
    }
    assert sizes["multi_head"].bytes_per_sequence == 512 * K * 8192  # 512 KiB a token, as Llama 2 7B
    assert sizes["grouped_query"].bytes_per_sequence == 128 * K * 8192  # Llama 3 8B
    assert sizes["grouped_query"].bytes_in_all == 3 * 128 * K * 8192
    assert sizes["grouped_query"].share == 0.25
    assert [line.mechanism for line in sizes.values() if line.recommended] == ["paged"]


def test_a_latent_in_pages_wastes_less_than_a_page():
    shape = ModelShape(61, 128, 128, 128, "bfloat16", 33)
    token = 61 * 576 * 2  # DeepSeek-V3: 68.6 KiB
    assert paged_latent_bytes(shape) == 48 * token + 4 * 3


def test_grouped_query_of_a_multi_head_shape_is_shown_with_a_quarter():
    lines = cache_lines(ModelShape(12, 12, 12, 64, "float16", 1024), "grouped_query")
    shares = {line.mechanism: line.share for line in lines}
    assert shares["grouped_query"] == 0.25
    assert shares["multi_head"] == 1


def test_what_is_not_autoregressive_has_no_cache():
    assert advise(Answers("vision", task="local")).lines == ()


@pytest.mark.parametrize(
    ("context", "label"),
    [
        (4 * K - 1, "under 4K"),
        (4 * K, "4K to 16K"),
        (16 * K + 1, "16K to 64K"),
        (64 * K + 1, "64K to 256K"),
        (256 * K, "64K to 256K"),
        (256 * K + 1, "over 256K"),
    ],
)
def test_a_context_has_its_row(context, label):
    assert length_row(context).label == label


def test_the_table_by_length_names_mechanisms_of_the_catalog():
    for row in LENGTHS:
        assert {*row.training, *row.inference, *row.memory} <= set(MECHANISMS)


def test_the_table_and_the_tree_agree_where_both_speak_of_training():
    for context in (2 * K, 12 * K, 512 * K):
        assert set(length_row(context).training) == set(advise(Answers("training", context)).mechanisms)


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("32k", 32768), ("1M", 1024**2), (" 7 K", 7168)]
)
def test_tokens_are_read_with_their_unit(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: advise(Answers()), ["goal", "training", "edge", "nothing"]),
        (lambda: advise(Answers("serving")), ["scarce", "memory", "batch", "nothing"]),
        (lambda: advise(Answers("training")), ["context", "tokens", "nothing"]),
        (lambda: advise(Answers("training", 0)), ["context", "from 1", "0"]),
        (lambda: advise(Answers("vision", task="text")), ["task", "video", "'text'"]),
        (lambda: advise(Answers("edge"), scale="tpu"), ["scale", "cpu", "gpu", "'tpu'"]),
        (lambda: ModelShape(heads=9, kv_heads=2), ["kv_heads", "divide", "9", "1, 3, 9"]),
        (lambda: ModelShape(layers=0), ["layers", "0"]),
        (lambda: ModelShape(dtype="int4"), ["dtype", "bfloat16", "'int4'"]),
        (lambda: parse_tokens("eight"), ["context", "32k", "'eight'"]),
        (lambda: parse_tokens("0"), ["context", "'0'"]),
    ],
)
def test_a_bad_answer_names_question_rule_value_and_choices(call, words):
    with pytest.raises(AdviceError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


def test_walking_stops_at_the_first_open_question():
    steps, here = walk(Answers("vision"))
    assert [step.choice.value for step in steps] == ["vision"]
    assert getattr(here, "key", None) == "task"


def test_an_advice_is_plain_values():
    document = advise(Answers("serving", scarce="memory")).to_dict()
    assert document["mechanisms"] == ["paged", "grouped_query"]
    assert [row["label"] for row in document["lengths"] if row["yours"]] == ["4K to 16K"]
    assert all(source["url"].startswith("https://") for source in document["sources"])


def test_advice_loads_no_torch():
    code = (
        "import sys; from attnlab.advise import *; advise(Answers('edge'));"
        "assert not {'torch', 'triton', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
