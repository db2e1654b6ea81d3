"""Which tokens of one run are those of another: what lets two maps over different texts be compared cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from attnlab.views.errors import ViewError
from attnlab_storage.results import InputRow

MOST_COMPARED = 4096
"""tokens between a common beginning and a common end that are matched; the time grows with their square"""


class Alignment(NamedTuple):
    """Positions that belong together, in order: token ``a[i]`` of the first run is token ``b[i]`` of the second."""

    a: np.ndarray
    b: np.ndarray
    size_a: int
    size_b: int

    @property
    def identical(self) -> bool:
        return len(self.a) == self.size_a == self.size_b

    @property
    def share(self) -> float:
        """Matched tokens over all tokens of the longer one."""
        return len(self.a) / max(self.size_a, self.size_b, 1)

    def span(self, start: int, stop: int) -> tuple[int, int] | None:
        """Where tokens [start, stop) of the first run lie in the second, half-open; None where nothing of them does.

        What stands in the place of tokens that only the first has is divided in proportion, as whole tokens; what
        only the second has lies between its neighbours, and before or after everything.
        """
        corners_a = np.concatenate([[0], np.stack([self.a, self.a + 1], 1).ravel(), [self.size_a]])
        corners_b = np.concatenate([[0], np.stack([self.b, self.b + 1], 1).ravel(), [self.size_b]])
        low, high = 0, self.size_b
        if start > 0:
            low = int(
                np.floor(
                    _between(corners_a, corners_b, int(np.searchsorted(corners_a, start, "right")), start)
                )
            )
        if stop < self.size_a:
            high = int(np.ceil(_between(corners_a, corners_b, int(np.searchsorted(corners_a, stop)), stop)))
        return (low, high) if high > low else None


def _between(xs: np.ndarray, ys: np.ndarray, high: int, x: int) -> float:
    """The y of ``x`` on the line from corner ``high - 1`` to corner ``high``."""
    (x0, x1), (y0, y1) = xs[high - 1 : high + 1], ys[high - 1 : high + 1]
    return float(y0 + (x - x0) * (y1 - y0) / (x1 - x0))


def align_tokens(a: Sequence[str], b: Sequence[str]) -> Alignment:
    """Match two token lists: common beginning and end, and the longest runs between them (Ratcliff and Obershelp 1988).

    Raises ViewError where more than 4,096 tokens lie between.
    """
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    middle_a, middle_b = a[start : len(a) - end], b[start : len(b) - end]
    if max(len(middle_a), len(middle_b)) > MOST_COMPARED:
        found = f"{len(middle_a)} and {len(middle_b)}"
        raise ViewError(
            f"inputs to align may differ in at most {MOST_COMPARED} neighbouring tokens; got {found}"
        )
    pairs = [(place, place) for place in range(start)]
    for at, place, size in _matching_blocks(tuple(middle_a), tuple(middle_b)):
        pairs += [(start + at + step, start + place + step) for step in range(size)]
    pairs += [(len(a) - back, len(b) - back) for back in range(end, 0, -1)]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Alignment(table[:, 0], table[:, 1], len(a), len(b))


@lru_cache(maxsize=8)
def _matching_blocks(a: tuple[str, ...], b: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """Kept, because every step of a zoom asks for them and 4,000 tokens take a second."""
    found = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return [(block.a, block.b, block.size) for block in found]


def align_inputs(a: InputRow, b: InputRow, *, by_words: bool = False) -> tuple[Alignment, Alignment]:
    """Queries and keys of two runs, matched by their tokens. Raises ViewError as `align_tokens`.

    Args:
        by_words: by what the tokens say, see `words_of`: for two tokenizers.
    """
    match = _align_words if by_words else align_tokens
    keys = match(a.key_tokens, b.key_tokens)
    if a.query_tokens == a.key_tokens and b.query_tokens == b.key_tokens:
        return keys, keys
    return match(a.query_tokens, b.query_tokens), keys


def words_of(a: Sequence[str], b: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the tokens of two tokenizers say: without the marks of where a word begins (``Ġbank``, ``▁bank``,
    ``##ing``), and without capitals where one of them writes none (``C`` and ``c`` of a molecule stay two).
    """
    plain = [[token.removeprefix("##").strip(" Ġ▁") or token for token in tokens] for tokens in (a, b)]
    if all(any(map(_has_capitals, tokens)) for tokens in plain):
        return plain[0], plain[1]
    return [token.casefold() for token in plain[0]], [token.casefold() for token in plain[1]]


def _has_capitals(token: str) -> bool:
    named = token[:1] + token[-1:] in ("[]", "<>")  # [CLS], </s>: no text
    return token != token.lower() and not named


def _align_words(a: Sequence[str], b: Sequence[str]) -> Alignment:
    return align_tokens(*words_of(a, b))
