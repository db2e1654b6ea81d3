"""Laws of one token's weights: the row and the column of the map, exact, masked pairs told apart from weights of 0."""

import itertools
import json

import numpy as np
import pytest

from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.views.errors import ViewError
from attnlab.views.head_tiles import head_tiles
from attnlab.views.token import token_document, token_weights
from attnlab_storage import results

EPSILON = 2e-6


@pytest.mark.parametrize("which", [0, 1], ids=["causal", "window"])
@pytest.mark.parametrize("head", [2, None], ids=["one head", "mean"])
@pytest.mark.parametrize("row", [0, 40, 76])
def test_sent_is_the_row_and_received_is_the_column(traced, which, head, row):
    run_id = traced.run_ids[which]
    heads = range(4) if head is None else [head]
    reference = np.mean([traced.reference(run_id, 1, one) for one in heads], axis=0)
    allowed = traced.arrays[run_id, 1]["allowed"]
    found = token_document(traced.store, run_id, 1, row, head)
    for side, wanted, seen in (
        ("sent", reference[row], allowed[row]),
        ("received", reference[:, row], allowed[:, row]),
    ):
        weights = found[side]["weights"]
        assert [weight is not None for weight in weights] == seen.tolist()
        np.testing.assert_allclose([weight or 0.0 for weight in weights], wanted, atol=EPSILON)
        order = np.argsort(-wanted, kind="stable")[: min(12, int(seen.sum()))]
        assert [place for place, _ in found[side]["top"]] == order.tolist()
        assert max(found[side]["strip"]) == pytest.approx(wanted.max(), abs=EPSILON)
        assert found[side]["sum"] == pytest.approx(wanted.sum(), abs=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_between_two_sequences_a_query_has_no_key_of_its_own(traced, monkeypatch):
    monkeypatch.setattr("attnlab.views.token.attention_role", lambda run, trace: "cross")
    found = token_document(traced.store, traced.run_ids[0], 1, 40, 0)
    assert (found["col"], found["received"]) == (None, None)
    assert len(found["sent"]["weights"]) == 77
    assert token_weights(traced.store, traced.run_ids[0], 1, 40).received.size == 0


def test_only_the_shown_positions_travel(traced):
    found = token_document(traced.store, traced.run_ids[0], 0, 70, 1, (60, 77), count=3)
    whole = token_weights(traced.store, traced.run_ids[0], 0, 70, 1)
    assert (found["sent"]["start"], len(found["sent"]["weights"]), len(found["sent"]["top"])) == (60, 17, 3)
    assert found["sent"]["weights"][3] == float(whole.sent[63])
    assert len(found["sent"]["strip"]) == 77


def test_the_strip_and_the_list_keep_the_sign_of_what_is_largest_in_size(sqlite_store):
    spec = {
        "name": "signed",
        "module": {"dim": 24, "num_heads": 2},
        "vary": {"mechanism": ["differential"], "sequence_length": [600]},
        "record": ["maps"],
        "repeats": 1,
    }
    (run,) = results.runs_of(sqlite_store, experiment_id=run_here(sqlite_store, parse_spec(spec)))
    weights = token_weights(sqlite_store, run.id, 0, 599, 1).sent
    strip = np.array(token_document(sqlite_store, run.id, 0, 599, 1)["sent"]["strip"], np.float32)
    edges = [at * 600 // 512 for at in range(513)]
    blocks = [weights[start:stop] for start, stop in itertools.pairwise(edges)]
    assert strip.tolist() == [max(block, key=abs) for block in blocks]
    assert (strip < 0).any()
    assert (strip > 0).any()
    largest = np.argsort(-np.abs(weights))[:100].tolist()
    assert token_weights(sqlite_store, run.id, 0, 599, 1).top(100) == [
        (at, float(weights[at])) for at in largest
    ]
    assert (weights[largest] < 0).any()


def test_all_heads_of_a_region_are_the_regions_of_the_heads(traced):
    run_id = traced.run_ids[1]
    found = head_tiles(traced.store, run_id, 1, (30, 61), (20, 55))
    allowed = traced.arrays[run_id, 1]["allowed"][30:61, 20:55]
    for head in range(4):
        wanted = traced.reference(run_id, 1, head)[30:61, 20:55]
        assert (np.isnan(found[head]) == ~allowed).all()
        np.testing.assert_allclose(found[head][allowed], wanted[allowed], atol=EPSILON)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda store, run: token_document(store, run, 0, 77), "row must be in 0..76"),
        (lambda store, run: token_document(store, run, 0, 1, 4), "head must be in 0..3"),
        (lambda store, run: token_document(store, run, 0, 1, 0, None, 0), "count must be in 1..100"),
        (
            lambda store, run: token_document(store, run, 0, 1, 0, (60, 78)),
            "shown must be a range of 1..4096 positions within 0:77; got 60:78",
        ),
        (lambda store, run: token_document(store, run, 0, 1, 0, (77, 80)), "within 0:77; got 77:80"),
        (lambda store, run: token_document(store, run, 0, 1, 0, (5, 5)), "within 0:77; got 5:5"),
        (lambda store, run: head_tiles(store, run, 0, (5, 99)), "rows must be a range"),
    ],
)
def test_what_is_not_there_is_refused_with_the_rule(traced, ask, words):
    with pytest.raises(ViewError, match=words):
        ask(traced.store, traced.run_ids[0])


def test_more_weights_than_a_page_can_take_are_refused(traced, monkeypatch):
    monkeypatch.setattr("attnlab.views.head_tiles.MOST_WEIGHTS", 4 * 77 * 77 - 1)
    with pytest.raises(ViewError, match="at most 23715 weights of all heads; got 4 heads of 77 x 77"):
        head_tiles(traced.store, traced.run_ids[0], 0)
