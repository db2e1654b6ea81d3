"""Laws of the mask algebra, each against a definition written as a double loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from attnlab_kernels.masks import (
    And,
    Causal,
    Documents,
    Full,
    Mask,
    MaskError,
    Padding,
    Window,
    mask_from_json,
)

MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(0),
    Window(2),
    Window(3, 2),
    Window(100, 100),
    Padding(((0, 5), (2, 9), (3, 3))),
    Causal() & Padding(((0, 5), (2, 9), (3, 3))),
    Window(2) & Padding(((0, 5), (2, 9), (3, 3))),
    Window(1, 4) & Padding(((4, 6),)),
    Documents((2, 3, 4)),
    Causal() & Documents(((2, 3, 4), (5, 1), (4, 4, 4, 4))),
    Window(2, 1) & Documents((1, 4, 1, 2)),
    Documents((4, 3, 6)) & Padding(((0, 5), (2, 9), (3, 3))),
]
SIZES = [(1, 1), (1, 7), (7, 7), (3, 10), (10, 3), (9, 9), (13, 11)]


def by_definition(mask: Mask, row: int, col: int, num_queries: int, num_keys: int, batch: int) -> bool:
    position = num_keys - num_queries + row
    match mask:
        case Full():
            return True
        case Causal():
            return col <= position
        case Window(left, right):
            return position - left <= col <= position + right
        case Padding(ranges):
            start, stop = ranges[batch % len(ranges)]
            return start <= col < stop
        case Documents(lengths):
            ours = lengths[batch % len(lengths)]
            return position >= 0 and document(position, ours) == document(col, ours)
        case And(parts):
            return all(by_definition(part, row, col, num_queries, num_keys, batch) for part in parts)
    raise AssertionError(mask)


def document(token: int, lengths: tuple[int, ...]) -> int:
    for index, length in enumerate(lengths[:-1]):
        if token < length:
            return index
        token -= length
    return len(lengths) - 1


def dense(mask: Mask, num_queries: int, num_keys: int, batch: int) -> np.ndarray:
    cells = itertools.product(range(num_queries), range(num_keys))
    values = [by_definition(mask, row, col, num_queries, num_keys, batch) for row, col in cells]
    return np.array(values, bool).reshape(num_queries, num_keys)


@pytest.fixture(params=MASKS, ids=lambda mask: mask.describe())
def mask(request) -> Mask:
    return request.param


@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_every_question_agrees_with_the_definition(mask, num_queries, num_keys, batch):
    expected = dense(mask, num_queries, num_keys, batch)
    size = {"num_queries": num_queries, "num_keys": num_keys, "batch": batch}
    got = mask.allowed(np.arange(num_queries), np.arange(num_keys), **size)
    np.testing.assert_array_equal(got, expected)
    assert mask.count(num_queries, num_keys, batch) == expected.sum()
    np.testing.assert_array_equal(mask.dead_rows(num_queries, num_keys, batch), ~expected.any(axis=1))


@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_key_range_is_the_smallest_that_holds_every_allowed_key(mask, num_queries, num_keys, batch):
    expected = dense(mask, num_queries, num_keys, batch)
    for start, stop in itertools.combinations(range(num_queries + 1), 2):
        keys = np.flatnonzero(expected[start:stop].any(axis=0))
        lo, hi = mask.key_range(start, stop, num_queries=num_queries, num_keys=num_keys, batch=batch)
        if len(keys):
            assert (lo, hi) == (keys[0], keys[-1] + 1)
        else:
            assert lo == hi


@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_key_ranges_of_runs_of_rows_are_the_key_range_of_each(mask, num_queries, num_keys, batch):
    size = {"num_queries": num_queries, "num_keys": num_keys, "batch": batch}
    for edges in itertools.combinations_with_replacement(range(num_queries + 1), 3):
        wanted = [mask.key_range(start, stop, **size) for start, stop in itertools.pairwise(edges)]
        np.testing.assert_array_equal(np.stack(mask.key_ranges(np.array(edges), **size), axis=1), wanted)


def test_allowed_takes_any_rows_and_columns():
    rows, cols = np.array([5, 1, 1]), np.array([6, 0, 3, 3])
    expected = dense(Window(2, 1), 7, 9, 0)[np.ix_(rows, cols)]
    np.testing.assert_array_equal(Window(2, 1).allowed(rows, cols, num_queries=7, num_keys=9), expected)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(MASKS, 2)), ids=str)
def test_and_means_both(first, second):
    sizes = {m.form().batch_size for m in (first, second)}
    if sizes == {1, 3}:
        assert (first & second).form().batch_size == 3
    for batch in range(3):
        both = dense(first, 7, 9, batch) & dense(second, 7, 9, batch)
        got = (first & second).allowed(np.arange(7), np.arange(9), num_queries=7, num_keys=9, batch=batch)
        np.testing.assert_array_equal(got, both)
        assert first & second == second & first


@pytest.mark.parametrize(
    ("combined", "simplest"),
    [
        (Full() & Causal(), Causal()),
        (Causal() & Causal(), Causal()),
        (Causal() & Window(5, 3), Window(5)),
        (Window(5, 1) & Window(2, 4), Window(2, 1)),
        (Padding(((0, 6),)) & Padding(((2, 9),)), Padding(((2, 6),))),
        (Padding(((0, 2),)) & Padding(((4, 9),)), Padding(((4, 4),))),
        (Documents((2, 5)) & Documents((4, 3)), Documents((2, 2, 3))),
        (Documents((2, 5)) & Documents(((9,), (1, 3))), Documents(((2, 7), (1, 1, 5)))),
        ((Causal() & Padding(((1, 4),))) & Window(3), And((Window(3), Padding(((1, 4),))))),
    ],
)
def test_and_simplifies(combined, simplest):
    assert combined == simplest


def test_json_round_trip(mask):
    assert mask_from_json(mask.to_json()) == mask


def test_a_one_token_step_of_a_causal_mask_sees_every_key():
    assert Causal().count(1, 33) == 33
    assert Window(7).key_range(0, 1, num_queries=1, num_keys=33) == (25, 33)


def test_a_decoded_token_belongs_to_the_last_document():
    mask = Causal() & Documents((3, 4))
    assert [mask.key_range(0, 1, num_queries=1, num_keys=keys) for keys in (3, 4, 7, 9)] == [
        (0, 3),
        (3, 4),
        (3, 7),
        (3, 9),
    ]


def test_documents_are_read_from_the_ids_of_tokens():
    assert Documents.from_ids([7, 7, 0, 0, 0, 3]) == Documents((2, 3, 1))
    assert Documents.from_ids(np.array([[1, 1, 2], [5, 5, 5]])) == Documents(((2, 1), (3,)))


def test_who_reads_one_band_only_is_told_of_documents():
    with pytest.raises(MaskError, match="one band of keys here; got document ids: causal and 2 documents"):
        (Causal() & Documents((3, 4))).band()


def test_count_of_a_large_map_needs_no_dense_mask():
    n = 1_000_000
    assert Causal().count(n, n) == n * (n + 1) // 2
    assert Window(255).count(n, n) == n * 256 - 255 * 256 // 2
    assert Documents((n // 4,) * 4).count(n, n) == n * n // 4
    assert (Causal() & Documents((1000,) * 1000)).count(n, n) == n * 1001 // 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Window(-1), r"left must be a whole number of keys >= 0; got -1"),
        (lambda: Window(2, -1), r"right must be .* got -1"),
        (lambda: Window(2.5), r"left must be .* got 2\.5"),  # pyright: ignore[reportArgumentType]
        (lambda: Window(True), r"left must be .* got True"),
        (lambda: Padding(()), r"ranges must hold one"),
        (lambda: Padding(((3, 2),)), r"0 <= start <= stop; got \(3, 2\)"),
        (lambda: Padding(((0, 1), (0, 2))) & Padding(((0, 1),) * 3), r"same batch; got 2 and 3"),
        (lambda: Padding(((0, 1), (0, 2))).count(4, 4, batch=2), r"batch must be one of 0\.\.1.*got 2"),
        (lambda: Documents(()), r"lengths must hold the tokens of one document or more; got \(\)"),
        (lambda: Documents(((3,), ())), r"lengths must hold"),
        (lambda: Documents((3, 0)), r"lengths must be whole numbers of tokens >= 1; got 0"),
        (lambda: Documents((True,)), r"lengths must be .* got True"),
        (lambda: Documents.from_ids([0, 1, 0]), r"ids must name each document in one run.*\[0, 1, 0\]"),
        (lambda: Documents.from_ids([0.5]), r"ids must be integers"),
        (lambda: Documents(((1,), (2,))) & Padding(((0, 1),) * 3), r"same batch; got 3 and 2"),
        (
            lambda: mask_from_json({"kind": "spiral"}),
            r"full, causal, window, padding, documents, and; got .*spiral",
        ),
        (lambda: mask_from_json({"kind": "window"}), r"incomplete"),
        (lambda: mask_from_json([]), r"kind must be one of"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_mask_that_means_nothing_is_refused_by_name(make, says):
    with pytest.raises(MaskError, match=says):
        make()
