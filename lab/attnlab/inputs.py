"""Text to tokens, without torch: by the tokenizer.json of the model, with the strings that a map shows."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .bundled import local_folder


@dataclass(frozen=True)
class Tokens:
    """One text as the model reads it."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    """what each token says; bytes that are no character alone are written <0xE2>"""
    cut: int = 0
    """tokens of the text that were left out at the end"""
    needle: dict[str, Any] | None = None
    """where a needle and its answer stand: half-open ranges ``keys`` and ``answer``"""


def count_tokens(model: str, text: str) -> int | None:
    """Return how many tokens the model reads in the text; None where its tokenizer is not on this machine."""
    tokenizer = _tokenizer_of(model)
    return None if tokenizer is None else len(tokenizer.encode(text).ids)


def encode_text(tokenizer: Any, text: str, length: int | None = None, *, repeat: bool = False) -> Tokens:
    """Return the text's tokens, at most (with repeat: exactly) ``length`` of them.

    Special tokens that end the text, such as [SEP], stay at the end when the text is cut.

    Args:
        tokenizer: a tokenizers.Tokenizer.
        repeat: say the text again until length is reached.
    """
    encoding = tokenizer.encode(text)
    ids, special = list(encoding.ids), list(encoding.special_tokens_mask)
    head = next((index for index, mark in enumerate(special) if not mark), len(ids))
    tail = next((index for index, mark in enumerate(reversed(special)) if not mark), 0)
    start, body, end = ids[:head], ids[head : len(ids) - tail], ids[len(ids) - tail :]
    if length is None:
        length = len(ids)
    if repeat and body:
        missing = length - len(start) - len(end)
        body = (body * (missing // len(body) + 1))[: max(missing, 0)]
    cut = max(len(start) + len(body) + len(end) - length, 0)
    kept = (start + body[: max(len(body) - cut, 0)] + end)[:length]
    return Tokens(tuple(kept), token_strings(tokenizer, kept), max(len(ids) - len(kept), 0))


def token_strings(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    """Return what each token says, a leading space included."""
    byte_level = "ByteLevel" in type(tokenizer.decoder).__name__ or "ByteLevel" in str(tokenizer.decoder)
    strings = []
    for index in ids:
        raw = tokenizer.id_to_token(index)
        if raw is None:
            strings.append(f"<{index}>")
        elif byte_level:
            strings.append(_from_bytes(raw))
        else:
            strings.append(raw.replace("\u2581", " "))
    return tuple(strings)


def open_tokenizer(folder: Path) -> Any | None:
    """Return the tokenizers.Tokenizer of a model's folder (never cuts, never pads), or None."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    return _open(path, path.stat().st_mtime_ns)


def _tokenizer_of(model: str) -> Any | None:
    folder = local_folder(model)
    if folder is None:
        return None
    try:
        return open_tokenizer(folder)
    except ImportError:
        # the web process runs where only the worker has the tokenizers package
        return None


@lru_cache(maxsize=4)
def _open(path: Path, changed_at: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (Radford et al. 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = dict(zip((chr(byte) for byte in printable), printable, strict=True))
    hidden = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _from_bytes(raw: str) -> str:
    letters = _byte_of_letter()
    if not all(letter in letters for letter in raw):
        return raw
    data = bytes(letters[letter] for letter in raw)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" if byte >= 128 else chr(byte) for byte in data)
