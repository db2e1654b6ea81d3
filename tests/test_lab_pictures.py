"""Pictures and sounds of a spec: opened whole or refused with the rule, and never larger than memory allows."""

import io
import struct
import sys
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnlab import pictures, sounds
from attnlab.pictures import PictureError, open_picture, pack_picture, picture_samples
from attnlab.problems import SpecError
from attnlab.sounds import SoundError, envelope, open_sound, pack_sound, resample, sound_samples
from attnlab.spec import parse_spec


def png(width: int = 5, height: int = 3, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), 7 if mode == "L" else (7, 8, 9)).save(file, "PNG")
    return file.getvalue()


def promised_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def wav(samples: np.ndarray, rate: int = 16_000, width: int = 2, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def spec_of(model: str = "vit-digits", **given: Any) -> dict[str, Any]:
    return {"name": "x", "model": model, "input": given, "vary": {"mechanism": "multi_head"}}


def refused(values: dict[str, Any], folder: Path | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(values, folder=folder)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted({*picture_samples()}))
def test_every_sample_picture_opens(name: str) -> None:
    picture = open_picture(name)
    assert picture.size == (8, 8) if name.startswith("digit-") else min(picture.size) >= 172


def test_a_packed_picture_opens_to_the_same_pixels() -> None:
    packed = pack_picture(png())
    assert packed.startswith("data:image/png;base64,")
    assert open_picture(packed).getpixel((4, 2)) == (7, 8, 9)


@pytest.mark.parametrize(("width", "height"), [(4001, 4000), (20_000, 20_000), (60_000, 60_000)])
def test_a_picture_that_unpacks_to_too_much_is_refused_unread(width: int, height: int) -> None:
    with pytest.raises(PictureError, match=r"must be at most 16,000,000 pixels"):
        pack_picture(promised_png(width, height))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"GIF89a" + bytes(40), "must be a PNG, JPEG or WebP"),
        (png()[:-25], "must be a PNG, JPEG or WebP"),
        (b"", "must be a PNG, JPEG or WebP"),
        (bytes(1_000_001), "must be at most 1,000,000 bytes"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_rule(data: bytes, rule: str) -> None:
    with pytest.raises(PictureError, match=rule) as caught:
        pack_picture(data)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["nothing", "data:image/png;base64,???", "data:image/png;base64,AAA", "data:text/html,x"]
)
def test_a_source_that_names_no_picture_is_refused(source: str) -> None:
    with pytest.raises(PictureError, match="must be a"):
        open_picture(source)


def test_a_file_of_a_spec_becomes_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 8, "L"))
    spec = parse_spec(spec_of(image="a.png"), folder=tmp_path)
    assert spec.input.image is not None
    assert spec.input.image == pack_picture(png(8, 8, "L"))
    assert parse_spec(spec.to_dict()) == spec
    assert "files are read by the command line" in refused(spec_of(image="a.png"))
    assert "must be a sample, a data URI or a file, got 'b.png'" in refused(spec_of(image="b.png"), tmp_path)
    (tmp_path / "c.png").write_bytes(b"no picture")
    assert "input.image: must be a PNG, JPEG or WebP" in refused(spec_of(image="c.png"), tmp_path)


