"""Rotary frequencies for contexts longer than the trained one: every scaling that transformers knows.

Linear: Chen et al., https://arxiv.org/abs/2306.15595. Dynamic NTK: bloc97, 2023. YaRN: Peng et al.,
https://arxiv.org/abs/2309.00071. LongRoPE: Ding et al., https://arxiv.org/abs/2402.13753. llama3: Llama team,
https://arxiv.org/abs/2407.21783. Computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Frequencies = tuple[Tensor, float]

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
}


def rope_frequencies(
    dim: int, *, base: float = 10000.0, scaling: Mapping[str, Any] | None = None, length: int | None = None
) -> Frequencies:
    """Angle of one position step for each rotated pair, float64 ``[dim // 2]``, and the factor of cosine and sine.

    Args:
        dim: rotated dimensions, even ("proportional": those of the whole head).
        scaling: transformers' ``rope_parameters`` of one kind of layer; its "rope_type" is one of ``NEEDED``. Where
            transformers takes the trained length from the config, it is "original_max_position_embeddings" here.
        length: tokens of this sequence so far, which "dynamic" and "longrope" go by.

    Raises:
        ValueError: an odd dim, an unknown type, or a missing number.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim of a rotary embedding must be even and positive; got {dim}")
    given = dict(scaling or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in NEEDED:
        raise ValueError(f"rope_type must be one of {', '.join(NEEDED)}; got {kind!r}")
    missing = [name for name in NEEDED[kind] if given.get(name) is None]
    if missing:
        raise ValueError(f"scaling of rope_type {kind!r} needs {', '.join(missing)}; got {given}")
    return _SCALINGS[kind](dim, base, given, length)


def latent_scale_factor(scaling: Mapping[str, Any] | None) -> float:
    """What YaRN multiplies the scores of latent attention with: ``mscale ** 2`` (DeepSeek)."""
    given = scaling or {}
    return _temperature(given["factor"], given["mscale_all_dim"]) ** 2 if given.get("mscale_all_dim") else 1.0


def _plain(dim: int, base: float) -> Tensor:
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _default(dim: int, base: float, given: Mapping[str, Any], length: int | None) -> Frequencies:
    return _plain(dim, base), 1.0


def _linear(dim: int, base: float, given: Mapping[str, Any], length: int | None) -> Frequencies:
    return _plain(dim, base) / given["factor"], 1.0


def _proportional(dim: int, base: float, given: Mapping[str, Any], length: int | None) -> Frequencies:
    """The first pairs turn as in a whole head, the others not at all."""
    turning = int(given.get("partial_rotary_factor", 1.0) * dim // 2)
    frequencies = _plain(dim, base) / given.get("factor", 1.0)
    frequencies[turning:] = 0
    return frequencies, 1.0


def _dynamic(dim: int, base: float, given: Mapping[str, Any], length: int | None) -> Frequencies:
    trained, factor = given["original_max_position_embeddings"], given["factor"]
    reach = max(length or trained, trained)
    return _plain(dim, base * (factor * reach / trained - (factor - 1)) ** (dim / (dim - 2))), 1.0


def _yarn(dim: int, base: float, given: Mapping[str, Any], length: int | None) -> Frequencies:
    trained, factor = given["original_max_position_embeddings"], given["factor"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(given.get("beta_fast") or 32)
    high = pair_that_turns(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    frequencies = _plain(dim, base)
    factor_of_tables = given.get("attention_factor")
    if factor_of_tables is None:
        mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        factor_of_tables = _temperature(factor, 1.0)
        if mscale and all_dim:
            factor_of_tables = _temperature(factor, mscale) / _temperature(factor, all_dim)
    return frequencies * (interpolated / factor + 1 - interpolated), factor_of_tables


def _longrope(dim: int, base: float, given: Mapping[str, Any], length: int | None) -> Frequencies:
    trained = given["original_max_position_embeddings"]
    factors = given["long_factor"] if length and length > trained else given["short_factor"]
    if len(factors) != dim // 2:
        raise ValueError(
            f"short_factor and long_factor must have {dim // 2} numbers, one a pair; got {len(factors)}"
        )
    factor_of_tables = given.get("attention_factor")
    if factor_of_tables is None:
        if given.get("factor") is None:
            raise ValueError("scaling of rope_type 'longrope' needs factor or attention_factor; got neither")
        longer = given["factor"]
        factor_of_tables = 1.0 if longer <= 1 else math.sqrt(1 + math.log(longer) / math.log(trained))
    return _plain(dim, base) / torch.tensor(factors, dtype=torch.float64), factor_of_tables


def _llama3(dim: int, base: float, given: Mapping[str, Any], length: int | None) -> Frequencies:
    frequencies = _plain(dim, base)
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / given["factor"]), 1.0


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_SCALINGS: dict[str, Callable[[int, float, Mapping[str, Any], int | None], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
