"""From a claim and the runs of its preset to a verdict. Pure: no store, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from attnlab.presets.claim import Claim, Which
from attnlab.views.labels import OUTCOME_WORDS, format_bytes

Kind = Literal["holds", "does_not_hold", "not_measurable", "not_run"]
Document = Mapping[str, Any]

KIND_WORDS: dict[Kind, str] = {
    "holds": "holds",
    "does_not_hold": "does not hold here",
    "not_measurable": "not measurable on this device",
    "not_run": "not run yet",
}
TOLERANCE = 0.1
"""a quoted number is rounded: closer than this is the same number"""
SCATTER = 2.0
"""an interval wider than this, high over low, can neither confirm nor refute"""


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, why, the number measured (with an interval for times) and the runs it is from."""

    claim: str
    kind: Kind
    reason: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    runs: tuple[int, ...] = ()
    device: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"runs": list(self.runs), "verdict": KIND_WORDS[self.kind]}


class Measured(NamedTuple):
    value: float
    low: float
    high: float


def judge(claim: Claim, documents: Sequence[Document]) -> Verdict:
    """The verdict from run documents (``describe.run_document``), the newest experiment that has the runs first."""
    if claim.open:
        return Verdict(claim.id, "not_measurable", claim.open)
    if not claim.is_ratio:
        return _judge_length(claim, documents)
    found = _find_pair(claim, documents)
    if found is None:
        return Verdict(claim.id, "not_run", "no run of this preset shows it yet")
    run, base = found
    runs = tuple(sorted({run["id"], base["id"]}))
    device = device_of(run)
    for document in (run, base):
        if document["state"] != "succeeded":
            word = OUTCOME_WORDS.get(document["state"], document["state"])
            why = f": {document['reason']}" if document.get("reason") else ""
            reason = f"run {document['id']} ({document['mechanism']}) ended {word}{why}"
            return Verdict(claim.id, "not_measurable", reason, runs=runs, device=device)
    ratio = _ratio(claim, run, base)
    if ratio is None:
        reason = f"runs {', '.join(map(str, runs))} did not record {claim.quantity.replace('_', ' ')}"
        return Verdict(claim.id, "not_measurable", reason, runs=runs, device=device)
    kind, reason = _weigh(claim, ratio, device)
    return Verdict(claim.id, kind, reason, ratio.value, ratio.low, ratio.high, runs, device)


def device_of(document: Document) -> str:
    """The name of the GPU that a run used, or of the CPU."""
    environment = document.get("environment") or {}
    gpus = environment.get("gpus") or []
    if str(environment.get("device", "")).startswith("cuda") and gpus:
        return str(gpus[0].get("name") or "a GPU")
    return str((environment.get("cpu") or {}).get("model") or "a CPU")


def _weigh(claim: Claim, ratio: Measured, device: str) -> tuple[Kind, str]:
    words = _ratio_words(claim, ratio)
    if claim.device and claim.device not in device:
        return "not_measurable", f"said of {_article(claim.device)}; on {device} it is {words}"
    if ratio.high > SCATTER * max(ratio.low, 1e-9):
        return "not_measurable", f"the times scatter too much to say: {words} on {device}"
    if ratio.high >= claim.low * (1 - TOLERANCE) and ratio.low <= claim.high * (1 + TOLERANCE):
        return "holds", f"{words} on {device}"
    side = "more" if ratio.value > claim.high else "less"
    note = f". {claim.note}" if claim.note else ""
    return "does_not_hold", f"{words} on {device}, {side} than claimed{note}"


def _ratio_words(claim: Claim, ratio: Measured) -> str:
    if claim.quantity == "tokens_per_second":
        return f"{ratio.value:.2f} times the tokens a second ({ratio.low:.2f} to {ratio.high:.2f})"
    if claim.quantity != "latency_ms":
        return f"{ratio.value:.1%} of the baseline's bytes"
    if claim.across_lengths:
        return f"{ratio.value:.2f} times the tokens a second of the shorter ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"


