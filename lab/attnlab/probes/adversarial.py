"""Whether something very fast really computes: inputs that a shortcut does not survive.

A figure more than 1.1 x better than the best known implementation in the same run counts as an error until it is shown
to be none (the rule of KernelBench's EVAL.md; Ouyang et al. 2025, arXiv 2502.10517).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..outcomes import CheckFailed
from .kernel import KernelCall

TOO_FAST = 1.1
"""times as fast as the best known one, above which a figure needs this proof"""
SHORTER = "a token less"
Compute = Callable[..., Tensor]


def is_too_fast(ratio: float) -> bool:
    """Whether a time over the best known implementation's, of the same run, is to be doubted."""
    return ratio * TOO_FAST < 1


def prove(call: KernelCall, ratio: float) -> str:
    """Return why a time over plain attention's of the same run may stand, in words.

    Raises:
        CheckFailed: it is more than 1.1 x as fast, and what computes it does not survive other inputs.
    """
    if not is_too_fast(ratio):
        return "not faster than 1.1 x, so nothing to prove"
    if call.exact is None:
        return "faster, unproved: there is no plain reference of these operands alone"

    def compute(*operands: Tensor) -> Tensor:
        made = call.compute(*operands)
        assert isinstance(made, Tensor)
        return made

    with torch.no_grad():
        found = caught(compute, call.exact, call.operands)
    if found:
        raise CheckFailed(
            f"{call.implementation} is {1 / ratio:.2f} x as fast as plain attention, and wrong: {'; '.join(found)}"
        )
    return "faster, and proved on other inputs, poisoned memory, strides and shapes"


def caught(compute: Compute, reference: Compute, operands: Sequence[Tensor]) -> list[str]:
    """Return what a computation gets wrong, in words; empty where it passes every test.

    Args:
        compute: takes operands like those given (query, key and value, [B, H, S, D]); returns the output.
        reference: the same function in any floating dtype; a good kernel stays within twice its error in the
            operands' own dtype, both against float64.
    """
    found: list[str] = []
    for name, given in _cases(operands):
        before = [tensor.clone() for tensor in given]
        if name == SHORTER and not _defined(reference, before):
            continue
        _poison(given)
        try:
            output = compute(*given)
        except (ValueError, RuntimeError) as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if not all(torch.equal(now, then) for now, then in zip(given, before, strict=True)):
            found.append(f"{name}: it changed its inputs")
        if problem := _wrong(output, reference, before):
            found.append(f"{name}: {problem}")
    return found


def _cases(operands: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    made = torch.Generator(device="cpu").manual_seed(7)

    def other(tensor: Tensor) -> Tensor:
        values = torch.randn(tensor.shape, generator=made, dtype=torch.float32)
        return values.to(tensor.device, tensor.dtype)

    held = [other(tensor) for tensor in operands]
    yield "other inputs", held
    for tensor in held:
        tensor.copy_(other(tensor))
    yield "other inputs at the same addresses", held
    yield (
        "inputs that are not contiguous",
        [other(tensor).transpose(1, 2).contiguous().transpose(1, 2) for tensor in operands],
    )
    yield SHORTER, [other(tensor)[:, :, :-1].contiguous() for tensor in operands]
    yield "large scores", [4 * other(tensor) for tensor in operands]


def _defined(reference: Compute, given: Sequence[Tensor]) -> bool:
    """Whether the function has other lengths at all: a bias or documents may be of one length alone."""
    try:
        reference(*given)
    except (ValueError, RuntimeError):
        return False
    return True


def _poison(given: Sequence[Tensor]) -> None:
    """Leave NaN in the memory that the next output is likely to get."""
    query, value = given[0], given[-1]
    blocks = [torch.full((*query.shape[:-1], value.shape[-1]), torch.nan).to(value) for _ in range(4)]
    del blocks


def _wrong(output: Tensor, reference: Compute, given: Sequence[Tensor]) -> str:
    exact = reference(*(tensor.double() for tensor in given))
    if output.shape != exact.shape:
        return f"the output is {list(output.shape)}, not {list(exact.shape)}"
    if not torch.isfinite(output).all():
        return "the output is not finite"
    plain = (reference(*given).double() - exact).abs().max()
    rounding = 4 * torch.finfo(output.dtype).eps * exact.abs().max()
    error = (output.double() - exact).abs().max()
    if error > 2 * plain + rounding:
        return f"off by {float(error):.2g}, twice the plain error is {float(2 * plain):.2g}"
    return ""
