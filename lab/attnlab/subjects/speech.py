"""A sound as a speech model reads it: a log-mel spectrogram, whose positions are named by their second."""

from typing import Any

import transformers

from ..inputs import Tokens
from ..models import LoadedModel, ModelError
from ..sounds import envelope, open_sound, resample
from ..spec import ExperimentSpec
from .given import Given, Stream, scout
from .writing import decoder_ids, write

DRAWN = 600
"""amplitudes that are kept for a drawing"""


def read_audio(loaded: LoadedModel, spec: ExperimentSpec) -> Given:
    """Return the features [1, mels, frames] with the decoder's tokens, and the times of the encoder's positions.

    Raises:
        ModelError: the model is no encoder-decoder, or the target is longer than it can write.
    """
    assert spec.input.audio is not None
    if not loaded.writes:
        raise ModelError(
            f"model: {loaded.name} is no encoder-decoder, and the lab reads speech with those only"
        )
    extractor = _extractor(loaded)
    samples, rate = open_sound(spec.input.audio)
    samples = resample(samples, rate, extractor.sampling_rate)
    features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
    arguments: dict[str, Any] = {"input_features": features.to(loaded.model.device, loaded.model.dtype)}
    written = write(loaded, arguments, spec.input.target, spec.input.max_tokens)
    arguments["decoder_input_ids"] = decoder_ids(written, loaded)
    attentions, _ = scout(loaded.model, arguments)
    positions = attentions[0].queries
    step = features.shape[-1] * extractor.hop_length / extractor.sampling_rate / positions
    times = Stream("audio (seconds)", [f"{index * step:.2f}" for index in range(positions)])
    detail: dict[str, Any] = {
        "seconds": len(samples) / extractor.sampling_rate,
        "seconds_per_position": step,
        "envelope": envelope(samples, DRAWN),
        "written_by": "the spec"
        if spec.input.target is not None
        else "greedy decoding, the model's own attention",
    }
    return Given(
        arguments,
        "text",
        "audio",
        {"text": Stream("text", list(written.strings)), "audio": times},
        attentions,
        text=_text(loaded, written),
        ids=arguments["decoder_input_ids"][0],
        detail=detail,
    )


def _extractor(loaded: LoadedModel) -> Any:
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(loaded.source, local_files_only=True)
    except (OSError, ValueError):
        return transformers.WhisperFeatureExtractor(feature_size=loaded.model.config.num_mel_bins)


def _text(loaded: LoadedModel, written: Tokens) -> str | None:
    if loaded.tokenizer is None:
        return None
    return loaded.tokenizer.decode(list(written.ids), skip_special_tokens=True).strip()
