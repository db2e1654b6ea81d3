"""The tokens of one run: its text cut or repeated to the length of the grid point, or random ones."""

import torch

from ..inputs import Tokens, token_strings
from ..models import LoadedModel, ModelError
from ..spec import ExperimentSpec, RunPoint
from .needle import read_needle


def read_tokens(loaded: LoadedModel, spec: ExperimentSpec, point: RunPoint) -> Tokens:
    """Return exactly ``point.sequence_length`` tokens, or as many as the text has if that is 0.

    Raises:
        ModelError: the text has fewer tokens than that, or more than the model's context.
    """
    given = spec.input
    wanted = point.sequence_length or None
    if given.text is None:
        length = wanted or given.max_tokens
        if length is None:
            raise ModelError("vary.sequence_length: must be given for synthetic input")
        return _random(loaded, length, spec.seed)
    if given.needle is not None and wanted is not None:
        return read_needle(loaded, given, wanted)
    limit = wanted if wanted is not None else given.max_tokens
    tokens = loaded.encode(given.text, limit, repeat=given.repeat and wanted is not None)
    if wanted is not None and len(tokens.ids) < wanted:
        raise ModelError(
            f"vary.sequence_length: must be at most the text's {len(tokens.ids)} tokens unless input.repeat "
            f"is true, got {wanted}"
        )
    return tokens


def _random(loaded: LoadedModel, length: int, seed: int) -> Tokens:
    if loaded.context is not None and length > loaded.context:
        rule = f"must be at most {loaded.context}, the context of {loaded.name}"
        raise ModelError(f"vary.sequence_length: {rule}, got {length}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(loaded.vocabulary, (length,), generator=generator).tolist()
    if loaded.tokenizer is None:
        return Tokens(tuple(ids), tuple(f"<{index}>" for index in ids))
    return Tokens(tuple(ids), token_strings(loaded.tokenizer, ids))
