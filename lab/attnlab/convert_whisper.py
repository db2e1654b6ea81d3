"""Whisper from CTranslate2's format to transformers' (the wheel of whisper-tiny-en holds the former).

The format (CTranslate2, python/ctranslate2/specs/model_spec.py, version 6) is little-endian: a header, then each
variable as name, rank, shape, type, size and bytes, then names that stand for another variable.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .bundled import BundledModel

TYPES = ("float32", "int8", "int16", "int32", "float16")
BEGIN, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Return every variable of a CTranslate2 model by name.

    Raises:
        ValueError: the file is of another version or holds an unknown type.
    """
    with path.open("rb") as file:
        version = _number(file, "<I")
        if version != 6:
            raise ValueError(f"{path.name}: must be CTranslate2 format 6, got {version}")
        kind, _revision = _string(file), _number(file, "<I")
        if kind != "WhisperSpec":
            raise ValueError(f"{path.name}: must hold a WhisperSpec, got {kind}")
        return dict(_variable(file) for _ in range(_number(file, "<I")))


def _variable(file: BinaryIO) -> tuple[str, np.ndarray]:
    name = _string(file)
    shape = tuple(_number(file, "<I") for _ in range(_number(file, "<B")))
    kind, size = _number(file, "<B"), _number(file, "<I")
    if kind >= len(TYPES):
        raise ValueError(f"{name}: must be of type 0 to {len(TYPES) - 1}, got {kind}")
    return name, np.frombuffer(file.read(size), TYPES[kind]).reshape(shape)


def _number(file: BinaryIO, form: str) -> int:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "<H"))[:-1].decode()


def convert_whisper(model: BundledModel, source: Path, target: Path) -> None:
    """Write config, weights, tokenizer, feature extractor and generation settings into target."""
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    variables = read_variables(source / "model.bin")
    said = json.loads((source / "config.json").read_text(encoding="utf-8"))
    ids = _special_ids(source / "tokenizer.json")
    config = WhisperConfig(
        **_shape(variables),
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[BEGIN],
    )
    network = WhisperForConditionalGeneration(config)
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in _state(variables).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    network.load_state_dict(state, strict=True)
    settings = {
        "alignment_heads": said["alignment_heads"],
        "suppress_tokens": said["suppress_ids"],
        "begin_suppress_tokens": said["suppress_ids_begin"],
        "no_timestamps_token_id": ids[NO_TIMESTAMPS],
        "is_multilingual": False,
        "max_length": config.max_target_positions,
    }
    for name, value in settings.items():
        setattr(network.generation_config, name, value)
    network.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")


def _shape(variables: dict[str, np.ndarray]) -> dict[str, Any]:
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    layers = {
        side: len(
            {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")} - {"layer_norm"}
        )
        for side in ("encoder", "decoder")
    }
    feed_forward = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "encoder_layers": layers["encoder"],
        "decoder_layers": layers["decoder"],
        "encoder_attention_heads": int(variables["encoder/num_heads"]),
        "decoder_attention_heads": int(variables["decoder/num_heads"]),
        "encoder_ffn_dim": feed_forward,
        "decoder_ffn_dim": feed_forward,
        "max_source_positions": len(variables["encoder/position_encodings/encodings"]),
        "max_target_positions": len(variables["decoder/position_encodings/encodings"]),
    }


def _state(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under transformers' names; fused projections come apart."""
    state: dict[str, np.ndarray] = {}
    for name, value in variables.items():
        side, *rest = name.split("/")
        match rest:
            case ["embeddings", "weight"]:
                state[f"model.{side}.embed_tokens.weight"] = value
            case ["position_encodings", "encodings"]:
                state[f"model.{side}.embed_positions.weight"] = value
            case ["layer_norm", part]:
                state[f"model.{side}.layer_norm.{_norm(part)}"] = value
            case [("conv1" | "conv2") as layer, part]:
                state[f"model.{side}.{layer}.{part}"] = value
            case [layer, block, *inner] if layer.startswith("layer_"):
                prefix = f"model.{side}.layers.{layer.removeprefix('layer_')}"
                state |= _block(prefix, block, inner, value)
    return state


def _block(prefix: str, block: str, inner: list[str], value: np.ndarray) -> dict[str, np.ndarray]:
    layer, part = inner
    if block == "ffn":
        names = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}
        return {f"{prefix}.{names[layer]}.{_norm(part)}": value}
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}[block]
    if layer == "layer_norm":
        return {f"{prefix}.{attention}_layer_norm.{_norm(part)}": value}
    fused = {
        ("self_attn", "linear_0"): ("q_proj", "k_proj", "v_proj"),
        ("self_attn", "linear_1"): ("out_proj",),
        ("encoder_attn", "linear_0"): ("q_proj",),
        ("encoder_attn", "linear_1"): ("k_proj", "v_proj"),
        ("encoder_attn", "linear_2"): ("out_proj",),
    }[attention, layer]
    parts = dict(zip(fused, np.split(value, len(fused)), strict=True))
    if part == "bias" and "k_proj" in parts and parts.pop("k_proj").any():
        raise ValueError(f"{prefix}.{attention}: Whisper's keys have no bias, this file gives one")
    return {f"{prefix}.{attention}.{name}.{part}": own for name, own in parts.items()}


def _norm(part: str) -> str:
    return {"gamma": "weight", "beta": "bias"}.get(part, part)


def _special_ids(path: Path) -> dict[str, int]:
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
