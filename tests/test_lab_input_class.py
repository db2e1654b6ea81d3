"""An attention on what a model gives it beside random inputs: the class is stated, and both are timed in turn."""

from typing import Any

import pytest
import torch

from attnlab.describe import run_document
from attnlab.probes.kernel import KernelCall
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab_storage import results
from attnlab_webui.experiment_view import run_facts

pytestmark = pytest.mark.usefixtures("forget_models")


def timed(store: Any, **subject: Any) -> dict[str, Any]:
    vary = {"mechanism": ["multi_head"], "sequence_length": [13]}
    spec = parse_spec({"name": "inputs", "vary": vary, "record": ["timing"], "repeats": 4} | subject)
    (run,) = results.runs_of(store, experiment_id=run_here(store, spec))
    document = run_document(store, run.id)
    assert document["outcome"] == "succeeded", document["error_detail"]
    return document | {"page": run_facts(document, run)}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_a_model_gives_its_attention_is_timed_beside_normal_inputs(sqlite_store, tiny, phase):
    found = timed(sqlite_store, model=tiny, input={"synthetic": "random"}, phase=phase)
    inputs = found["attention_latency_ms"]["detail"]["inputs"]
    assert inputs["class"] == "captured"
    assert inputs["what"].endswith("tiny, attention 1, on random tokens")
    ratio = found["inputs_ratio"]
    assert len(ratio["samples"]) == 4
    assert all(len(times) == 4 for times in ratio["detail"]["times_ms"])
    assert "on the model&#x27;s own inputs" in found["page"] or "on the model's own inputs" in found["page"]
    assert found["compilation"]["seconds"] == 0
    assert "nothing was compiled" in found["page"]


def test_a_bare_modules_inputs_are_random_and_need_nothing_beside(sqlite_store):
    found = timed(sqlite_store, module={"dim": 16, "num_heads": 2})
    assert found["attention_latency_ms"]["detail"]["inputs"]["class"] == "random"
    assert found["inputs_ratio"] is None


def call_of(backward: bool, operands: int = 3) -> KernelCall:
    given = tuple(torch.full((1, 2, 5, 4), float(place)) for place in range(operands))
    given = tuple(tensor.requires_grad_(backward) for tensor in given)
    return KernelCall(0, given, lambda *taken: sum(taken), "", 0, backward, None, given[0].detach())


@pytest.mark.parametrize("backward", [False, True])
def test_copies_compute_the_same_on_memory_of_their_own(backward):
    seen: list[tuple[torch.Tensor, ...]] = []
    call = call_of(backward)

    def compute(*taken: torch.Tensor) -> torch.Tensor:
        seen.append(taken)
        return sum(taken[1:], taken[0])

    object.__setattr__(call, "compute", compute)
    for step in call.copies(3):
        step()
    addresses = {tensor.data_ptr() for taken in seen for tensor in taken}
    assert len(addresses) == 9
    assert all(torch.equal(one, other) for taken in seen for one, other in zip(taken, seen[0], strict=True))
    assert call.operand_bytes == 3 * 40 * 4


def test_normal_inputs_have_shape_and_dtype_of_the_captured_and_follow_the_seed():
    call = call_of(True)
    first, again, other = (call.on_random(seed) for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert [tensor.shape for tensor in first.operands] == [tensor.shape for tensor in call.operands]
    assert all(tensor.requires_grad for tensor in first.operands)
    assert torch.equal(first.operands[0], again.operands[0])
    assert not torch.equal(first.operands[0], other.operands[0])
    drawn = torch.cat([tensor.detach().flatten() for tensor in first.operands])
    assert abs(float(drawn.mean())) < 0.4
    assert 0.7 < float(drawn.std()) < 1.3
    assert call_of(False, operands=2).on_random(0) is None
