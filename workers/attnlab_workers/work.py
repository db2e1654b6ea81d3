"""The two things that are done beside a device: supervising a run, and asking what the machine can do."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

from attnlab_storage import settings
from attnlab_workers import processes
from attnlab_workers.child_process import ChildProcess, Spare
from attnlab_workers.order import order_from_dict
from attnlab_workers.supervisor import supervise

SURVEY_SECONDS = 120.0
# what is left of the free memory for everything else on the machine
MEMORY_SHARE = 0.95


def run_order(document: dict[str, Any], spare: Spare) -> dict[str, Any]:
    """Supervise one run (`Order.to_dict`); returns `Exit.to_dict`."""
    order = order_from_dict(document)
    limit = order.memory_limit or settings.run_memory_bytes()
    if limit is None and order.device == "cpu":
        limit = int(processes.memory_available() * MEMORY_SHARE)
    # as Ray has set it for this run; the spare was started before that
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if order.device == "cuda" else ""
    return supervise(dataclasses.replace(order, memory_limit=limit, visible_devices=visible), spare).to_dict()


def survey(document: dict[str, Any], spare: Spare) -> dict[str, Any]:
    """Ask a child of its own what this machine is and can do; meanwhile the first spare imports.

    Args:
        document: `ask`, the `module:function` to call, and `job`, what the spare is for.

    Raises:
        RuntimeError: the child gave no answer; the text has what it printed last.
    """
    spare.prepare(document["job"])
    child = ChildProcess(document["ask"], ask=True)
    printed = b""
    deadline = time.monotonic() + SURVEY_SECONDS
    try:
        while child.code is None and time.monotonic() < deadline:
            printed += child.wait(0.5)
        printed += child.drain()
        _, _, answer = child.answer.partition(b"\n")
        if child.code != 0 or not answer:
            text = printed.decode("utf-8", "replace").strip()[-500:]
            raise RuntimeError(f"no answer from {document['ask']} (exit status {child.code}): {text}")
        return json.loads(answer)
    finally:
        child.close()


WORK: dict[str, Callable[[dict[str, Any], Spare], dict[str, Any]]] = {"run": run_order, "survey": survey}
