"""What advice suggests can be run: every mechanism of every suggested experiment takes a step on a CPU."""

import pytest
import torch

from attnlab.advice.experiments import trial_spec
from attnlab.advise import ModelShape, leaves
from attnlab.spec import parse_spec
from attnlab.subjects.module import ModuleSubject


@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: leaf.key)
def test_every_suggested_run_takes_a_step(leaf):
    spec = parse_spec(trial_spec(leaf, ModelShape(), "cpu"))
    shortest = min(point.sequence_length for point in spec.points())
    for point in spec.points():
        if point.sequence_length != shortest:
            continue
        subject = ModuleSubject(spec, point, torch.device("cpu"))
        with torch.set_grad_enabled(point.phase == "train"):
            subject.check()
            with subject.ready():
                subject.prepare()
                assert subject.step().isfinite().all(), point.mechanism
