"""A picture as a vision transformer reads it: brought to its size, cut into patches that have names."""

import base64
import inspect
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnlab_kernels.operations.softmax.api import Unsupported

from ..models import LoadedModel, ModelError
from ..pictures import open_picture
from ..spec import ExperimentSpec
from .given import Given, Stream, scout

PLAIN = {"image_mean": [0.5], "image_std": [0.5]}
"""how a picture is normalised where the model's folder does not say"""


def read_image(loaded: LoadedModel, spec: ExperimentSpec) -> Given:
    """Return the picture as pixel values [1, channels, side, side], and the names of its patches.

    Raises:
        ModelError: the model cannot read a picture of that size.
        Unsupported: its attention is not over patches.
    """
    assert spec.input.image is not None
    config = loaded.model.config
    patch, own = _side(config.patch_size, "patch_size"), _side(config.image_size, "image_size")
    side = spec.input.size or own
    if side % patch:
        raise ModelError(
            f"input.size: must be a multiple of {patch}, the patches of {loaded.name}, got {side}"
        )
    reading = _reading(Path(loaded.source))
    picture = fitted(
        open_picture(spec.input.image), side, reading, "L" if config.num_channels == 1 else "RGB"
    )
    arguments: dict[str, Any] = {
        "pixel_values": pixel_values(picture, reading).to(loaded.model.device, loaded.model.dtype)
    }
    if side != own:
        arguments |= _interpolated(loaded, own)
    attentions, answer = scout(loaded.model, arguments)
    rows = side // patch
    prefix = _prefix(config, attentions[0].queries - rows * rows)
    names = [*prefix, *(f"{row},{column}" for row in range(rows) for column in range(rows))]
    grid = {"rows": rows, "columns": rows, "prefix": len(prefix), "patch_size": patch}
    detail: dict[str, Any] = {"picture": _uri(picture), "side": side, "patches": grid}
    if (said := _answer(config, answer)) is not None:
        detail["answer"] = said
    stream = Stream("patch (row, column)", names)
    return Given(
        arguments,
        "patches",
        "patches",
        {"patches": stream},
        attentions,
        detail=detail,
        trace={"patches": grid},
    )


def fitted(picture: Image.Image, side: int, reading: dict[str, Any], mode: str) -> Image.Image:
    """Return the picture as a square: squeezed, or (where the model wants it) its middle cut out."""
    picture = picture.convert(mode)
    resample = Image.Resampling(reading.get("resample", Image.Resampling.BILINEAR))
    if "shortest_edge" in reading.get("size", {}) or reading.get("do_center_crop"):
        short = min(picture.size)
        left, top = (picture.width - short) // 2, (picture.height - short) // 2
        picture = picture.crop((left, top, left + short, top + short))
    return picture if picture.size == (side, side) else picture.resize((side, side), resample)


def pixel_values(picture: Image.Image, reading: dict[str, Any]) -> torch.Tensor:
    """Return float32 [1, channels, height, width], normalised as the model was trained."""
    values = np.asarray(picture, np.float32) / 255
    values = values[..., None] if values.ndim == 2 else values
    values = (values - np.float32(reading["image_mean"])) / np.float32(reading["image_std"])
    return torch.from_numpy(values.transpose(2, 0, 1).copy())[None]


def _side(value: Any, name: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ModelError(f"model: {name} must be square, got {value}")
    return int(sides.pop())


def _reading(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except OSError:
        return PLAIN
    return PLAIN | {key: value for key, value in said.items() if value is not None}


def _interpolated(loaded: LoadedModel, own: int) -> dict[str, bool]:
    """The keyword that stretches the model's position embeddings over another number of patches."""
    if "interpolate_pos_encoding" in inspect.signature(loaded.model.forward).parameters:
        return {"interpolate_pos_encoding": True}
    if any(hasattr(module, "interpolate_pos_encoding") for module in loaded.model.modules()):
        return {}
    raise ModelError(f"input.size: must be {own}, {loaded.name} reads no other size")


def _prefix(config: Any, count: int) -> list[str]:
    if count < 0:
        raise Unsupported(f"model: {config.model_type} attends to fewer positions than it has patches")
    if config.model_type == "deit" and count == 2:
        return ["[CLS]", "[DIST]"]
    return [] if count == 0 else ["[CLS]", *(f"[REG{index}]" for index in range(count - 1))]


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _answer(config: Any, output: Any) -> dict[str, Any] | None:
    """The class that the model would choose, and how sure it is."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 2:
        return None
    shares = logits[0].float().softmax(-1)
    best = int(shares.argmax())
    return {"label": str((config.id2label or {}).get(best, best)), "probability": float(shares[best])}
