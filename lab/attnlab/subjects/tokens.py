"""The tokens of one run: its text cut or repeated to the length of the grid point, random ones, what a model writes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..hook import cache_keyword
from ..inputs import Tokens, token_strings
from ..models import LoadedModel, ModelError
from ..spec import ExperimentSpec, RunPoint
from .needle import read_needle


def read_tokens(loaded: LoadedModel, spec: ExperimentSpec, point: RunPoint) -> Tokens:
    """Return exactly ``point.sequence_length`` tokens, or as many as the text has if that is 0.

    The last ``spec.generated`` of them are the model's own.

    Raises:
        ModelError: the text has fewer tokens than that, or more than the model's context.
    """
    if not spec.generated:
        return _given(loaded, spec, point.sequence_length or None)
    prompt = _given(loaded, spec, max(point.sequence_length - spec.generated, 0) or None)
    if loaded.context is not None and len(prompt.ids) + spec.generated > loaded.context:
        rule = f"prompt and generated tokens must be at most {loaded.context}, the context of {loaded.name}"
        raise ModelError(f"decode.steps: {rule}, got {len(prompt.ids)} and {spec.generated}")
    ids = [*prompt.ids, *write_on(loaded, prompt.ids, spec.generated)]
    return replace(prompt, ids=tuple(ids), strings=_strings(loaded, ids))


def write_on(loaded: LoadedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """Return the next ``count`` tokens by greedy decoding through the model's own attention.

    An end-of-text token is one like any other.
    """
    base: Any = loaded.model.base_model
    keyword = cache_keyword(base)
    ids: Tensor = torch.tensor([prompt], device=loaded.model.device)
    written: list[int] = []
    cache = DynamicCache()
    with torch.inference_mode():
        for _ in range(count):
            hidden = base(input_ids=ids, use_cache=True, **{keyword: cache}).last_hidden_state
            ids = loaded.logits(hidden[:, -1:])[:, -1].argmax(-1, keepdim=True)
            written.append(int(ids))
    return written


def _given(loaded: LoadedModel, spec: ExperimentSpec, wanted: int | None) -> Tokens:
    given = spec.input
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
    return Tokens(tuple(ids), _strings(loaded, ids))


def _strings(loaded: LoadedModel, ids: list[int]) -> tuple[str, ...]:
    if loaded.tokenizer is None:
        return tuple(f"<{index}>" for index in ids)
    return token_strings(loaded.tokenizer, ids)