def _ratio(claim: Claim, run: Document, base: Document) -> Measured | None:
    if claim.quantity == "latency_ms":
        mine, theirs = run.get("latency_ms"), base.get("latency_ms")
        if not mine or not theirs:
            return None
        more = _tokens(run) / _tokens(base)
        low, high = theirs["p10"] / mine["p90"], theirs["p90"] / mine["p10"]
        return Measured(more * theirs["median"] / mine["median"], more * low, more * high)
    if claim.quantity == "tokens_per_second":
        mine, theirs = _written(run), _written(base)
        if not mine or not theirs:
            return None
        value = mine["value"] / theirs["value"]
        return Measured(value, mine["p10"] / theirs["p90"], mine["p90"] / theirs["p10"])
    mine, theirs = run.get(claim.quantity), base.get(claim.quantity)
    if mine is None or not theirs:
        return None
    return Measured(*[mine / theirs] * 3)


def _tokens(document: Document) -> int:
    return document["sequence_length"] * document["batch_size"]


def _written(document: Document) -> Mapping[str, float] | None:
    """Tokens a second of a served run, with the interval of its passes."""
    return (document.get("serving") or {}).get("output_tokens_per_second")


def _find_pair(claim: Claim, documents: Sequence[Document]) -> tuple[Document, Document] | None:
    """The run and its baseline from the newest experiment that has both, finished."""
    if claim.against is None:
        return None
    shared = ("batch_size",) if claim.across_lengths else ("sequence_length", "batch_size")
    for experiment in sorted({document["experiment"] for document in documents}, reverse=True):
        inside = [document for document in documents if document["experiment"] == experiment]
        runs, bases = matching(claim.which, inside), matching(claim.against, inside)
        for run in runs:
            for base in bases:
                same = all(run[key] == base[key] for key in shared)
                if same and _ended(run) and _ended(base):
                    return run, base
    return None


def matching(which: Which, documents: Iterable[Document]) -> list[Document]:
    """The runs of one experiment that are meant, in the order of their ids."""
    same = [
        document
        for document in documents
        if document["mechanism"] == which.mechanism
        and all((document.get("parameters") or {}).get(k) == v for k, v in which.parameters.items())
        and which.implementation in (None, document["implementation"])
    ]
    same = _ranked(same, "sequence_length", which.length)
    return sorted(_ranked(same, "batch_size", which.batch), key=lambda document: document["id"])


def _ranked(documents: list[Document], key: str, rank: int | None) -> list[Document]:
    values = sorted({document[key] for document in documents})
    if rank is None or not values or not -len(values) <= rank < len(values):
        return documents if rank is None else []
    return [document for document in documents if document[key] == values[rank]]


def _ended(document: Document) -> bool:
    return document["state"] not in ("queued", "running", "cancelled")


def _judge_length(claim: Claim, documents: Sequence[Document]) -> Verdict:
    """Whether a run of so many tokens, or more, succeeds or runs out of memory."""
    ended = [document for document in matching(claim.which, documents) if _ended(document)]
    if not ended:
        return Verdict(claim.id, "not_run", "no run of this preset shows it yet")
    reached = [run for run in ended if run["state"] == "succeeded" and run["sequence_length"] >= claim.low]
    out = [run for run in ended if run["state"] == "out_of_memory" and run["sequence_length"] <= claim.high]
    if not reached and not out:
        longest = max(run["sequence_length"] for run in ended)
        reason = f"the longest run here has {longest:,} tokens, {claim.low:,.0f} are needed to say"
        return Verdict(claim.id, "not_measurable", reason, runs=tuple(run["id"] for run in ended))
    run = max(reached, key=lambda run: run["sequence_length"]) if reached else out[0]
    device, runs = device_of(run), (run["id"],)
    if claim.device and claim.device not in device:
        reason = f"said of {_article(claim.device)}; run {run['id']} was on {device}"
        return Verdict(claim.id, "not_measurable", reason, runs=runs, device=device)
    held = bool(out) if claim.quantity == "runs_out" else bool(reached)
    peak = run.get("attention_peak_memory_bytes") or run.get("peak_memory_bytes")
    took = f" with {format_bytes(peak)} at its peak" if peak else ""
    how = f"{run['sequence_length']:,} tokens {'ran' if reached else 'ran out of memory'}{took} on {device}"
    note = f". {claim.note}" if claim.note and not held else ""
    kind: Kind = "holds" if held else "does_not_hold"
    return Verdict(claim.id, kind, how + note, float(run["sequence_length"]), runs=runs, device=device)


def _article(device: str) -> str:
    return f"an {device}" if device[0] in "AHI" else f"a {device}"
