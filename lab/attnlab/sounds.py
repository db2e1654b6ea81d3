"""Sounds that go into a model: bundled samples, files, data URIs; to 32-bit samples at one rate. Torch-free."""

import base64
import io
import re
import wave
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

MAX_SOUND_BYTES = 1_000_000
"""30 seconds at 16 kHz in 16 bits are 960 kB"""
MAX_SECONDS = 30.0
RATES = range(1_000, 192_001)
SAMPLES = {"dashwood": "dashwood.wav"}
TRANSCRIPTS = {
    "dashwood": "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his "
    "power to do for them."
}

_URI = re.compile(r"data:audio/[a-z0-9.+-]+;base64,(?P<data>[A-Za-z0-9+/]*={0,2})")


class SoundError(ValueError):
    """A sound that cannot be used; the text is the rule that it breaks."""


def sound_samples() -> dict[str, Path]:
    """Return the samples of this package, name to file."""
    return {name: Path(__file__).parent / "samples" / file for name, file in SAMPLES.items()}


def open_sound(source: str) -> tuple[np.ndarray, int]:
    """Return the sound that a spec names as float32 [samples] from -1 to 1 (channels averaged), and its rate in Hz.

    Args:
        source: a sample's name or a data URI of a WAV (PCM); of a FLAC where the package soundfile is installed.

    Raises:
        SoundError: it is neither, or it is damaged, too large or too long.
    """
    if source.startswith("data:"):
        return _unpacked(_bytes_of(source))
    sample = sound_samples().get(source)
    if sample is None:
        raise SoundError("must be a sample's name or a data URI of a WAV or FLAC")
    return _unpacked(sample.read_bytes())


def pack_sound(data: bytes) -> str:
    """Return the bytes of a sound file as a data URI.

    Raises:
        SoundError: they are no sound that ``open_sound`` reads.
    """
    if len(data) > MAX_SOUND_BYTES:
        raise SoundError(f"must be at most {MAX_SOUND_BYTES:,} bytes, got {len(data):,}")
    _unpacked(data)
    kind = "flac" if data.startswith(b"fLaC") else "wav"
    return f"data:audio/{kind};base64,{base64.b64encode(data).decode()}"


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return a sound at another rate: its spectrum, cut or widened with zeros, transformed back."""
    if rate == wanted:
        return samples
    count = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples.astype(np.float64))
    kept = np.zeros(count // 2 + 1, complex)
    shared = min(len(spectrum), len(kept))
    kept[:shared] = spectrum[:shared]
    return (np.fft.irfft(kept, count) * (count / len(samples))).astype(np.float32)


def envelope(samples: np.ndarray, bins: int) -> list[float]:
    """Return the largest amplitude in each of at most ``bins`` equal spans, for a drawing."""
    edges = np.linspace(0, len(samples), min(bins, len(samples)) + 1).astype(int)
    return [round(float(peak), 4) for peak in np.maximum.reduceat(np.abs(samples), edges[:-1])]


def _bytes_of(uri: str) -> bytes:
    match = _URI.fullmatch(uri)
    if match is None or len(match["data"]) % 4:
        raise SoundError("must be a data URI like data:audio/wav;base64,...")
    data = base64.b64decode(match["data"])
    if len(data) > MAX_SOUND_BYTES:
        raise SoundError(f"must be at most {MAX_SOUND_BYTES:,} bytes, got {len(data):,}")
    return data


@lru_cache(maxsize=2)
def _unpacked(data: bytes) -> tuple[np.ndarray, int]:
    try:
        samples, rate = _flac(data) if data.startswith(b"fLaC") else _wav(data)
    except (wave.Error, EOFError, ValueError) as error:
        if isinstance(error, SoundError):
            raise
        raise SoundError(f"must be a WAV (PCM) or FLAC file: {error or 'it is cut off'}") from None
    if rate not in RATES:
        raise SoundError(f"must have {RATES[0]:,} to {RATES[-1]:,} samples a second, got {rate:,}")
    if not len(samples):
        raise SoundError("must not be empty")
    _check_length(len(samples), rate)
    samples.flags.writeable = False
    return samples, rate


def _check_length(samples: int, rate: int) -> None:
    if samples > MAX_SECONDS * rate:
        raise SoundError(f"must be at most {MAX_SECONDS:.0f} seconds, got {samples / rate:.1f}")


def _wav(data: bytes) -> tuple[np.ndarray, int]:
    with wave.open(io.BytesIO(data)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        if width not in (1, 2, 4):
            raise SoundError(f"must hold 8, 16 or 32 bits a sample, got {8 * width}")
        raw = file.readframes(file.getnframes())
    if width == 1:
        samples = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    else:
        samples = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return samples[: len(samples) // channels * channels].reshape(-1, channels).mean(1), rate


def _flac(data: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SoundError("is a FLAC, which needs the package soundfile here; send a WAV") from None
    reader: Any = soundfile
    try:
        with reader.SoundFile(io.BytesIO(data)) as file:
            # silence packs a thousandfold: no more is unpacked than may be kept
            _check_length(file.frames, file.samplerate)
            most = int(MAX_SECONDS * min(file.samplerate, RATES[-1])) + 1
            return file.read(most, dtype="float32", always_2d=True).mean(1), file.samplerate
    except RuntimeError as error:
        raise SoundError(f"must be a FLAC file: {error}") from None
