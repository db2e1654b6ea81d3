"""Parameters that do not go together are refused when a spec is read, in words, and not when its run begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from attnlab.problems import SpecError
from attnlab.spec import parse_spec
from attnlab.subjects.module import ModuleSubject
from attnlab_kernels.catalog import MECHANISMS, Parameter
from attnlab_kernels.catalog_rules import blocks_needed


def document(mechanism: str, parameters: dict[str, Any], **changes: Any) -> dict[str, Any]:
    vary = {"mechanism": [{mechanism: parameters}], "sequence_length": changes.pop("lengths", [16])}
    return {"name": "x", "module": {"dim": 24, "num_heads": 4}, "vary": vary} | changes


LONG = {"sparsity_pattern": "longformer", "local_window": 7}


@pytest.mark.parametrize(
    ("mechanism", "parameters", "words"),
    [
        ("sliding_window", {"window_size": 0}, "window_size of sliding_window must be at least 1; got 0"),
        ("sliding_window", {"window_size": -4}, "window_size of sliding_window must be at least 1; got -4"),
        ("paged", {"block_size": 0}, "block_size of paged must be at least 1; got 0"),
        (
            "linear",
            {"variant": "favor"},
            "variant of linear must be one of kernel, linformer; got 'favor'",
        ),
        ("sparse", {"window": 3}, "window is not a parameter of sparse; choices are sparsity_pattern"),
        ("grouped_query", {"num_kv_heads": 3}, "num_kv_heads: must divide the 4 heads of .*got 3; choices: "),
        (
            "linear",
            {"num_features": 4},
            "linear.num_features: .*for feature_map softmax_kernel, not elu, got 4",
        ),
        (
            "linear",
            {"variant": "linformer", "max_seq_length": 8},
            "max_seq_length: must be at least the 16 tok",
        ),
        ("sparse", LONG, "local_window: must be even and at least 2 .*, got 7; choices: 6, 8"),
        ("sparse", {"sparsity_pattern": "bigbird", "sliding_blocks": 2}, "must be odd.*got 2; choices: 1, 3"),
        (
            "sparse",
            {"sparsity_pattern": "fixed", "stride": 4, "summary_tokens": 5},
            r"at most stride \(4\), got 5",
        ),
        ("multi_head_latent", {"qk_rope_head_dim": 5}, "must be even: .*, got 5; choices: 4, 6"),
        (
            "neighborhood",
            {"kernel_size": 3, "stride": 4},
            r"stride: must be at most kernel_size \(3\), got 4",
        ),
        (
            "neighborhood",
            {"kernel_size": 5, "dilation": 4},
            r"kernel_size: times dilation \(4\) must fit into .*16 tokens",
        ),
        (
            "neighborhood",
            {"dims": 2, "kernel_size": 2, "grid_height": 3},
            "grid_height: .*16 tokens must form an image of this height, got 3",
        ),
        ("neighborhood", {"dims": 2, "kernel_size": 5}, "must fit into every axis of 4 x 4 tokens, got 5"),
        (
            "efficient",
            {"variant": "spatial_reduction", "reduction": 3},
            "reduction: .*16 tokens must form an image, sides multiples of 3, got 3",
        ),
        ("switch_head", {"num_experts": 2, "top_k": 3}, r"top_k: must be at most num_experts \(2\), got 3"),
        (
            "paged",
            {"block_size": 4, "num_blocks": 3},
            "num_blocks: must be at least 4: 1 x 16 tokens in blocks",
        ),
        ("ring", {"ring_size": 17}, "ring_size: must be at most the 16 tokens, got 17"),
    ],
)
def test_a_combination_that_cannot_be_is_refused_with_argument_rule_value_and_choices(
    mechanism: str, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words) as refused:
        parse_spec(document(mechanism, parameters))
    assert str(refused.value).count("vary.mechanism[0]") == 1


def test_two_maps_a_head_need_a_width_for_both() -> None:
    with pytest.raises(
        SpecError, match=r"differential.variant: must be v2, or dim \(20\) a multiple of 2 num_h"
    ):
        parse_spec(document("differential", {}, module={"dim": 20, "num_heads": 4}))
    assert parse_spec(document("differential", {"variant": "v2"}, module={"dim": 20, "num_heads": 4}))


def test_one_length_of_many_is_enough_to_refuse_and_training_fills_no_pool() -> None:
    with pytest.raises(SpecError, match="at most the 16 tokens, got 17"):
        parse_spec(document("ring", {"ring_size": 17}, lengths=[64, 16]))
    small = {"block_size": 4, "num_blocks": 3}
    assert parse_spec(document("paged", small, phase="train"))
    with pytest.raises(SpecError, match="must be at least 8: 2 x 16 tokens"):
        parse_spec(
            document("paged", small)
            | {"vary": {"mechanism": [{"paged": small}], "sequence_length": [16], "batch_size": [2]}}
        )


def test_a_models_swaps_have_the_same_rules_between_parameters() -> None:
    spec = {
        "name": "x",
        "model": "smollm2-135m",
        "input": {"text": "a b c"},
        "vary": {"mechanism": [{"sparse": LONG}]},
    }
    with pytest.raises(SpecError, match=r"sparse\.local_window: must be even"):
        parse_spec(spec)


def values(parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.kind == "bool":
        return st.booleans()
    if parameter.kind == "choice":
        return st.sampled_from(parameter.choices)
    low, high = parameter.minimum or 0, 40 if parameter.maximum is None else min(40, parameter.maximum)
    return st.integers(int(low), int(high)) if parameter.kind == "int" else st.floats(low, min(high, 0.9))


@st.composite
def documents(draw: st.DrawFn, mechanism: str) -> dict[str, Any]:
    known = MECHANISMS[mechanism].parameters
    chosen = {each.name: draw(values(each)) for each in known if draw(st.booleans())}
    dim = draw(st.sampled_from([20, 24, 32]))
    return document(
        mechanism,
        chosen,
        module={"dim": dim, "num_heads": draw(st.sampled_from([1, 2, 4]))},
        lengths=[draw(st.sampled_from([7, 16, 36]))],
    )


@pytest.mark.parametrize("tokens", [16, 17, 18])
def test_a_pool_as_small_as_is_accepted_is_enough_to_decode(tokens: int) -> None:
    pool = {"block_size": 4, "num_blocks": blocks_needed(tokens, 1, 4, decoding=True)}
    changes: dict[str, Any] = {"lengths": [tokens], "phase": "decode"}
    spec = parse_spec(document("paged", pool, **changes))
    subject = ModuleSubject(spec, spec.points()[0], torch.device("cpu"))
    with torch.no_grad(), subject.ready():
        for _ in range(2):
            subject.prepare()
            subject.step()
    with pytest.raises(SpecError, match="num_blocks: must be at least"):
        parse_spec(document("paged", pool | {"num_blocks": pool["num_blocks"] - 1}, **changes))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_what_the_reader_of_a_spec_accepts_its_module_runs(mechanism: str, data: st.DataObject) -> None:
    try:
        spec = parse_spec(data.draw(documents(mechanism)))
    except SpecError:
        assume(False)
        return
    with torch.no_grad():
        ModuleSubject(spec, spec.points()[0], torch.device("cpu")).step()
