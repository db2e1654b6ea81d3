"""Every statistic of a head against its dense formula in float64 numpy, however the rows are cut into blocks."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnlab.hook import LayerCall
from attnlab.probes.statistics import HeadStatistics, head_statistics, map_statistics
from attnlab.probes.token_facts import TokenFacts, token_facts
from attnlab.views.statistics import STATISTICS, statistics_table
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.masks import Causal, Full, Mask, Padding, Window
from attnlab_kernels.operations.softmax.api import attend
from attnlab_storage.results import InputRow

HEADS, KV_HEADS, KEYS = 6, 2, 53
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(11),
    "both ways": Window(7, 5),
    "padded": Causal() & Padding(((9, 47),)),
    "dead": Padding(((0, 0),)),
}
RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 17, KEYS)
FACTS = TokenFacts(IDS, needle=(12, 19), answer=(44, 51))


def made_call(mask: Mask, queries: int = KEYS, *, sharp: float = 3, dtype: Any = torch.float32) -> LayerCall:
    random = torch.Generator().manual_seed(3)
    query = (torch.randn(1, HEADS, queries, 8, generator=random) * sharp).to(dtype)
    key = torch.randn(1, KV_HEADS, KEYS, 8, generator=random).to(dtype)
    value = torch.randn(1, KV_HEADS, KEYS, 5, generator=random).to(dtype)
    result = attend(query, key, value, mask=mask, scale=0.5, implementation="eager")
    assert result.lse is not None
    return LayerCall(2, "layer", query, key, value, mask, 0.5, result.output, result.lse, "eager", "asked")


def dense(call: LayerCall) -> tuple[np.ndarray, np.ndarray]:
    """The map [Hq, Sq, Sk] in float64 by the book, and what the mask allows."""
    query, key = call.query[0].double().numpy(), call.key[0].double().numpy()
    scores = np.einsum("hid,hjd->hij", query, np.repeat(key, HEADS // KV_HEADS, 0)) * call.scale
    queries = query.shape[1]
    allowed = call.mask.allowed(np.arange(queries), np.arange(KEYS), num_queries=queries, num_keys=KEYS)
    weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total), allowed


def gini(values: np.ndarray) -> float:
    """Half the relative mean absolute difference: the definition, all pairs."""
    return np.abs(values[:, None] - values[None]).sum() / (2 * len(values) * values.sum())


def by_the_book(
    weights: np.ndarray, allowed: np.ndarray, norms: np.ndarray, first: int = 0
) -> dict[str, float]:
    """Every statistic of one head, loops and all."""
    queries = len(weights)
    live = [i for i in range(queries) if allowed[i].any()]
    place = np.arange(queries) + KEYS - queries
    keys = np.arange(KEYS)
    found: dict[str, list[float]] = {}

    def take(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    copied = set()
    for i in live:
        row, at, n = weights[i], place[i], int(allowed[i].sum())
        entropy = -sum(p * np.log(p) for p in row if p > 0)
        squares = (row**2).sum()
        take("entropy", entropy)
        take("effective_tokens", np.exp(entropy))
        take("participation_ratio", 1 / squares)
        take("max_weight", row.max())
        take("sink_mass", row[first])
        take("mean_distance", (row * np.abs(at - keys)).sum())
        take("local_mass", row[np.abs(at - keys) < 32].sum())
        take("gini", gini(row[allowed[i]]))
        take("top_mass", np.sort(row)[-8:].sum())
        take("coverage_keys", int((np.cumsum(np.sort(row)[::-1]) < 0.95).sum()) + 1)
        take("value_weighted_norm", (row * norms).sum())
        take("value_weighted_sink", row[first] * norms[first] / (row * norms).sum())
        if n > 1:
            take("normalized_entropy", entropy / np.log(n))
            take("hoyer", (np.sqrt(n) - 1 / np.sqrt(squares)) / (np.sqrt(n) - 1))
        if allowed[i, at]:
            take("self_token", row[at])
        if at and allowed[i, at - 1]:
            take("previous_token", row[at - 1])
        same = [j for j in keys if j < at and IDS[j] == IDS[at] and allowed[i, j]]
        after = [j for j in keys if 1 <= j <= at and IDS[j - 1] == IDS[at] and allowed[i, j]]
        if same:
            take("duplicate_token", row[same].sum())
        if after:
            take("induction", row[after].sum())
        if 44 <= at + 1 < 51:
            take("needle_mass", row[12:19].sum())
            top = int(row.argmax())
            if 12 <= top < 19 and IDS[top] == IDS[at + 1]:
                copied.add(top)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    if live:
        means["heavy_hitter_mass"] = np.sort(weights[live].sum(0))[-16:].sum() / len(live)
    if "needle_mass" in found:
        means["retrieval"] = len(copied) / 7
    return means


def values(found: HeadStatistics, head: int) -> dict[str, float]:
    return {row.name: row.value for row in found.rows if row.head == head}


@pytest.mark.parametrize("queries", [KEYS, 20, 1])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("cells", [1 << 21, HEADS * KEYS * 3])
def test_statistics_are_those_of_the_dense_formulas(
    mask: Mask, queries: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnlab.probes.statistics.BLOCK_CELLS", cells)
    call = made_call(mask, queries)
    weights, allowed = dense(call)
    norms = np.linalg.norm(call.value[0].double().numpy(), axis=-1)
    found = head_statistics(call, FACTS)
    if not allowed.any():
        assert found == HeadStatistics([], {})
        return
    for head in (0, 4):
        wanted = by_the_book(weights[head], allowed, norms[head // 3], mask.band().key_interval(KEYS)[0])
        assert values(found, head) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_every_statistic_of_the_table_is_measured_on_a_needle() -> None:
    assert set(values(head_statistics(made_call(Causal()), FACTS), 0)) == set(STATISTICS)


def test_a_statistic_that_no_row_has_is_not_measured() -> None:
    distinct = TokenFacts(np.arange(KEYS))
    for facts in (None, distinct):
        found = values(head_statistics(made_call(Causal()), facts), 0)
        assert set(STATISTICS) - set(found) == {"duplicate_token", "induction", "needle_mass", "retrieval"}


def test_the_kernels_own_rounding_of_the_log_sum_exp_does_not_count() -> None:
    call = made_call(Causal())
    off = LayerCall(**{**call.__dict__, "lse": call.lse + 1e-3})
    assert [row.value for row in head_statistics(off).rows] == pytest.approx(
        [row.value for row in head_statistics(call).rows], rel=1e-5, abs=1e-6
    )


def test_curves_are_the_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    call = made_call(MASKS["padded"])
    weights, allowed = dense(call)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(np.where(weights > 0, weights * np.log(weights), 0), -1)
    entropy[:, ~allowed.any(1)] = np.nan
    curves = head_statistics(call).curves
    np.testing.assert_allclose(curves["row_entropy"], entropy, atol=1e-5)
    np.testing.assert_allclose(curves["column_mass"], weights.sum(1), atol=1e-5)
    monkeypatch.setattr("attnlab.probes.statistics.CURVE_POINTS", 10)
    curves = head_statistics(call).curves
    edges = np.arange(11) * KEYS // 10
    for point, (start, stop) in enumerate(pairwise(edges)):
        np.testing.assert_allclose(
            curves["column_mass"][:, point], weights.sum(1)[:, start:stop].mean(1), atol=1e-5
        )
        part = entropy[:, start:stop]
        if not np.isnan(part).all():
            np.testing.assert_allclose(curves["row_entropy"][:, point], np.nanmean(part, 1), atol=1e-5)


def test_the_heaviest_columns_come_with_their_mass() -> None:
    call = made_call(Causal())
    weights, _ = dense(call)
    for row in head_statistics(call).rows:
        if row.name == "heavy_hitter_mass":
            assert row.head is not None
            mean, detail = weights[row.head].mean(0), row.detail or {}
            assert detail["columns"] == np.argsort(-mean)[:16].tolist()
            np.testing.assert_allclose(detail["mass"], np.sort(mean)[::-1][:16], atol=1e-6)


def test_a_needle_that_is_copied_scores_one() -> None:
    ids = np.arange(KEYS)
    ids[44:51] = ids[12:19]
    copying = np.zeros((KEYS, KEYS))
    for step in range(7):
        copying[43 + step, 12 + step] = 1
    found = map_statistics([Written(copying)], 0, TokenFacts(ids, (12, 19), (44, 51)))
    assert values(found, 0)["retrieval"] == 1
    assert values(found, 0)["needle_mass"] == pytest.approx(1)
    half = copying.copy()
    half[43:47] = np.eye(KEYS)[0]
    found = map_statistics([Written(half)], 0, TokenFacts(ids, (12, 19), (44, 51)))
    assert values(found, 0)["retrieval"] == pytest.approx(3 / 7)


class Written:
    """A map that is written down, signed if it likes."""

    def __init__(self, weights: np.ndarray, mask: Mask | None = None) -> None:
        self.weights = weights.astype(np.float32)
        self.shape = weights.shape
        self.mask: Mask = mask or Full()

    def tile(self, rows: slice, cols: slice) -> np.ndarray:
        return self.weights[rows, cols]


def test_any_map_gives_what_its_kernel_call_gives() -> None:
    call = made_call(Causal())
    query, key, lse = (tensor[0].numpy() for tensor in (call.query, call.key, call.lse))
    maps = [SoftmaxMap(query[h], key[h // 3], lse[h], 0.5, Causal()) for h in range(HEADS)]
    found, wanted = map_statistics(maps, 2, FACTS), head_statistics(call, FACTS)
    for head in range(HEADS):
        left_out = {"value_weighted_norm", "value_weighted_sink"}
        both = {name: value for name, value in values(wanted, head).items() if name not in left_out}
        assert values(found, head) == pytest.approx(both, abs=1e-5)


def test_a_signed_map_is_measured_by_the_size_of_its_weights() -> None:
    signed = RNG.standard_normal((KEYS, KEYS))
    size = np.abs(signed) / np.abs(signed).sum(1, keepdims=True)
    found = values(map_statistics([Written(signed)], 0), 0)
    assert found["sink_mass"] == pytest.approx(size[:, 0].mean(), abs=1e-6)
    assert found["entropy"] == pytest.approx(-(size * np.log(size)).sum(1).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "known"),
    [(KEYS, KEYS, True), (1, KEYS, False), (KEYS, KEYS - 1, False), (KEYS + 1, KEYS, False)],
)
def test_tokens_are_known_where_the_queries_are_the_last_keys(queries: int, keys: int, known: bool) -> None:
    words = [f"w{index}" for index in IDS]
    facts = token_facts(InputRow("text", words, words), queries, keys)
    assert (facts is not None) is known
    decoded = token_facts(InputRow("text", words[-1:], words), 1, KEYS)
    assert decoded is not None
    same: Callable[[Any], np.ndarray] = lambda ids: np.equal.outer(ids, ids)  # noqa: E731
    np.testing.assert_array_equal(same(decoded.ids), same(IDS))


def test_half_precision_is_measured_in_float32() -> None:
    call = made_call(Causal(), dtype=torch.bfloat16)
    weights, allowed = dense(call)
    norms = np.linalg.norm(call.value[0].double().numpy(), axis=-1)
    wanted = by_the_book(weights[1], allowed, norms[0])
    assert values(head_statistics(call, FACTS), 1) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_the_documents_show_the_table() -> None:
    shown = (Path(__file__).parent.parent / "docs/statistics.md").read_text()
    assert statistics_table() in shown
