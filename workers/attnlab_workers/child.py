"""The process that holds the device: `python -m attnlab_workers.child`.

It imports everything that is slow to import, says `ready`, waits for one line (an `Order`), does it, and
ends. One process runs one order: a fault on the device, a leak or a kill for memory ends with it. A spare
child has got as far as `ready` and has touched no device.

It leads a session of its own, so that one signal reaches whatever it starts, and the kernel kills it when its
supervisor ends.
"""

import argparse
import faulthandler
import gc
import importlib
import json
import os
import resource
import sys
import traceback

from attnlab_storage import settings
from attnlab_storage.database import open_store
from attnlab_storage.errors import LostLease
from attnlab_workers.order import (
    EXECUTE,
    JOB_RAISED,
    LOST_LEASE,
    OUT_OF_MEMORY,
    Order,
    order_from_dict,
    resolve,
)
from attnlab_workers.processes import die_with_parent

# what a run of a transformers model needs; importing them touches no device
HEAVY = (
    "torch",
    "attnlab.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
)


def main(arguments: list[str] | None = None) -> int:
    """Import, say `ready`, obey one order from standard input; the exit status says how it went."""
    options = _parser().parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    faulthandler.enable()
    preload(options.job)
    with os.fdopen(options.status_fd, "w", closefd=False) as status:
        print("ready", file=status, flush=True)
        if options.ask:
            print(json.dumps(resolve(options.job)()), file=status, flush=True)
            return 0
    line = sys.stdin.readline()
    if not line:  # the supervisor needs no child any more
        return 0
    return obey(order_from_dict(json.loads(line)))


def preload(job: str) -> None:
    """Import what `job` needs, so that an order finds it imported."""
    for module in HEAVY if job == EXECUTE else ():
        importlib.import_module(module)
    resolve(job)
    # what is imported stays: collections during a run need not walk it
    gc.collect()
    gc.freeze()


def obey(order: Order) -> int:
    """Do one order: the job writes its outcome to the store itself. Returns the exit status."""
    _limit(order)
    with open_store(order.database_url) as store:
        try:
            resolve(order.job)(store, order.claim, device=order.device)
        except LostLease as lost:
            print(f"stopped: {lost}", file=sys.stderr)
            return LOST_LEASE
        except MemoryError:
            traceback.print_exc()
            return OUT_OF_MEMORY
        except Exception:
            traceback.print_exc()
            return JOB_RAISED
    return 0


def _limit(order: Order) -> None:
    if order.visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = order.visible_devices
    if order.memory_limit is not None:
        # private memory, not address space: mapped files and reserved pages cost nothing
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (order.memory_limit, hard))
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        threads = settings.run_threads() or int(torch.get_num_threads() * order.machine_share)
        torch.set_num_threads(max(1, threads))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnlab_workers.child", description=__doc__)
    parser.add_argument("--job", default=EXECUTE, help="module:function that does a run")
    parser.add_argument("--ask", action="store_true", help="call the job with nothing and answer in JSON")
    parser.add_argument("--status-fd", type=int, default=1, help="where `ready` and an answer are written")
    parser.add_argument("--parent", type=int, help="process to die with")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # the work is in the store: no library's exit handler may hang or crash now
    os._exit(code)
