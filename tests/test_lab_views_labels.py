"""Laws of token labels, run labels and colour maps."""

import numpy as np
import pytest

from attnlab.views import colormaps, labels, tokens
from attnlab.views.errors import ViewError
from attnlab_kernels import catalog
from attnlab_storage import queue, results


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (["ĠThe", "Ċ", "Ã©"], ["·The", "⏎", "é"]),
        (["Ġ", "âĢ", "Ļ"], ["·", "⟨E2⟩⟨80⟩", "⟨99⟩"]),
        (["Ġa", "<|im_start|>", "日本"], ["·a", "<|im_start|>", "日本"]),
        (["▁The", "end", "<0x0A>"], ["·The", "end", "<0x0A>"]),
        (["[CLS]", "##ing", "Ã©"], ["[CLS]", "##ing", "Ã©"]),
        (["a\tb", "\x00", "\x1b[31m"], ["a⇥b", "␀", "␛[31m"]),
        (["\u202eevil", "\u200b", "\x7f"], ["⟨U+202E⟩evil", "⟨U+200B⟩", "⟨U+007F⟩"]),
        ([""], ["∅"]),
        (["<script>"], ["<script>"]),
        ([], []),
    ],
)
def test_token_labels_show_what_the_tokenizer_means(raw, shown):
    assert tokens.pretty_tokens(raw) == shown


def test_every_byte_has_a_label_without_control_characters():
    alphabet = tokens._byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    for label in tokens.pretty_tokens(["Ġ", *alphabet]):
        assert label.isprintable()
        assert label.strip() == label != ""


def test_labels_of_a_run_are_those_of_its_input(traced):
    found = tokens.token_labels(traced.store, traced.run_ids[0])
    assert found.query[:2] == ["·token0", "·token1"]
    assert found.query[-2:] == ["<script>alert(1)</script>", "⏎"]
    assert found.raw_key == traced.tokens


def test_a_run_label_is_unique_and_says_what_ran():
    document = {
        "id": 7,
        "mechanism": "sliding_window",
        "parameters": {"window_size": 64, "num_kv_heads": None},
        "implementation": "auto",
        "chosen": "banded",
        "kernels": ["aten::bmm", "aten::exp"],
        "model": "m",
        "dtype": "float32",
        "batch_size": 2,
        "phase": "decode",
    }
    assert labels.run_label(document) == "#7 sliding_window(window_size=64) banded"
    assert labels.map_label(document, 5, 2) == "#7 sliding_window(window_size=64) · L5H2 · m"
    assert labels.run_label(document | {"chosen": None, "parameters": {}}) == "#7 sliding_window auto"


@pytest.mark.parametrize(
    ("mechanism", "parameters", "label"),
    [
        ("sliding_window", {"window_size": 256}, "sliding_window"),
        ("sparse", {"stride": 7, "seed": 3, "local_window": 8}, "sparse(local_window=8)"),
        (
            "sparse",
            {"sparsity_pattern": "bigbird", "stride": 7, "seed": 3},
            "sparse(sparsity_pattern=bigbird, seed=3)",
        ),
        ("linear", {"num_features": 32}, "linear"),
        (
            "linear",
            {"variant": "linformer", "feature_map": "softmax_kernel", "num_features": 32},
            "linear(variant=linformer)",
        ),
        ("differential", {"lambda_schedule": True, "lambda_init": 0.5}, "differential(lambda_schedule=True)"),
        ("neighborhood", {"grid_height": 4}, "neighborhood"),
        ("neighborhood", {"grid_height": 4, "dims": 2}, "neighborhood(dims=2, grid_height=4)"),
    ],
)
@pytest.mark.parametrize("filled_in", [False, True])
def test_a_label_names_only_what_differs_from_the_default_and_has_an_effect(
    mechanism, parameters, label, filled_in
):
    whole = catalog.validate_parameters(mechanism, parameters) if filled_in else parameters
    assert labels.mechanism_label({"mechanism": mechanism, "parameters": whole}) == label


