"""What the decoder of an encoder-decoder has written: a text that is given, or its own greedy decoding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from ..inputs import Tokens, token_strings
from ..models import LoadedModel, ModelError

MOST_TOKENS = 128
"""where greedy decoding ends if the model does not"""


def write(loaded: LoadedModel, source: Mapping[str, Tensor], target: str | None, most: int | None) -> Tokens:
    """Return the tokens that the decoder reads in one forward: the start, then the target, without its end.

    Args:
        source: what the encoder reads, batch 1.
        target: the text; None: the model decodes greedily, through its own attention.
        most: cut after this many tokens.

    Raises:
        ModelError: the target needs a tokenizer that is not there, or is longer than the decoder can read.
    """
    config = loaded.model.config
    limit = getattr(config, "max_target_positions", None) or loaded.context
    if target is None:
        ids = _greedy(loaded, source, min(most or MOST_TOKENS, limit or MOST_TOKENS))
    else:
        if loaded.tokenizer is None:
            raise ModelError(f"input.target: {loaded.name} has no tokenizer.json")
        plain = loaded.tokenizer.encode(target, add_special_tokens=False).ids
        ids = [*_start(loaded), *plain][:most]
    if limit is not None and len(ids) > limit:
        raise ModelError(f"input.target: must be at most {limit} tokens for {loaded.name}, got {len(ids)}")
    if loaded.tokenizer is None:
        return Tokens(tuple(ids), tuple(f"<{index}>" for index in ids))
    return Tokens(tuple(ids), token_strings(loaded.tokenizer, ids))


def decoder_ids(written: Tokens, loaded: LoadedModel) -> Tensor:
    """Return the tokens as the forward takes them, int64 [1, T]."""
    return torch.tensor([written.ids], device=loaded.model.device)


def _greedy(loaded: LoadedModel, source: Mapping[str, Tensor], most: int) -> list[int]:
    prompt = torch.tensor([_start(loaded)], device=loaded.model.device)
    if not isinstance(loaded.model, GenerationMixin):
        return prompt[0].tolist()
    # the general loop: a speech model's own adds timestamps and cuts into segments
    general: Any = GenerationMixin
    with torch.inference_mode():
        found = general.generate(
            loaded.model,
            **source,
            decoder_input_ids=prompt,
            max_length=max(most, prompt.shape[1]) + 1,
            do_sample=False,
            num_beams=1,
        )
    ids = found[0].tolist()
    ends = _ends(loaded)
    while len(ids) > prompt.shape[1] and ids[-1] in ends:
        ids.pop()
    return ids[:most]


def _start(loaded: LoadedModel) -> list[int]:
    """The start token, and what the tokenizer puts before every text after it (Whisper: no timestamps)."""
    config = loaded.model.config
    start = config.decoder_start_token_id
    if start is None:
        raise ModelError(f"model: the config of {loaded.name} names no decoder_start_token_id")
    if loaded.tokenizer is None:
        return [start]
    empty = _without_ends(loaded, loaded.tokenizer.encode("").ids)
    return [start, *(token for token in empty if token != start)]


def _without_ends(loaded: LoadedModel, ids: list[int]) -> list[int]:
    ends, kept = _ends(loaded), list(ids)
    while kept and kept[-1] in ends:
        kept.pop()
    return kept


def _ends(loaded: LoadedModel) -> set[int]:
    ends = loaded.model.config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])