def test_the_length_of_a_picture_is_its_patches() -> None:
    (point,) = parse_spec(spec_of(image="digit-3")).points()
    assert point.sequence_length == 17
    (point,) = parse_spec(spec_of(image="astronaut", size=64)).points()
    assert point.sequence_length == 1025
    (point,) = parse_spec(spec_of("whisper-tiny-en", audio="dashwood")).points()
    assert point.sequence_length == 1500


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (spec_of(text="words"), "input: must be image: that is what vit-digits reads, got text"),
        (spec_of("rxnmapper", image="digit-3"), "input: must be text or file or synthetic"),
        (spec_of("whisper-tiny-en", image="digit-3"), "input: must be audio"),
        (spec_of(image="digit-3", audio="dashwood"), "image and audio"),
        (spec_of(image="digit-3", size=1), "input.size: must be at least 2, one patch of vit-digits"),
        (spec_of("whisper-tiny-en", audio="dashwood", size=8), "input.size: is the side of a picture"),
        (spec_of(image="digit-3", target="x"), "input.target: is for encoder-decoder models"),
        (spec_of(image="digit-3", repeat=True), "input.repeat: is for text"),
        (spec_of(image="digit-13"), "did you mean"),
        (spec_of(image="digit-3") | {"phase": "decode"}, "phase: must be prefill"),
        (spec_of(image="astronaut", size=4096) | {"model": "vit-digits"}, "at most 4194304 tokens"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_read_is_said_before_it_is_queued(values: dict[str, Any], rule: str) -> None:
    assert rule in refused(values)


def test_a_picture_has_no_length_of_its_own() -> None:
    values = spec_of(image="digit-3")
    values["vary"] = {"mechanism": "multi_head", "sequence_length": [17]}
    assert "vary.sequence_length: must not be given for image input" in refused(values)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_samples_of_every_width_are_the_same_sound(width: int) -> None:
    wanted = np.array([0, 0.5, -0.5, 0.25], np.float32)
    scaled = wanted * 2 ** (8 * width - 1)
    raw = (scaled + 128).astype(np.uint8) if width == 1 else scaled.astype(f"<i{width}")
    samples, rate = open_sound(pack_sound(wav(raw, 8000, width)))
    assert rate == 8000
    assert np.allclose(samples, wanted, atol=1e-6)


def test_channels_are_averaged() -> None:
    both = np.array([[1000, 3000], [-400, 0]], "<i2")
    samples, _ = open_sound(pack_sound(wav(both, channels=2)))
    assert np.allclose(samples * 32768, [2000, -200])


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_at_another_rate(rate: int) -> None:
    times = np.arange(rate) / rate
    made = resample(np.sin(2 * np.pi * 440 * times).astype(np.float32), rate, 16_000)
    assert np.abs(made - np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).max() < 1e-4


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (wav(np.zeros(31_000, "<i2"), 1000), "must be at most 30 seconds, got 31.0"),
        (wav(np.zeros(0, "<i2")), "must not be empty"),
        (wav(np.zeros(100, "<i2"), 300), "must have 1,000 to 192,000 samples a second, got 300"),
        (wav(np.zeros(9, np.uint8), width=3), "must hold 8, 16 or 32 bits a sample, got 24"),
        (b"RIFF", "must be a WAV"),
        (b"", "must be a WAV"),
        (bytes(1_000_001), "must be at most 1,000,000 bytes"),
    ],
)
def test_what_is_no_sound_is_refused_with_the_rule(data: bytes, rule: str) -> None:
    with pytest.raises(SoundError, match=rule):
        pack_sound(data)


def test_a_flac_is_read_and_a_long_one_is_never_unpacked_whole() -> None:
    soundfile = pytest.importorskip("soundfile", reason="FLAC needs soundfile, which is not installed")
    file = io.BytesIO()
    wanted = np.linspace(-0.5, 0.5, 999, dtype=np.float32)
    soundfile.write(file, wanted, 22_050, format="FLAC", subtype="PCM_24")
    samples, rate = open_sound(pack_sound(file.getvalue()))
    assert rate == 22_050
    assert np.abs(samples - wanted).max() < 1e-6
    file = io.BytesIO()
    soundfile.write(file, np.zeros(3600 * 1000, np.int16), 1000, format="FLAC")
    assert len(file.getvalue()) < 1_000_000
    with pytest.raises(SoundError, match="must be at most 30 seconds, got 3600"):
        pack_sound(file.getvalue())
    with pytest.raises(SoundError, match="must be a FLAC file"):
        pack_sound(b"fLaC" + bytes(99))


def test_a_flac_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(SoundError, match="needs the package soundfile"):
        pack_sound(b"fLaC" + bytes(99))


def test_every_sample_sound_has_a_transcript() -> None:
    assert sound_samples().keys() == sounds.TRANSCRIPTS.keys()
    samples, rate = open_sound("dashwood")
    assert (rate, round(len(samples) / rate, 2)) == (16_000, 7.1)
    peaks = envelope(samples, 100)
    assert len(peaks) == 100
    assert max(peaks) == pytest.approx(float(np.abs(samples).max()), abs=1e-4)


def test_the_samples_are_small_and_their_licences_are_told() -> None:
    told = (pictures.SAMPLES_FOLDER / "README.md").read_text(encoding="utf-8")
    for path in pictures.SAMPLES_FOLDER.iterdir():
        assert path.stat().st_size < 300_000
        assert path.name == "README.md" or path.name in told or path.name.startswith("digit-")
