"""Whether something very fast really computes: inputs, memory, threads and streams that a shortcut does not survive.

A figure more than 1.1 x better than the best that is known of the same operation counts as an error until it is shown
to be none (the rule of KernelBench's EVAL.md; Ouyang et al. 2025, arXiv 2502.10517).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..outcomes import CheckFailed
from .elsewhere import poison, run_elsewhere
from .kernel import KernelCall

TOO_FAST = 1.1
"""times as fast as the best known one, above which a figure needs this proof"""
SHORTER = "a token less"
ROUNDINGS = 16
"""of the largest output, beyond the plain error: scores of the large inputs are rounded at 64 times their scale"""
GRADIENT_ROUNDINGS = 64
TIMES_PLAIN, TIMES_PLAIN_GRADIENT = 2, 4
Made = tuple[Tensor, ...]
Compute = Callable[..., Made]


@dataclass(frozen=True)
class Rival:
    """What a time is set against: the time over the rival's, and what the rival is."""

    ratio: float
    words: str


@dataclass(frozen=True)
class Proof:
    """Why a time may be shown, or (not ``stands``) why it may not: nothing here could prove it."""

    stands: bool
    words: str


def is_too_fast(ratio: float) -> bool:
    """Whether a time over the best known implementation's is to be doubted."""
    return ratio * TOO_FAST < 1


def prove(call: KernelCall, rivals: Sequence[Rival], *, slack: float = 0.0) -> Proof:
    """Return why a time may stand beside the best known ones of the same operation.

    Args:
        slack: share of the largest output by which eight-bit arithmetic may be off.

    Raises:
        CheckFailed: it is more than 1.1 x as fast as one of them, and what computes it is wrong on other inputs.
    """
    doubted = [rival for rival in rivals if is_too_fast(rival.ratio)]
    if not doubted:
        return Proof(True, "not faster than 1.1 x the best known, so nothing to prove")
    best = min(doubted, key=lambda rival: rival.ratio)
    claim = f"{1 / best.ratio:.2f} x as fast as {best.words}"
    if call.too_large_to_prove:
        return Proof(False, f"unproved: {claim}, and {call.too_large_to_prove}; its speed is not shown")
    if call.exact is None:
        found, tested = caught_again(call), "its own inputs, with poisoned memory and elsewhere"
    else:
        compute, exact = (_with_gradients(one, call.backward) for one in (call.compute, call.exact))
        found = caught(compute, exact, call.operands, plain=call.plain, slack=slack)
        tested = "other inputs, poisoned memory, strides, shapes and elsewhere"
    if found:
        raise CheckFailed(f"{call.implementation} is {claim}, and wrong: {'; '.join(found)}")
    return Proof(True, f"{claim}, and proved on {tested}")


def caught(
    compute: Compute,
    reference: Compute,
    operands: Sequence[Tensor],
    *,
    plain: bool = True,
    slack: float = 0.0,
) -> list[str]:
    """Return what a computation gets wrong, in words; empty where it passes every test.

    Args:
        compute: takes operands like those given; returns the output, and its gradients where they are timed too.
        reference: the same function in any floating dtype; a good kernel stays within twice its error in the
            operands' own dtype, both against float64.
        plain: the operands are query, key and value [B, H, S, D] of a softmax; otherwise other inputs are their own
            values in another order, so that features stay positive and weights within their range.
        slack: share of the largest output that is allowed besides.
    """
    found: list[str] = []
    for name, given in _cases(operands, plain):
        before = [tensor.clone() for tensor in given]
        if name == SHORTER and not _defined(reference, before):
            continue
        run = run_elsewhere if name == "elsewhere" else _here
        poison(given)
        try:
            made = run(compute, given)
        except (ValueError, RuntimeError) as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if not all(torch.equal(now, then) for now, then in zip(given, before, strict=True)):
            found.append(f"{name}: it changed its inputs")
        exact, own = reference(*map(_wide, before)), reference(*before)
        if problem := _wrong(made, exact, own, slack):
            found.append(f"{name}: {problem}")
    return found


