"""What the statistics of a head need to know of the input: which tokens are equal, where needle and answer are."""

from dataclasses import dataclass

import numpy as np

from attnlab_storage.results import InputRow


@dataclass(frozen=True, eq=False)
class TokenFacts:
    """The tokens of one self-attention.

    Attributes:
        ids: int64 [keys], equal where two tokens say the same.
        needle: half-open range of the keys that are the needle; None without one.
        answer: half-open range of the keys that are the answer to it.
    """

    ids: np.ndarray
    needle: tuple[int, int] | None = None
    answer: tuple[int, int] | None = None


def token_facts(row: InputRow, num_queries: int, num_keys: int) -> TokenFacts | None:
    """The facts for an attention of this size; None where it is not over these tokens.

    Two tokens are the same where the input shows the same string for them: vocabularies name each token once.
    The queries have to be the last of the keys (all of them, or the newest in decoding).
    """
    keys = row.key_tokens
    if len(keys) != num_keys or num_queries > num_keys or row.query_tokens != keys[num_keys - num_queries :]:
        return None
    known = {token: index for index, token in enumerate(dict.fromkeys(keys))}
    places = (row.detail or {}).get("needle") or {}
    return TokenFacts(
        np.array([known[token] for token in keys]), _span(places.get("keys")), _span(places.get("answer"))
    )


def _span(value: list[int] | None) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))
