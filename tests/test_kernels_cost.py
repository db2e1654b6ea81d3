"""Cost follows the mask, and no key head is copied for its group: counted, not read from the code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from attnlab_kernels.masks import Causal, Full, Window
from attnlab_kernels.operations.linear import feature_maps
from attnlab_kernels.operations.linear.api import linear_attend
from attnlab_kernels.operations.linear.reference import LinearSums
from attnlab_kernels.operations.softmax.api import attend


class MadeStorages(TorchDispatchMode):
    """Bytes of every tensor that an operator makes, views and what it was given left out."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.bytes: list[int] = []
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in self.known:
                storage = item.untyped_storage()
                self.known.add(storage.data_ptr())
                self.bytes.append(storage.nbytes())
                self.alive.append(item)  # so that no address is used twice
        return result


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that any operator makes; views count as what they look at."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.bytes = max(self.bytes, item.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("eager", Full()),
        ("sdpa_math", Full()),
        ("sdpa_flash", Causal()),
        ("banded", Window(999)),
        ("auto", Causal()),
    ],
    ids=str,
)
def test_a_group_of_query_heads_shares_its_keys_without_a_copy(name, mask):
    q, k, v = torch.randn(1, 16, 1, 64), torch.randn(1, 1, 4096, 64), torch.randn(1, 1, 4096, 64)
    with LargestStorage() as largest:
        attend(q, k, v, mask=mask, implementation=name)
    assert largest.bytes <= k.nbytes


@pytest.mark.parametrize(("name", "mask"), [("sdpa_flash", Causal()), ("banded", Window(255))], ids=str)
def test_a_fused_implementation_keeps_no_scores(name, mask):
    q, k, v = (torch.randn(1, 2, 4096, 32) for _ in range(3))
    with LargestStorage() as largest:
        attend(q, k, v, mask=mask, implementation=name)
    assert largest.bytes <= q.nbytes


class VisitedPairs(TorchDispatchMode):
    """(query, key) pairs that fused attention calls compute, all heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            q, k = args[:2]
            self.count += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return func(*args, **(kwargs or {}))


def test_a_window_over_16k_tokens_visits_at_most_twice_what_it_allows():
    q, k, v = (torch.randn(1, 2, 16_384, 8) for _ in range(3))
    with torch.inference_mode(), VisitedPairs() as visited:
        attend(q, k, v, mask=Window(255), implementation="banded")
    allowed = 2 * Window(255).count(16_384, 16_384)
    assert allowed <= visited.count <= 2.1 * allowed


def test_linear_attention_costs_twice_as_much_for_twice_the_tokens_and_keeps_few_states():
    flops, largest = [], LargestStorage()
    for count in (16_384, 32_768):
        q, k, v = (torch.randn(1, 2, count, 16).exp() for _ in range(3))
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            linear_attend(q, k, v, causal=True)
        flops.append(counter.get_total_flops())
        with torch.inference_mode(), largest:
            linear_attend(q, k, v, causal=True)
        assert largest.bytes <= q.nbytes
    assert flops[1] == 2 * flops[0]


@pytest.mark.parametrize("features", [16, 70])
def test_without_gradients_nothing_but_the_output_is_as_long_as_the_sequence(features, monkeypatch):
    projection = torch.randn(features, 16)
    phi = partial(feature_maps.favor, projection=projection, stabilise="none")
    monkeypatch.setattr("attnlab_kernels.operations.linear.segments.SEGMENT_BYTES", 2**19)
    q, k, v = (torch.randn(1, 2, 16_384, 16) for _ in range(3))
    with torch.inference_mode(), MadeStorages(q, k, v) as made:
        output = linear_attend(q, k, v, causal=True, maps=(phi, phi)).output
    assert sorted(made.bytes)[-1] == output.nbytes == v.nbytes
    assert sorted(made.bytes)[-2] <= 2**20 < output.nbytes


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_segments_join_to_the_formula_over_all_tokens(count, normalize, dtype, monkeypatch):
    monkeypatch.setattr("attnlab_kernels.operations.linear.segments.SEGMENT_BYTES", 2**14)
    torch.manual_seed(count)
    q, k, v = (torch.randn(2, 3, count, 5).to(dtype) for _ in range(3))
    past = LinearSums(torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5))
    settings: dict[str, Any] = {
        "causal": True,
        "normalize": normalize,
        "past": past,
        "maps": (feature_maps.elu_plus_one,) * 2,
    }
    with torch.no_grad():
        ours = linear_attend(q, k, v, form="chunked", chunk=16, **settings)
        want = linear_attend(q, k, v, form="parallel", **settings)
    assert ours.output.dtype == dtype
    loose = dtype == torch.bfloat16
    torch.testing.assert_close(
        ours.output, want.output, atol=1e-2 if loose else 1e-4, rtol=1e-2 if loose else 1e-5
    )
    torch.testing.assert_close(ours.sums, want.sums, atol=1e-4, rtol=1e-5)
    assert (ours.denominator is None) == (not normalize)
    if normalize:
        torch.testing.assert_close(ours.denominator, want.denominator, atol=1e-4, rtol=1e-5)
