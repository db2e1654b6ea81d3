"""What an attention is timed on: queries, keys and values of a real model, or random ones; and both in turn.

Random normal inputs have no outliers and nearly uniform weights. They may draw another power than those of a model, and
so run at another clock, and kernels that skip what is small skip nothing.
"""

import torch

from attnlab_storage.results import MeasurementRow

from ..spec import ExperimentSpec
from .interleaved import interleaved
from .kernel import KernelCall

CAPTURED, RANDOM = "captured", "random"


def input_class(spec: ExperimentSpec, layer: int) -> dict[str, str]:
    """Return the ``class`` of the inputs of a run's attention, and ``what`` they are in words."""
    if spec.module is not None:
        what = f"normal hidden states through random weights, seed {spec.seed}"
        return {"class": RANDOM, "what": what}
    read = "random tokens" if spec.input.synthetic else "its input"
    return {
        "class": CAPTURED,
        "what": f"queries, keys and values of {spec.model}, attention {layer}, on {read}",
    }


def inputs_ratio(call: KernelCall, spec: ExperimentSpec, device: torch.device) -> MeasurementRow | None:
    """Time an attention on what a model gives it and on normal inputs of the same shapes in turn.

    The value is the median of the pairs' ratios, captured over random; None where the inputs are random already, or
    are not those of one softmax.
    """
    if input_class(spec, call.layer)["class"] == RANDOM:
        return None
    if (random := call.on_random(spec.seed)) is None:
        return None
    return interleaved("inputs_ratio", call.run, random.run, spec.repeats, device, copies=(call, random))
