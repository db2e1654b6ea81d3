"""The Ray side of a run: a task that supervises one child and brings back how it ended.

`max_retries=0`: retries live in the database. `max_calls=0`: Ray would end a worker with a GPU after each
task, and with it the spare child; the worker never touches the GPU, so it may stay.
"""

from typing import Any

import ray

from attnlab_workers.child_process import Spare
from attnlab_workers.work import WORK

# lives as long as this Ray worker process, and dies with it
_spare = Spare()


def do_work(work: str, document: dict[str, Any]) -> dict[str, Any]:
    """Do one piece of work (`work.WORK`) on this node."""
    return WORK[work](document, _spare)


# not a decorator: Ray would send a decorated function by value, with a spare of its own each time
supervised = ray.remote(max_retries=0, max_calls=0, num_cpus=1)(do_work)
