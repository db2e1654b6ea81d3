"""Cost follows the mask, and no key head is copied for its group: counted, not read from the code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from attnlab_kernels.masks import Causal, Full, Window
from attnlab_kernels.operations.linear.api import linear_attend
from attnlab_kernels.operations.softmax.api import attend


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
    for count in (4096, 8192):
        q, k, v = (torch.randn(1, 2, count, 16).exp() for _ in range(3))
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            linear_attend(q, k, v, causal=True)
        flops.append(counter.get_total_flops())
        with torch.inference_mode(), largest:
            linear_attend(q, k, v, causal=True)
        assert largest.bytes <= q.nbytes
    assert flops[1] == 2 * flops[0]
