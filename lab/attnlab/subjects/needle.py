"""A needle in a haystack: one sentence hidden in a long text, asked for at its end, and said again as the answer."""

from ..inputs import Tokens, token_strings
from ..models import LoadedModel, ModelError
from ..spec_sections import InputSpec


def read_needle(loaded: LoadedModel, given: InputSpec, length: int) -> Tokens:
    """Return exactly ``length`` tokens: haystack with the needle at its depth, the question, the needle again.

    The answer is made of the very tokens of the needle, so that a head that retrieves can copy each of them.

    Raises:
        ModelError: the model predicts no next token, has no tokenizer, or the text is too short or too long.
    """
    needle, text = given.needle, given.text
    assert needle is not None
    assert text is not None
    if not loaded.causal or loaded.tokenizer is None:
        raise ModelError(f"input.needle: needs a language model with a tokenizer; {loaded.name} is none")

    if loaded.context is not None and length > loaded.context:
        rule = f"must be at most {loaded.context}, the context of {loaded.name}"
        raise ModelError(f"vary.sequence_length: {rule}, got {length}")
    tokenizer = loaded.tokenizer

    def plain(words: str) -> list[int]:
        return list(tokenizer.encode(words, add_special_tokens=False).ids)

    hidden, question = plain(needle.sentence), plain(needle.question)
    around = length - 2 * len(hidden) - len(question)
    if around < 1:
        least = 2 * len(hidden) + len(question) + 1
        raise ModelError(f"vary.sequence_length: must be at least {least} for this needle, got {length}")
    haystack = loaded.encode(text, around, repeat=given.repeat)
    if len(haystack.ids) < around:
        rule = (
            f"must be at most {length - around + len(haystack.ids)} for this text unless input.repeat is true"
        )
        raise ModelError(f"vary.sequence_length: {rule}, got {length}")
    place = round(needle.depth * around)
    if place == 0 and haystack.ids[0] != plain(text)[:1][0]:
        place = 1  # a token that begins every text stays first
    ids = [*haystack.ids[:place], *hidden, *haystack.ids[place:], *question, *hidden]
    places = {"keys": [place, place + len(hidden)], "answer": [length - len(hidden), length]}
    return Tokens(
        tuple(ids), token_strings(loaded.tokenizer, ids), haystack.cut, places | {"depth": needle.depth}
    )
