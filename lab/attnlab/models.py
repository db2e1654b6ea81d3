"""Load a transformers model (bundled name, local folder or hub id): safetensors only, no foreign code."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from .bundled import BUNDLED, MARKER, is_hub_id, local_folder
from .inputs import Tokens, encode_text, open_tokenizer

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

READS = {"input_ids": "text", "pixel_values": "image", "input_features": "audio"}
"""what a model's main input means"""


class ModelError(ValueError):
    """A model that cannot be loaded, or an input it cannot read; the text says what would be right."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on a device, ready to run."""

    name: str
    model: Any
    """the transformers model, in eval mode"""
    tokenizer: Any | None
    """a tokenizers.Tokenizer, or None if the model brings none"""
    causal: bool
    """a language model: it has logits, and no token sees a later one"""
    context: int | None
    """longest input in tokens, where the config says"""
    vocabulary: int
    identity: dict[str, Any]
    """name, architecture, parameters, dtype, where the weights are from and their hash"""
    reads: str = "text"
    """``text``, ``image`` or ``audio``"""
    writes: bool = False
    """an encoder-decoder: cross-attention leads from what it writes to what it reads"""
    source: str = ""
    """the folder or hub id that its files come from"""

    def encode(self, text: str, length: int | None = None, *, repeat: bool = False) -> Tokens:
        """Return the tokens of a text, cut after ``length`` (with repeat: said again until length).

        Raises:
            ModelError: the model has no tokenizer, or the tokens do not fit its context.
        """
        if self.tokenizer is None:
            raise ModelError(f"input.text: {self.name} has no tokenizer.json; use synthetic input")
        tokens = encode_text(self.tokenizer, text, length, repeat=repeat)
        if self.context is not None and len(tokens.ids) > self.context:
            raise ModelError(
                f"input.text: must be at most {self.context} tokens, the context of {self.name}, got "
                f"{len(tokens.ids)}; cut it with input.max_tokens or vary.sequence_length"
            )
        if length is not None and repeat and len(tokens.ids) != length:
            raise ModelError(f"input.text: cannot be repeated to {length} tokens, it has none")
        return tokens

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of final hidden states, as the model computes them; or an encoder's states."""
        if not self.causal:
            return hidden
        logits = self.model.get_output_embeddings()(hidden)
        config = self.model.config.get_text_config()
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a model's weights and tokenizer.

    Args:
        name: a bundled name, a local folder or a hub id (asked only where HF_HUB_OFFLINE allows it).
        dtype: the weights are converted to it on loading.

    Raises:
        ModelError: nothing of that name is there, or it has no safetensors weights.
    """
    if name in BUNDLED and local_folder(name) is None:
        raise ModelError(f"model: {name} is not on this machine yet; run `attnlab models fetch {name}`")
    folder = local_folder(name)
    if folder is None and not is_hub_id(name):
        raise ModelError(
            f"model: {name!r} is no bundled name, hub id or local folder with a config.json; "
            f"bundled: {', '.join(BUNDLED)}"
        )
    transformers.utils.logging.disable_progress_bar()
    source = str(folder) if folder is not None else name
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": folder is not None or _offline(),
    }
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        causal = _is_causal(config)
        model = _class_for(config).from_pretrained(
            source, config=config, dtype=TORCH_DTYPES[dtype], use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(_reason(name, folder, error)) from error
    reads = READS.get(model.main_input_name)
    if reads is None:
        raise ModelError(f"model: {name} reads {model.main_input_name}, which this lab cannot give")
    model = model.to(device).eval().requires_grad_(False)
    text_config = config.get_text_config()
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=_tokenizer(source, folder, options),
        causal=causal,
        context=getattr(text_config, "max_position_embeddings", None),
        vocabulary=getattr(text_config, "vocab_size", 0),
        identity=_identity(name, folder, model, dtype),
        reads=reads,
        writes=bool(config.is_encoder_decoder),
        source=source,
    )


def shared_model(name: str, dtype: str, device: str) -> LoadedModel:
    """Return the model that was loaded last if it is this one, else load it; runs of one experiment share it.

    The last one is dropped before another is loaded, so that two never stand side by side.
    """
    key = (name, dtype, device)
    if key not in _last:
        _last.clear()
        _last[key] = load_model(name, dtype, device)
    return _last[key]


_last: dict[tuple[str, str, str], LoadedModel] = {}


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _is_causal(config: Any) -> bool:
    architectures = getattr(config, "architectures", None) or [""]
    return architectures[0].endswith(("ForCausalLM", "LMHeadModel"))


def _class_for(config: Any) -> Any:
    """The class that gives logits where the model was saved with a head for them."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if _is_causal(config):
        return transformers.AutoModelForCausalLM
    if architecture.endswith("ForImageClassification"):
        return transformers.AutoModelForImageClassification
    if config.is_encoder_decoder and architecture.endswith(("ForConditionalGeneration", "MTModel")):
        speech = hasattr(config, "num_mel_bins")
        return transformers.AutoModelForSpeechSeq2Seq if speech else transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModel


def _tokenizer(source: str, folder: Path | None, options: dict[str, Any]) -> Any | None:
    if folder is not None and (folder / "tokenizer.json").is_file():
        return open_tokenizer(folder)
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError):
        # some tokenizers answer a folder without their files with a TypeError
        return None
    fast = getattr(loaded, "backend_tokenizer", None)
    if fast is not None:
        fast.no_truncation()
        fast.no_padding()
    return fast


def _reason(name: str, folder: Path | None, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if folder is not None:
        return f"model: {name} in {folder} cannot be loaded (config.json and safetensors are needed): {first}"
    where = "HF_HUB_OFFLINE is set, so only the cache was asked" if _offline() else "the hub was asked"
    return f"model: {name!r} was not found ({where}): {first}"


def _identity(name: str, folder: Path | None, model: Any, dtype: str) -> dict[str, Any]:
    identity: dict[str, Any] = {
        "name": name,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": dtype,
    }
    if folder is None:
        return identity | {"source": "hub", "revision": getattr(model.config, "_commit_hash", None)}
    if (marker := folder / MARKER).is_file():
        made = json.loads(marker.read_text(encoding="utf-8"))
        told = (
            "package",
            "version",
            "wheel_sha256",
            "weights_sha256",
            "made_by",
            "split",
            "held_out_accuracy",
        )
        kept = {key: made[key] for key in told if key in made}
        return identity | {"source": "bundled"} | kept
    return identity | {"source": "folder", "fingerprint": _fingerprint(folder)}


def _fingerprint(folder: Path) -> str:
    """sha256 of the config and of each weight file's name, size and header (all bytes would take seconds)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(8 + int.from_bytes(file.read(8), "little"))
        digest.update(f"{path.name} {path.stat().st_size}".encode() + header)
    return digest.hexdigest()
