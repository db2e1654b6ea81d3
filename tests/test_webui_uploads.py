"""Pictures and sounds uploaded on a page: named in its YAML, whole in what is queued."""

import base64
import io

import pytest
from PIL import Image

from attnlab.pictures import pack_picture
from attnlab_webui import drafts, new_experiment, uploads
from attnlab_webui.form import AUDIO, BARE_MODULE, IMAGE, TEXT, Form

SPEC = "{name: n, model: vit-digits, input: {image: %s}, vary: {mechanism: [multi_head]}}"


def png(shade: int = 7) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def test_an_upload_is_a_name_on_the_page_and_whole_in_the_queue():
    name = uploads.keep("image", "my picture.png", png())
    assert uploads.NAME.fullmatch(name)
    draft = drafts.read_draft(SPEC % name)
    assert draft.problems == ()
    assert draft.spec is not None
    assert draft.spec.input.image == pack_picture(png())
    assert name in draft.text


def test_a_clone_shows_a_name_again_and_queues_the_same():
    name = uploads.keep("image", "p.png", png())
    spec = drafts.read_draft(SPEC % name).spec
    assert spec is not None
    text = drafts.clone(spec.to_dict())
    assert f"image: {name}" in text
    assert "base64" not in text
    again = drafts.read_draft(text).spec
    assert again is not None
    assert again.hash() == spec.hash()


def test_a_name_that_was_never_uploaded_is_a_problem():
    (problem,) = drafts.read_draft(SPEC % "upload-0123456789abcdef.png").problems
    assert problem.argument == "input.image"
    (problem,) = drafts.read_draft(SPEC % "../../etc/passwd").problems
    assert "must be a sample or a data URI here" in problem.rule


@pytest.mark.parametrize(
    ("kind", "data"), [("image", b"no picture"), ("audio", b"no sound"), ("audio", png())]
)
def test_what_cannot_be_read_is_not_kept(home, kind, data):
    with pytest.raises(ValueError, match="file: must be a"):
        uploads.keep(kind, "x", data)
    assert not (home / "uploads").exists()


def test_only_the_newest_uploads_stay(home, monkeypatch):
    monkeypatch.setattr(uploads, "KEPT", 3)
    names = [uploads.keep("image", "p.png", png(shade)) for shade in range(5)]
    kept = {path.name for path in (home / "uploads").iterdir()}
    assert len(kept) == 3
    assert names[-1] in kept


def test_the_form_follows_the_model_that_is_chosen():
    form = drafts.readable(Form(model="vit-digits", text="words", sequence_lengths="512", max_tokens="9"))
    assert (form.source, form.image, form.sequence_lengths, form.max_tokens) == (IMAGE, "digit-3", "", "")
    form = drafts.readable(Form(model="whisper-tiny-en", text="words"))
    assert (form.source, form.audio) == (AUDIO, "dashwood")
    assert drafts.writes(form)
    back = drafts.readable(Form(model="minilm-l6", source=AUDIO, audio="dashwood", target="x"))
    assert (back.source, back.target) == (TEXT, "")
    assert back.text.startswith("The bank raised its rates")
    for model in ("owner/unknown", BARE_MODULE):
        assert drafts.readable(Form(model=model, source=IMAGE)).source == IMAGE


def test_the_page_shows_what_goes_in():
    shown = new_experiment.preview(Form(source=IMAGE, image="digit-3"))
    assert "at-pixels" in shown
    assert base64.b64encode(b"\x89PNG")[:4].decode() in shown
    assert "at-pixels" not in new_experiment.preview(Form(source=IMAGE, image="astronaut"))
    assert "<audio" in new_experiment.preview(Form(source=AUDIO, audio="dashwood"))
    for nothing in (
        Form(text="x"),
        Form(source=IMAGE, image='"><script>'),
        Form(source=IMAGE, image="data:x;base64,"),
    ):
        assert new_experiment.preview(nothing) == ""


def test_the_length_of_a_picture_or_sound_is_said():
    assert drafts.token_line(Form(model="vit-digits", source=IMAGE, image="digit-3")) == "17 positions"
    assert (
        drafts.token_line(Form(model="vit-digits", source=IMAGE, image="astronaut", size="64"))
        == "1,025 positions"
    )
    assert drafts.token_line(Form(model="whisper-tiny-en", source=AUDIO)) == "1,500 positions"
    assert drafts.token_line(Form(model="owner/unknown", source=IMAGE)) == ""
