"""SwitchHead: torch's own attention where the gates are saturated, the formula elsewhere, and the laws of routing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnlab_kernels import MECHANISMS, SwitchHeadAttention
from attnlab_kernels.caches import ContiguousKV
from attnlab_kernels.operations.expert_projection import reference as experts
from attnlab_kernels.positions import rope_tables


def make(seed: int = 0, **changes) -> SwitchHeadAttention:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"d_model": 12, "num_heads": 2, "num_experts": 4, "top_k": 2} | changes
    return SwitchHeadAttention(**arguments).eval()


def hidden(tokens: int, batch: int = 2, width: int = 12) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["grouped", "dense"])
def projection(request) -> str:
    return request.param


@pytest.mark.parametrize("chosen", [[[0], [3]], [[1, 2], [0, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_saturated_gates_make_it_torchs_attention(chosen, causal, projection):
    module = make(top_k=len(chosen[0]), causal=causal, projection=projection)
    x = hidden(9)
    # the last feature is constant, and the routers look at nothing else
    x[..., -1] = 1
    theirs = nn.MultiheadAttention(12, 2, bias=False, batch_first=True).eval()
    with torch.no_grad():
        for router in (module.source_router, module.destination_router):
            router.weight.zero_()
            for head, picked in enumerate(chosen):
                rows = torch.tensor([40.0 if expert in picked else -40.0 for expert in range(4)])
                router.weight[4 * head : 4 * head + 4, -1] = rows
        values = [module.value_experts[head, picked].sum(0).T for head, picked in enumerate(chosen)]
        outputs = [module.output_experts[head, picked].sum(0).T for head, picked in enumerate(chosen)]
        theirs.in_proj_weight.copy_(torch.cat((module.q_proj.weight, module.k_proj.weight, *values)))
        theirs.out_proj.weight.copy_(torch.cat(outputs, dim=1))
    future = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    want, weights = theirs(x, x, x, attn_mask=future, average_attn_weights=False)
    got, maps, loss = module(x, output_attentions=True)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    torch.testing.assert_close(maps, weights, atol=2e-6, rtol=0)
    assert loss is None


def test_it_is_the_formula_written_out_token_by_token(projection):
    module, x = make(projection=projection).double(), hidden(6, batch=1).double()
    got = module(x)[0][0]
    want = torch.zeros(6, 12, dtype=torch.float64)
    for head in range(2):
        rows = slice(6 * head, 6 * head + 6)
        query, key = (part(x[0])[:, rows] for part in (module.q_proj, module.k_proj))
        gates = [
            torch.sigmoid(router(x[0])[:, 4 * head : 4 * head + 4])
            for router in (module.source_router, module.destination_router)
        ]
        value = torch.zeros(6, 6, dtype=torch.float64)
        for j in range(6):
            for expert in gates[0][j].topk(2).indices:
                value[j] += gates[0][j, expert] * (x[0, j] @ module.value_experts[head, expert])
        scores = (query @ key.T / 6**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        mixed = torch.softmax(scores, dim=-1) @ value
        for i in range(6):
            for expert in gates[1][i].topk(2).indices:
                want[i] += gates[1][i, expert] * (mixed[i] @ module.output_experts[head, expert])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_grouped_and_dense_agree_with_their_gradients(top_k, router):
    generator = torch.Generator().manual_seed(0)
    x, value, output, logits = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 7, 6), (3, 4, 6, 5), (3, 4, 5, 6), (2, 7, 3, 4))
    )
    results = []
    for project_in, project_out in (
        (experts.grouped_in, experts.grouped_out),
        (experts.dense_in, experts.dense_out),
    ):
        routing = experts.route(logits, top_k, router)
        heads = project_in(x, value, routing)
        assert heads.shape == (2, 3, 7, 5)
        mixed = project_out(heads, output, routing)
        results.append((mixed, *torch.autograd.grad(mixed.square().sum(), (x, value, output, logits))))
    torch.testing.assert_close(*results)


def test_grouped_multiplies_with_the_chosen_experts_only():
    module, x = make(d_model=32, num_experts=8, top_k=2), hidden(64, width=32)
    routing = experts.route(torch.randn(2, 64, 2, 8), 2)
    for name, factor in (("grouped_in", 2), ("dense_in", 8)):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            getattr(experts, name)(x, module.value_experts, routing)
        exact = 2 * 128 * 2 * 32 * 16 * factor
        assert exact <= counter.get_total_flops() <= (exact if factor == 2 else 4 * exact)


def test_gates_are_not_renormalised_and_ties_go_to_the_first():
    routing = experts.route(torch.tensor([[[[0.0, 2.0, 2.0, -1.0]]]]), 2)
    assert routing.experts.flatten().tolist() == [1, 2]
    torch.testing.assert_close(routing.gates.sum(), 2 * torch.sigmoid(torch.tensor(2.0)))
    assert routing.dense().flatten().tolist()[::3] == [0, 0]
    soft = experts.route(torch.tensor([[[[0.0, 2.0, 2.0, -1.0]]]]), 2, "softmax")
    torch.testing.assert_close(soft.scores.sum(), torch.tensor(1.0))
    assert soft.gates.sum() < 1


def test_each_head_routes_for_itself_and_each_token_by_its_own_features():
    module, x = make(num_heads=3), hidden(40)
    routing = module(x, return_dict=True).aux["routing"]["source"]
    assert routing.experts.shape == (2, 40, 3, 2)
    assert (routing.experts[:, :, 0] != routing.experts[:, :, 1]).any()
    assert len(routing.experts[:, :, 0].flatten(0, 1).unique(dim=0)) > 4
    x[:, 20] = x[:, 3]
    experts_of = module(x, return_dict=True).aux["routing"]["source"].experts
    assert torch.equal(experts_of[:, 20], experts_of[:, 3])


def test_values_follow_the_key_token_and_outputs_the_query_token():
    module, x, context = make(causal=False), hidden(5), hidden(8).flip(1)
    routing = module(x, key_value_states=context, return_dict=True).aux["routing"]
    assert routing["source"].experts.shape[1] == 8
    assert routing["destination"].experts.shape[1] == 5
    own = module(context, return_dict=True).aux["routing"]
    assert torch.equal(routing["source"].experts, own["source"].experts)
    own = module(x, return_dict=True).aux["routing"]
    assert torch.equal(routing["destination"].experts, own["destination"].experts)


def test_the_routers_learn_from_the_task_also_with_one_expert_chosen():
    module = make(top_k=1)
    module(hidden(9))[0].square().sum().backward()
    for router in (module.source_router, module.destination_router):
        assert router.weight.grad is not None
        assert router.weight.grad.any()


def test_the_loss_is_a_scalar_in_training_only_and_least_in_balance():
    module, x = make(top_k=1, aux_loss_coeff=0.5).train(), hidden(9)
    loss = module(x)[2]
    assert loss.shape == ()
    loss.backward()
    for router in (module.source_router, module.destination_router):
        assert router.weight.grad is not None
        assert router.weight.grad.any()
    assert module.eval()(x)[2] is None
    assert make(aux_loss_coeff=0).train()(x)[2] == 0
    spread = experts.route(8 * torch.eye(4).view(1, 4, 1, 4), 1)
    torch.testing.assert_close(experts.balance(spread), torch.tensor(1.0))
    crowded = experts.route(torch.tensor([9.0, -99, -99, -99]).expand(1, 4, 1, 4), 1)
    torch.testing.assert_close(experts.balance(crowded), torch.tensor(4.0))


@pytest.mark.parametrize(("fraction", "turned"), [(0.5, 4), (1, 8)])
def test_a_rotation_turns_a_share_of_each_head(fraction, turned):
    module, x = make(d_model=16, use_rotary=True, rotary_fraction=fraction), hidden(9, width=16)
    own = module(x)[0]
    module.use_rotary = False
    tables = rope_tables(torch.arange(9), turned)
    assert torch.equal(module(x, position_embeddings=tables)[0], own)
    assert (module(x)[0] - own).abs().max() > 1e-3


def test_a_padded_batch_equals_each_sequence_alone(projection):
    module, x = make(projection=projection), hidden(9)
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[1, 5:] = 0
    x[1, 5:] = 100
    together = module(x, attention_mask=keep)[0]
    torch.testing.assert_close(together[1, :5], module(x[1:, :5])[0][0], atol=2e-6, rtol=0)
    torch.testing.assert_close(together[0], module(x[:1])[0][0], atol=2e-6, rtol=0)


def test_the_guides_call_works_and_the_cache_has_the_catalogs_bytes():
    record = MECHANISMS["switch_head"]
    names: dict[str, Any] = {}
    exec(record.snippet, names)
    assert names["output"].shape == (1, 64, 512)
    assert names["aux_loss"].shape == ()
    cache = ContiguousKV()
    names["attn"](hidden(3, width=512), past_key_value=cache)
    shape = {"heads": 2, "kv_heads": 2, "head_dim": 256, "tokens": 3, "layers": 1, "bytes_per_element": 4}
    assert cache.nbytes() == 2 * record.cache_bytes(**shape)


def test_the_map_times_the_mixed_values_is_the_head_before_the_experts():
    module, x = make(), hidden(9)
    result = module(x, output_attentions=True, return_dict=True)
    source, destination = (result.aux["routing"][end] for end in ("source", "destination"))
    value = experts.dense_in(x, module.value_experts, source)
    torch.testing.assert_close(result.attentions @ value, result.aux["heads"], atol=2e-6, rtol=0)
    total = np.zeros((9, 12))
    for head in range(2):
        weights = module.effective_map(x, head=head, batch=1)
        tile = weights.tile(slice(None), slice(None))
        np.testing.assert_allclose(tile, result.attentions[1, head].detach().numpy(), atol=2e-6)
        np.testing.assert_array_equal(weights.destination, destination.dense()[1, :, head].detach().numpy())
        # the whole output, expert pair by expert pair
        for e in range(4):
            for f in range(4):
                part = weights.contribution(slice(None), slice(None), source=e, destination=f)
                one = module.value_experts[head, e] @ module.output_experts[head, f]
                total += part @ (x[1] @ one).detach().numpy()
    np.testing.assert_allclose(total, result.output[1].detach().numpy(), atol=3e-6)


def test_dead_rows_are_zero_with_finite_gradients(projection):
    module, x = make(projection=projection), hidden(7).requires_grad_()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :4] = False
    result = module(x, attention_mask=keep, return_dict=True)
    assert not result.output[1, :4].any()
    assert torch.isneginf(result.lse[1, :, :4]).all()
    result.output.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_are_those_of_finite_differences(projection):
    module = make(d_model=6, num_experts=3, bias=True, projection=projection, implementation="eager").double()
    x = hidden(4, batch=1, width=6).double().requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def forward(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


def test_half_types_route_in_float32(projection):
    module, x = make(projection=projection, top_k=4), hidden(9)
    want = module(x)[0]
    half = module.to(torch.bfloat16)(x.bfloat16(), return_dict=True)
    assert half.output.dtype == torch.bfloat16
    assert half.aux["routing"]["source"].gates.dtype == torch.float32
    assert (half.output.float() - want).abs().max() < 0.03


def test_selection_rows_start_equally_long():
    for router in (make().source_router, make().destination_router):
        norms = router.weight.norm(dim=1)
        torch.testing.assert_close(norms, norms[:1].expand_as(norms))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k must be between 1 and num_experts = 4; got 5"),
        ({"top_k": 0}, "top_k must be between 1"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"router": "relu"}, "router must be one of sigmoid, softmax"),
        ({"projection": "sparse"}, "projection must be one of auto, dense, grouped, triton"),
        ({"aux_loss_coeff": -1}, "aux_loss_coeff must be at least 0"),
        ({"rotary_fraction": 0}, "rotary_fraction must be above 0"),
        ({"dim": 16}, "names of the width must agree"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_map_of_a_continued_cache_is_refused():
    with pytest.raises(ValueError, match="a cache keeps none of the past"):
        make().effective_map(hidden(3), head=0, past_key_value=ContiguousKV())


@pytest.mark.parametrize(
    "changes", [{}, {"use_rotary": True, "bias": True}, {"router": "softmax", "top_k": 1}]
)
def test_the_dense_formula_is_the_sum_of_contributions_and_the_output(changes):
    module, x = make(causal=True, **changes).double(), hidden(7).double()
    if module.output_bias is not None:
        torch.nn.init.uniform_(module.output_bias)
    with torch.no_grad():
        dense = module.dense_output(x)
        torch.testing.assert_close(module(x)[0], dense, atol=1e-12, rtol=1e-10)
        total = torch.zeros(7, 12, dtype=torch.float64)
        for head in range(2):
            drawn = module.effective_map(x, head=head, batch=1)
            for source in range(4):
                for destination in range(4):
                    ends = drawn.contribution(
                        slice(None), slice(None), source=source, destination=destination
                    )
                    value = x[1] @ module.value_experts[head, source]
                    total += (
                        torch.from_numpy(ends).double() @ value @ module.output_experts[head, destination]
                    )
        total = total if module.output_bias is None else total + module.output_bias
        torch.testing.assert_close(total, dense[1], atol=1e-6, rtol=1e-5)
