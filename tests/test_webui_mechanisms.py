"""The Mechanisms page without a browser."""

import html
import re
from dataclasses import replace

import pytest

from attnlab_kernels.catalog import MECHANISMS
from attnlab_webui import pieces
from attnlab_webui.mechanism_facts import mechanism_document
from attnlab_webui.pages import mechanisms as page
from attnlab_webui.pages.mechanisms import Shape, ShapeError, cache_bytes, catalog, checked_shape


def test_every_mechanism_of_the_catalog_has_a_row():
    shown = catalog(Shape())
    assert re.findall(r'<details class="at-mech" id="(\w+)"', shown) == list(MECHANISMS)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_row_says_everything_of_its_record(name):
    mechanism = MECHANISMS[name]
    text = html.unescape(page.row(mechanism, 1, 1))
    for told in (
        mechanism.summary,
        mechanism.formula,
        mechanism.complexity,
        mechanism.not_for,
        mechanism.swap_note,
    ):
        assert told in text
    assert mechanism.paper_url in text
    assert mechanism.snippet in text
    assert all(use in text for use in mechanism.use_cases)
    assert all(parameter.help in text for parameter in mechanism.parameters)


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_can_be_used_in_an_experiment(name):
    assert f'href="/?mechanism={name}"' in page.row(MECHANISMS[name], 1, 1)


def test_the_cache_is_that_of_the_catalog():
    shape = Shape(layers=2, heads=8, kv_heads=2, head_dim=16, tokens=100, dtype="float32")
    assert cache_bytes(MECHANISMS["grouped_query"], shape) == 2 * 2 * 2 * 16 * 100 * 4
    assert cache_bytes(MECHANISMS["multi_head"], shape) == 2 * 2 * 8 * 16 * 100 * 4


def test_the_longest_bar_is_the_largest_cache():
    sizes = {name: cache_bytes(mechanism, Shape()) for name, mechanism in MECHANISMS.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    assert "width:100.0%" in page.bar(sizes[largest], sizes[largest])
    assert "width:50.0%" in page.bar(5, 10)
    assert "none" in page.bar(0, 10)


def test_a_shape_of_the_reader_changes_the_sizes():
    shape = Shape(1, 4, 4, 8, 1000, "float16")
    told = page.show_catalog(
        shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.tokens, shape.dtype
    )
    assert pieces.size_in_bytes(2 * 4 * 8 * 1000 * 2) in told
    assert "1,000 tokens, float16" in told


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((None, 9, 3, 64, 8192, "float32"), "layers must be a whole number"),
        ((30, 0, 3, 64, 8192, "float32"), "heads must be a whole number"),
        ((30, 9, 3, 64, -1, "float32"), "tokens must be a whole number"),
        ((30, 9, 3, 64, 1.5, "float32"), "tokens must be a whole number"),
        ((30, 9, 3, 64, float("nan"), "float32"), "tokens must be a whole number"),
        ((30, 9, 3, 64, float("inf"), "float32"), "tokens must be a whole number"),
        ((30, 9, 2, 64, 8192, "float32"), "KV heads must divide heads (9)"),
        ((30, 9, 3, 64, 8192, "int4"), "dtype must be one of float32"),
    ],
)
def test_a_shape_no_model_has_names_the_field(fields, words):
    with pytest.raises(ShapeError, match=re.escape(words)):
        checked_shape(*fields)
    assert html.escape(words) in page.show_catalog(*fields)


def test_a_bundled_model_fills_the_shape():
    assert page.shapes()["smollm2-135m"] == [30, 9, 3, 64, 8192]


def test_text_of_a_record_is_escaped():
    hostile = replace(MECHANISMS["flash"], title="<script>", summary="<script>", snippet="<script>")
    assert "<script>" not in page.row(hostile, 1, 1)


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_document_of_a_record_is_plain(name):
    document = mechanism_document(MECHANISMS[name])
    assert document["id"] == name
    assert not any(callable(value) for value in document.values())
    assert [parameter["name"] for parameter in document["parameters"]] == [
        parameter.name for parameter in MECHANISMS[name].parameters
    ]
