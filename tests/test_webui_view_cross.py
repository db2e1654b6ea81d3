"""Laws of the cross view: heads that read another sequence side by side, with the axes of both sequences."""

import io
import re

import numpy as np
import pytest
import torch
from page_fixtures import IDLE
from PIL import Image
from transformers import WhisperConfig, WhisperForConditionalGeneration

from attnlab.views.viewport import head_overlays, load_map

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def heard(serve_runs, tmp_path_factory):
    """A sentence that a small random Whisper heard, and bare cross-attention over a sequence of its own."""
    torch.manual_seed(5)
    config = WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whisper")
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return serve_runs(
        whisper={
            "model": str(folder),
            "input": {"audio": "dashwood", "max_tokens": 6},
            "layers": [1, 2, 4],
            "vary": {"mechanism": ["multi_head"]},
        },
        bare={
            "module": {"dim": 24, "num_heads": 2},
            "vary": {"mechanism": [{"cross": {"context_length": 9}}], "sequence_length": [5]},
        },
    )


@pytest.fixture
def open_cross(heard, browse_idle):
    def open_page(name="whisper", query="", **options):
        return browse_idle(heard.link(name, f"view=cross&{query}"), **options)

    return open_page


def words_of(page, part):
    return page.locator(f'[data-part="{part}"]').inner_text()


def test_only_layers_that_read_another_sequence_stand_there_and_a_click_shows_the_map(open_cross):
    page = open_cross(query="layer=1&head=3")
    heads = page.locator(".at-cross-head")
    assert heads.count() == 8
    assert words_of(page, "words") == "text → audio (seconds)"
    assert "L2H3 cross" in words_of(page, "title")
    heads.nth(1).click()
    page.get_by_text("L2H1 cross").wait_for()
    page.wait_for_url("**layer=2&head=1*")
    heads.nth(1).press("Tab")
    page.get_by_role("button", name="Open the map").click()
    page.locator("canvas.at-map").wait_for()
    page.wait_for_url("**cols=0:*")


def test_each_token_stands_at_the_second_where_the_path_reaches_it(open_cross, heard):
    page = open_cross(query="layer=2&head=3")
    run = heard.runs["whisper"]
    (path,) = head_overlays(heard.store, run.id, 2, 3)[0]["lines"]
    said = page.locator(".at-said .at-token")
    for row in range(said.count()):
        first = min(int(col) for at, col in path if int(at) == row)
        assert said.nth(row).locator("small").inner_text() == f"{first * 0.02:.2f}"
    assert said.count() == 6


def test_the_readout_is_the_exact_weight_and_the_axis_is_in_seconds(open_cross, heard):
    page = open_cross(query="layer=2&head=3")
    canvas = page.locator('[data-part="map"] canvas')
    weights = load_map(heard.store, heard.runs["whisper"].id, 2, 3).tile(slice(None), slice(None))
    shown = 380  # 7.1 s of sound and half a second behind it
    rows = len(weights)

    def point(column):
        box = canvas.bounding_box()
        x = min(84 + (column + 0.5) * (box["width"] - 92) / shown, box["width"] - 10)
        canvas.hover(position={"x": x, "y": 64 + 2.5 * (box["height"] - 72) / rows})

    for _ in range(50):  # a column is two pixels wide, and the page may still move
        point(201)
        if page.get_by_text("(201)").count():
            break
        page.wait_for_timeout(200)
    said = words_of(page, "read")
    assert "4.02 (201)" in said.replace("\n", " ")
    assert float(said.split()[-1].replace("−", "-")) == pytest.approx(weights[2, 201], rel=1e-4)
    page.get_by_label("the silence behind it").check()
    page.wait_for_function(IDLE)
    point(shown)
    page.get_by_text(re.compile(r"29\.[89]\d")).first.wait_for()


def test_the_keyboard_goes_through_tokens_and_heads(open_cross):
    page = open_cross(query="layer=2&head=0")
    page.locator('[data-part="map"] canvas').focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.wait_for_url("**token=1*")
    assert "most of" in words_of(page, "top")
    page.keyboard.press("]")
    page.get_by_text("L2H1 cross").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_function("() => !location.search.includes('token=')")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_ticked_box_is_seen(open_cross, dark):
    page = open_cross(dark=dark)
    box = page.locator('[name="rest"]')
    seen = []
    for _ in range(2):
        with Image.open(io.BytesIO(box.screenshot())) as picture:
            seen.append(int(np.ptp(np.asarray(picture.convert("L"), np.int16))))
        box.click()
    assert min(seen) > 50, seen
    assert box.evaluate("box => box.checked") is False


def test_bare_cross_attention_has_no_sound(open_cross, heard):
    page = open_cross("bare")
    assert page.locator("canvas.at-wave").is_hidden()
    assert page.get_by_label("the silence behind it").is_hidden()
    assert load_map(heard.store, heard.runs["bare"].id, 0, 0).shape == (5, 9)
    assert page.locator(".at-said .at-token").count() == 5


def test_a_text_has_no_cross_view_and_says_why(served, browse):
    traced = served.traced
    page = browse(f"{served.address}/experiment?id={traced.experiment_id}&run={traced.run_ids[0]}&view=cross")
    page.get_by_text("No layer of this run reads another sequence.").wait_for()
