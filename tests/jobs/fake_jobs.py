"""Jobs for the worker tests: each stands for `attnlab.run.execute` and does one thing, mostly a bad one.

The point's parameters say which: ``{"do": "sleep", "seconds": 3}``.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

from attnlab_storage import queue
from attnlab_storage.database import Store
from attnlab_storage.queue import Claim
from attnlab_storage.results import MeasurementRow, record_measurements, recording


def perform(store: Store, claim: Claim, *, device: str) -> str:
    """Do what the point's parameters ask for; the good jobs end with an outcome in the store."""
    arguments = dict(claim.point["parameters"])
    return globals()[f"do_{arguments.pop('do', 'succeed')}"](store, claim, **arguments)


def answer() -> dict[str, object]:
    """What a survey asks."""
    return {"device": "fake", "implementations": []}


def do_succeed(store: Store, claim: Claim) -> str:
    print(f"hello from attempt {claim.attempt}", flush=True)
    _record(store, claim, "latency")
    queue.finish(store, claim, "succeeded", summary={"pid": os.getpid()})
    return "succeeded"


def do_sleep(store: Store, claim: Claim, seconds: float) -> str:
    """Record first and finish last: whoever interrupts it leaves half a run."""
    _record(store, claim, "begun")
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        queue.progress(store, claim, "sleeping", time.monotonic() - started, seconds)
        time.sleep(0.1)
    return do_succeed(store, claim)


def do_sleep_once(store: Store, claim: Claim, seconds: float) -> str:
    """Sleep in the first attempt only."""
    return do_sleep(store, claim, seconds if claim.attempt == 1 else 0.0)


def do_wait_once(store: Store, claim: Claim) -> str:
    """Say who we are and wait for a murderer, in the first attempt only."""
    _record(store, claim, "begun")
    if claim.attempt == 1:
        queue.progress(store, claim, "waiting", os.getpid())
        time.sleep(60)
    return do_succeed(store, claim)


def do_signal(store: Store, claim: Claim, number: int, attempts: int = 99) -> str:
    """Die of a signal in the first attempts."""
    _record(store, claim, "begun")
    if claim.attempt <= attempts:
        os.kill(os.getpid(), number)
    return do_succeed(store, claim)


def do_exit(store: Store, claim: Claim, code: int) -> str:
    os._exit(code)


def do_raise(store: Store, claim: Claim) -> str:
    raise RuntimeError("a fake job failed")


def do_nothing(store: Store, claim: Claim) -> str:
    return "succeeded"


def do_allocate(store: Store, claim: Claim) -> str:
    """Take memory until there is none left."""
    hoard = []
    while True:
        hoard.append(bytearray(32 * 2**20))


def do_ignore_sigterm(store: Store, claim: Claim) -> str:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    queue.progress(store, claim, "ignoring")
    while True:
        time.sleep(10)


def do_hold_gil(store: Store, claim: Claim) -> str:
    """Sleep in a C call that never lets Python run."""
    queue.progress(store, claim, "holding")
    ctypes.PyDLL(None).sleep(60)
    return do_succeed(store, claim)


def do_breed(store: Store, claim: Claim) -> str:
    """Start a process and wait for it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    queue.progress(store, claim, "bred", child.pid)
    child.wait()
    return do_succeed(store, claim)


def do_linger(store: Store, claim: Claim) -> str:
    """Write the outcome and never end."""
    do_succeed(store, claim)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(10)


def do_chatter(store: Store, claim: Claim, lines: int) -> str:
    for line in range(lines):
        print(f"line {line} {'x' * 90}")
    print("a\0nul and \xff bytes\rthe last of a progress bar", flush=True)
    return do_succeed(store, claim)


def _record(store: Store, claim: Claim, name: str) -> None:
    with recording(store, claim) as session:
        record_measurements(session, claim, [MeasurementRow(name, float(claim.attempt), "ms")])
