"""What a child is told to do: one claim, where to write, and what it may use."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnlab_storage.queue import Claim

EXECUTE = "attnlab.run:execute"

# exit statuses of the child, beside 0: the job ended and has said how in the store
LOST_LEASE = 75
OUT_OF_MEMORY = 76
JOB_RAISED = 70


@dataclass(frozen=True)
class Order:
    """One run for one child."""

    claim: Claim
    database_url: str
    device: str
    """"cpu" or "cuda"."""
    job: str = EXECUTE
    """``module:function(store, claim, *, device)``."""
    machine_share: float = 1.0
    """Part of the machine's processors that the child may use."""
    memory_limit: int | None = None
    """Bytes of private memory the child may allocate; beyond it an allocation fails inside the child."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES as Ray set it for this run."""

    def to_dict(self) -> dict[str, Any]:
        """A plain document, for Ray and for the child's standard input."""
        return dataclasses.asdict(self)

    def to_line(self) -> bytes:
        """The order as one JSON line."""
        return json.dumps(self.to_dict()).encode() + b"\n"


def order_from_dict(document: dict[str, Any]) -> Order:
    """Read `Order.to_dict` back."""
    return Order(**{**document, "claim": Claim(**document["claim"])})


def resolve(name: str) -> Callable[..., Any]:
    """Import the function that `module:function` names.

    Raises `ValueError` when the text is not of that form or the module has no such function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"job must be written module:function, got {name!r}")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"job {name!r}: module {module} has no function {function!r}")
    return found