def caught_again(call: KernelCall) -> list[str]:
    """What is wrong of a computation that takes no operands: it has to make the output that was checked, anew."""
    found: list[str] = []

    def compute() -> Made:
        return _tensors(call.compute())

    for name, run in (("once more", _here), ("elsewhere", run_elsewhere)):
        for kept in compute():
            kept.fill_(torch.nan)  # an output that was kept is no longer the output
        poison([call.output])
        (made,) = run(compute, ())
        if problem := _difference(made, call.output):
            found.append(f"{name}: {problem}")
    return found


def _here(compute: Compute, given: Sequence[Tensor]) -> Made:
    """What is there when the call returns: nothing may be written later, and nothing computed when it is read."""
    return tuple(tensor.clone() for tensor in compute(*given))


def _tensors(made: object) -> Made:
    made = getattr(made, "output", made)
    if type(made) is not Tensor:
        raise ValueError(f"the output must be a plain tensor, got {type(made).__name__}")
    return (made,)


def _with_gradients(compute: Callable[..., object], backward: bool) -> Compute:
    """The same with its outputs in a tuple; with ``backward`` also the gradients of its mean square."""

    def forward(*operands: Tensor) -> Made:
        with torch.no_grad():
            return _tensors(compute(*operands))

    def both(*operands: Tensor) -> Made:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in operands]
        with torch.enable_grad():
            (made,) = _tensors(compute(*leaves))
            wide = made.double() if made.dtype == torch.float64 else made.float()
            gradients = torch.autograd.grad(wide.square().mean(), leaves)
        return made.detach(), *gradients

    return both if backward else forward


def _cases(operands: Sequence[Tensor], plain: bool) -> Iterator[tuple[str, list[Tensor]]]:
    made = torch.Generator(device="cpu").manual_seed(7)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        if plain:
            values = torch.randn(tensor.shape, generator=made, dtype=torch.float32)
            return values.to(tensor.device, tensor.dtype)
        order = torch.randperm(tensor.numel(), generator=made).to(tensor.device)
        return tensor.detach().flatten()[order].view(tensor.shape)

    held = [other(tensor) for tensor in operands]
    yield "other inputs", held
    for tensor in held:
        tensor.copy_(other(tensor))
    yield "other inputs at the same addresses", held
    yield "inputs that are not contiguous", [_strided(other(tensor)) for tensor in operands]
    yield "elsewhere", [other(tensor) for tensor in operands]
    if plain:
        if all(tensor.shape[2] > 1 for tensor in operands):
            yield SHORTER, [other(tensor)[:, :, :-1].contiguous() for tensor in operands]
        yield "large scores", [4 * other(tensor) for tensor in operands]


def _strided(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() > 2 else tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _defined(reference: Compute, given: Sequence[Tensor]) -> bool:
    """Whether the function has other lengths at all: a bias or documents may be of one length alone.

    Asked of zeros: the right output, once freed, could be found again by what computes nothing.
    """
    try:
        reference(*(torch.zeros_like(one) if one.is_floating_point() else one for one in given))
    except (ValueError, RuntimeError):
        return False
    return True


def _wrong(made: Made, exact: Made, own: Made, slack: float) -> str:
    for place, (output, right, plain) in enumerate(zip(made, exact, own, strict=True)):
        if output.shape != right.shape:
            return f"the output is {list(output.shape)}, not {list(right.shape)}"
        if not torch.isfinite(output).all():
            return "the output is not finite"
        largest, budget = right.abs().max(), (plain.double() - right).abs().max()
        times, roundings = (TIMES_PLAIN_GRADIENT, GRADIENT_ROUNDINGS) if place else (TIMES_PLAIN, ROUNDINGS)
        allowed = times * budget + (roundings * torch.finfo(output.dtype).eps + slack) * largest
        error = (output.double() - right).abs().max()
        if not error <= allowed:
            return f"off by {float(error):.2g}, {float(allowed):.2g} is allowed"
    return ""


def _difference(made: Tensor, checked: Tensor) -> str:
    if made.shape != checked.shape:
        return f"the output is {list(made.shape)}, not {list(checked.shape)}"
    allowed = ROUNDINGS * torch.finfo(made.dtype).eps * checked.abs().max().double()
    error = (made.double() - checked.double()).abs().max()
    return (
        ""
        if error <= allowed
        else f"off by {float(error):.2g} what was checked, {float(allowed):.2g} is allowed"
    )
