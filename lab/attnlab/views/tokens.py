"""Token labels a person can read: tokenizer markers made plain, control characters made visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from attnlab_storage import results
from attnlab_storage.database import Store
from attnlab_storage.results import InputRow

SPACE = "·"
NEWLINE = "⏎"
TAB = "⇥"
EMPTY = "∅"


class Axis(NamedTuple):
    """What the rows or the columns of a map are: a title ("" for tokens), readable and raw names of each."""

    title: str
    labels: list[str]
    raw: list[str]


class TokenLabels(NamedTuple):
    """The text of a run and its tokens, one label for each row (query) and column (key) of its maps."""

    text: str
    query: list[str]
    key: list[str]
    raw_query: list[str]
    raw_key: list[str]
    query_title: str = ""
    key_title: str = ""


def token_labels(store: Store, run_id: int, layer: int | None = None) -> TokenLabels:
    """Readable labels of a run's tokens; empty lists when the run recorded no input.

    Args:
        layer: the attention whose map is labelled; an encoder-decoder's attentions lie between different
            sequences. None: what the run wrote over what it read.
    """
    row = results.run_input(store, run_id)
    if row is None:
        return TokenLabels("", [], [], [], [])
    query, key = _axes_of(store, run_id, row, layer)
    return TokenLabels(row.text or "", query.labels, key.labels, query.raw, key.raw, query.title, key.title)


def stream_axes(row: InputRow) -> dict[str, Axis]:
    """The sequences that a run's attentions lie between, by name; none for a model of one text."""
    streams = (row.detail or {}).get("streams") or {}
    return {
        name: Axis(stream["title"], pretty_tokens(stream["tokens"]), list(stream["tokens"]))
        for name, stream in streams.items()
    }


def _axes_of(store: Store, run_id: int, row: InputRow, layer: int | None) -> tuple[Axis, Axis]:
    axes = stream_axes(row)
    if axes and layer is not None:
        for trace in results.traces(store, run_id):
            told = trace.detail or {}
            if trace.layer == layer and told.get("queries") in axes and told.get("keys") in axes:
                return axes[told["queries"]], axes[told["keys"]]
    raw_query, raw_key = list(row.query_tokens), list(row.key_tokens)
    query = pretty_tokens(raw_query)
    key = query if raw_key == raw_query else pretty_tokens(raw_key)
    titles = {tuple(axis.raw): axis.title for axis in axes.values()}
    return (
        Axis(titles.get(tuple(raw_query), ""), query, raw_query),
        Axis(titles.get(tuple(raw_key), ""), key, raw_key),
    )


def pretty_tokens(tokens: Sequence[str]) -> list[str]:
    """Readable labels: ``["ĠThe", "Ċ"]`` gives ``["·The", "⏎"]``.

    A list that holds a byte-level marker (Ġ, Ċ) is decoded byte by byte, so that ``Ã©`` reads ``é``; bytes
    that are no UTF-8 by themselves are shown as ``⟨E2⟩``. The result is text: escape it for HTML.
    """
    byte_level = any("Ġ" in token or "Ċ" in token for token in tokens)
    return [_visible(_from_bytes(token) if byte_level else token.replace("▁", " ")) for token in tokens]


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, bytes_to_unicode)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _from_bytes(token: str) -> str:
    alphabet = _byte_alphabet()
    if any(char not in alphabet for char in token):
        return token  # an added token such as <|im_start|> with characters outside the alphabet
    text = bytes(alphabet[char] for char in token).decode("utf-8", errors="surrogateescape")
    return "".join(f"⟨{ord(char) - 0xDC00:02X}⟩" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text)


def _visible(text: str) -> str:
    return "".join(_visible_char(char) for char in text) or EMPTY


def _visible_char(char: str) -> str:
    if char == " ":
        return SPACE
    if char == "\n":
        return NEWLINE
    if char == "\t":
        return TAB
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(char) in {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}:
        return f"⟨U+{code:04X}⟩"
    return char