def test_a_run_of_another_version_keeps_all_that_it_says():
    unknown = {"mechanism": "hyper", "parameters": {"order": 2, "bias": None}}
    assert labels.mechanism_label(unknown) == "hyper(order=2)"
    assert (
        labels.mechanism_label({"mechanism": "linear", "parameters": {"decay": 0.5}}) == "linear(decay=0.5)"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (188_700_000, "188.7 MB"), (4.5e9, "4.5 GB"), (2e15, "2000.0 TB")],
)
def test_bytes_are_written_in_decimal_units(count, text):
    assert labels.format_bytes(count) == text


@pytest.mark.parametrize("name", colormaps.SEQUENTIAL)
def test_lightness_of_a_sequential_map_only_ever_moves_one_way(name):
    light = colormaps.lightness(colormaps.colormap(name))
    steps = np.diff(light) if light[-1] > light[0] else -np.diff(light)
    assert steps.min() > -0.004  # half a step of 8-bit rounding
    assert abs(light[-1] - light[0]) > 0.5


def test_the_diverging_map_is_lightest_in_the_middle_and_as_dark_at_both_ends():
    light = colormaps.lightness(colormaps.colormap(colormaps.DIVERGING))
    assert light.argmax() in (127, 128)
    assert light[0] == pytest.approx(light[-1], abs=0.05)
    np.testing.assert_allclose(light[:128], light[:127:-1], atol=0.05)


def test_colours_clip_and_an_unknown_map_names_the_choices():
    ends = colormaps.colorize(np.array([-1.0, 0.0, 1.0, 2.0, np.nan]), "viridis")
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[2], ends[3])
    np.testing.assert_array_equal(ends[4], ends[0])
    assert bytes(ends[1]) == bytes.fromhex("440154")
    assert bytes(ends[2]) == bytes.fromhex("fde725")
    with pytest.raises(ViewError, match="one of viridis, magma, paper, blue_red; got 'jet'"):
        colormaps.colormap("jet")


def test_labels_are_those_of_the_layers_own_sequences(sqlite_store):
    names = {"text": ["Ġa", "b"], "audio": ["0.00", "0.02", "0.04"]}
    streams = {name: {"title": f"the {name}", "tokens": tokens} for name, tokens in names.items()}
    run_id = _run_with_streams(sqlite_store, streams)
    wanted = {0: ("audio", "audio"), 1: ("text", "text"), 2: ("text", "audio")}
    for layer, (query, key) in wanted.items():
        labels = tokens.token_labels(sqlite_store, run_id, layer)
        assert (labels.raw_query, labels.raw_key) == (names[query], names[key])
        assert (labels.query_title, labels.key_title) == (f"the {query}", f"the {key}")
    whole = tokens.token_labels(sqlite_store, run_id)
    assert (whole.query, whole.key_title) == (["·a", "b"], "the audio")


def _run_with_streams(store, streams):
    point = {
        "mechanism": "multi_head", "parameters": {}, "implementation": "auto", "sequence_length": 3, "batch_size": 1,
        "dtype": "float32", "phase": "prefill", "model": "m", "kind": "inspect", "gpus": 0,
    }  # fmt: skip
    queue.submit(store, name="x", spec={}, spec_hash="x", points=[point])
    claim = queue.claim(store, "me")
    assert claim is not None
    with results.recording(store, claim) as session:
        text, audio = streams["text"]["tokens"], streams["audio"]["tokens"]
        results.record_input(session, claim, results.InputRow("a b", text, audio, {"streams": streams}))
        for layer, (query, key) in enumerate([("audio", "audio"), ("text", "text"), ("text", "audio")]):
            sizes = {"num_queries": len(streams[query]["tokens"]), "num_keys": len(streams[key]["tokens"])}
            row = results.TraceRow(
                layer, f"layer {layer}", "softmax", 1.0, {"kind": "full"}, heads=1, kv_heads=1, head_dim=4,
                dtype="float32", row_sum_defect=0.0, output_defect=0.0,
                detail={"queries": query, "keys": key}, **sizes,
            )  # fmt: skip
            results.record_trace(session, claim, row)
    return claim.run_id


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.14159, "3.142"),
        (9999.0, "9999"),
        (30172.4, "30,172"),
        (-24610.0, "-24,610"),
        (1.2e12, "1.2e+12"),
        (0.0, "0"),
        (2.5e-7, "2.5e-07"),
    ],
)
def test_a_number_of_a_chart_is_read_without_counting_its_digits(value: float, shown: str) -> None:
    assert labels.plain_number(value) == shown
