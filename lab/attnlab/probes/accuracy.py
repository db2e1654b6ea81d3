"""How far the numbers are off: attention against float64, logits against the model's own attention."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage.results import MeasurementRow

from ..hook import LayerCall
from ..views.trace_map import SOFTMAX_KINDS
from .map_checks import exact_maps, mixed_values, wide
from .maps import first_element, kind_of, score_rules, trace_of
from .score_rules import ScoreRules

ROWS = 512
"""query rows that are compared, evenly spread; a reference of more would take longer than the run"""
HEADS = 3
LOGIT_ROWS = 64
ROUNDINGS = 8
"""of the largest output, which a kernel may be off beyond twice the plain error"""


def attention_errors(call: LayerCall) -> list[MeasurementRow]:
    """Compare the kernel's output and log-sum-exp with float64 on sampled heads and rows of batch element 0.

    Returns:
        attention_error and lse_error, the largest absolute difference a head. The detail of attention_error
        has the error of plain PyTorch in the same dtype on the same rows: a good kernel stays within twice
        that. A map that is no softmax has an output only: its map in float64 times V is what it is held against.
    """
    one = first_element(call)
    if kind_of(one) not in SOFTMAX_KINDS:
        return _map_errors(one)
    heads = one.query.shape[1]
    group = heads // one.key.shape[1]
    rules = score_rules(one)
    rows: list[MeasurementRow] = []
    for head in _sampled_heads(heads):
        query, key, value = (one.query[0, head], one.key[0, head // group], one.value[0, head // group])
        places, allowed = _sampled(one)
        own = rules.of_head(head)
        output, lse = _reference(
            query.double(), key.double(), value.double(), one.scale, places, allowed, own
        )
        plain, _ = _reference(query, key, value, one.scale, places, allowed, own)
        budget = (plain.double() - output).abs().max()
        error = (one.output[0, head][places].double() - output).abs().max()
        alive = torch.isfinite(lse)
        lse_error = (
            (one.lse[0, head][places].double() - lse)[alive].abs().amax() if alive.any() else torch.zeros(())
        )
        detail = {"plain_error": float(budget), "rows": len(places), "implementation": call.implementation}
        if one.output.dtype != torch.float64:  # the reference has no digits to spare there
            rounding = ROUNDINGS * torch.finfo(one.output.dtype).eps * output.abs().max()
            detail["budget"] = float(2 * budget + rounding)
        rows.append(
            MeasurementRow("attention_error", float(error), "absolute", call.layer, head, detail=detail)
        )
        rows.append(MeasurementRow("lse_error", float(lse_error), "absolute", call.layer, head))
    return rows


def over_budget(rows: Iterable[MeasurementRow]) -> str | None:
    """Return why a run's speed may not be shown: its attention is off by more than its budget; None where it is not.

    The budget is twice the error of plain PyTorch in the same dtype, both against float64, and eight roundings of the
    largest output (the rule of FlashAttention's tests). NaN is over every budget.
    """
    for row in rows:
        budget = (row.detail or {}).get("budget")
        if row.name == "attention_error" and budget is not None and not row.value <= budget:
            return (
                f"incorrect: the attention of layer {row.layer}, head {row.head} is off by {row.value:.2g}, "
                f"and {budget:.2g} is allowed (twice the error of plain PyTorch); its speed is not shown"
            )
    return None


def _map_errors(call: LayerCall) -> list[MeasurementRow]:
    attention = call.attention
    assert attention is not None
    if attention.unmapped:
        raise Unsupported(f"record: accuracy of {call.name} needs its map: {attention.unmapped}")
    plain = attention.reference(*attention.operands)[0]
    heads, count = call.query.shape[1:3]
    places = np.unique(np.linspace(0, count - 1, min(ROWS, count)).astype(np.int64))
    maps = exact_maps(call, trace_of(call))
    rows: list[MeasurementRow] = []
    for head in _sampled_heads(heads):
        exact = mixed_values(maps[head], call, head, places)
        error, budget = (np.abs(wide(part[head])[places] - exact).max() for part in (call.output[0], plain))
        detail = {
            "plain_error": float(budget),
            "rows": len(places),
            "implementation": call.implementation,
        }
        rows.append(
            MeasurementRow("attention_error", float(error), "absolute", call.layer, head, detail=detail)
        )
    return rows


def _sampled_heads(heads: int) -> list[int]:
    return sorted({round(index * (heads - 1) / (HEADS - 1)) for index in range(HEADS)})


def _sampled(call: LayerCall) -> tuple[Tensor, Tensor]:
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    places = np.unique(np.linspace(0, num_queries - 1, min(ROWS, num_queries)).astype(np.int64))
    allowed = call.mask.allowed(places, np.arange(num_keys), num_queries=num_queries, num_keys=num_keys)
    device = call.query.device
    return torch.as_tensor(places, device=device), torch.as_tensor(allowed, device=device)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    places: Tensor,
    allowed: Tensor,
    rules: ScoreRules,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention of some rows, in the dtype given; a row without keys: 0 and minus infinity."""
    scores = rules.apply(
        (query[places] @ key.T * scale)[None], places, torch.arange(len(key), device=key.device)
    )
    scores = scores[0].masked_fill(~allowed, -math.inf)
    lse = rules.with_sinks(scores.logsumexp(-1)[None])[0]
    if rules.sinks is not None:
        scores = torch.cat([scores, rules.sinks.to(scores).expand(len(places), 1)], dim=1)
    weights = torch.where(lse.isneginf()[:, None], 0, scores.softmax(-1))[:, : len(key)].to(value.dtype)
    return weights @ value, lse


@dataclass(frozen=True)
class Distance:
    """How far two sets of logits are apart."""

    absolute: float
    """largest difference"""
    relative: float
    """Frobenius norm of the difference over that of the reference"""
    largest: float
    """largest reference value"""


def compare_hidden(ours: Tensor, reference: Tensor, head: Callable[[Tensor], Tensor]) -> Distance:
    """Compare final hidden states [T, hidden] as what ``head`` makes of them, in blocks of positions."""
    absolute = largest = squares = norm = 0.0
    for start in range(0, len(ours), LOGIT_ROWS):
        block = slice(start, start + LOGIT_ROWS)
        theirs = head(reference[block]).float()
        difference = head(ours[block]).float() - theirs
        absolute = max(absolute, float(difference.abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        squares += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        norm += float(torch.linalg.vector_norm(theirs, dtype=torch.float64)) ** 2
    return Distance(absolute, math.sqrt(squares / norm) if norm else absolute, largest)


@dataclass(frozen=True)
class LogitLoss:
    """How two runs of a language model differ over the same tokens."""

    logit_error: float
    """largest absolute difference of a logit"""
    kl: float
    """mean over positions of KL(reference || ours), nats"""
    perplexity: float
    reference_perplexity: float


def compare_logits(
    ours: Tensor, reference: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor | None
) -> LogitLoss:
    """Compare final hidden states [T, hidden] as logits, in blocks of positions.

    Args:
        head: hidden states to logits.
        ids: the tokens [T], for the perplexity of each next one; None where nothing is written: then it is 1.
    """
    worst = divergence = ours_nll = reference_nll = 0.0
    for start in range(0, len(ours), LOGIT_ROWS):
        block = slice(start, start + LOGIT_ROWS)
        mine, theirs = head(ours[block]).float(), head(reference[block]).float()
        worst = max(worst, float((mine - theirs).abs().max()))
        mine, theirs = mine.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float((theirs.exp() * (theirs - mine)).sum(dtype=torch.float64))
        if ids is None:
            continue
        following = ids[start + 1 : start + 1 + LOGIT_ROWS]
        picked = following[:, None]
        ours_nll -= float(mine[: len(following)].gather(-1, picked).sum(dtype=torch.float64))
        reference_nll -= float(theirs[: len(following)].gather(-1, picked).sum(dtype=torch.float64))
    predicted = 1 if ids is None else max(len(ids) - 1, 1)
    return LogitLoss(
        worst,
        max(divergence, 0.0) / len(ours),
        math.exp(ours_nll / predicted),
        math.exp(reference_nll / predicted),
    )


def perplexity(hidden: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Return exp of the mean surprise of each next token, from final hidden states [T, hidden]."""
    surprise = 0.0
    for start in range(0, len(hidden) - 1, LOGIT_ROWS):
        following = ids[start + 1 : start + 1 + LOGIT_ROWS]
        logits = head(hidden[start : start + len(following)]).float().log_softmax(-1)
        surprise -= float(logits.gather(-1, following[:, None]).sum(dtype=torch.float64))
    return math.exp(surprise / max(len(ids) - 1, 1))
