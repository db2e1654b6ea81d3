"""From a point of the grid to the subject that a run looks at."""

import torch

from ..models import shared_model
from ..spec import ExperimentSpec, RunPoint
from . import Subject
from .forward import ForwardSubject
from .model import ModelSubject


def load_subject(spec: ExperimentSpec, point: RunPoint, device: torch.device) -> Subject:
    """Build the bare module, or load the model, of one run.

    Raises:
        Unsupported: the point asks for something that the mechanism or model has not, with the reason.
        ModelError: the model cannot be loaded.
    """
    if spec.module is not None:
        from .module import ModuleSubject

        return ModuleSubject(spec, point, device)
    loaded = shared_model(point.model, point.dtype, str(device))
    given = spec.input
    one_text = loaded.reads == "text" and not loaded.writes and given.image is None and given.audio is None
    return (ModelSubject if one_text else ForwardSubject)(loaded, spec, point)
