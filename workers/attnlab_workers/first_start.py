"""What a new lab gets: the bundled models, and one experiment to look at. `python -m ...` fetches the models."""

import sys

from sqlalchemy import func, select

from attnlab.bundled import BUNDLED, FetchError, fetch, is_fetched
from attnlab.spec import parse_spec
from attnlab.starter import starter_spec
from attnlab_storage import queue
from attnlab_storage.database import Store
from attnlab_storage.tables import Experiment

STARTER_MODEL = "smollm2-135m"
LATER = ("whisper-tiny-en",)
"""models that a first start does not wait for: `attnlab models fetch` gets them"""


class NoModel(RuntimeError):
    """The starter experiment's model is not on this machine."""


def submit_starter(store: Store) -> bool:
    """Queue the starter experiment if the store never held an experiment; returns whether it did.

    Raises `NoModel` when it should, but its model could not be fetched.
    """
    with store.read() as session:
        if session.scalar(select(func.count()).select_from(Experiment)):
            return False
    if not is_fetched(STARTER_MODEL):
        raise NoModel(
            f"no first experiment: its model {STARTER_MODEL} is not here. The lab works without it; "
            f"when there is a network, run `attnlab models fetch {STARTER_MODEL}`"
        )
    spec = parse_spec(starter_spec())
    queue.submit(
        store,
        name=spec.name,
        spec=spec.to_dict(),
        spec_hash=spec.hash(),
        points=[point.to_dict() for point in spec.points()],
        created_by="first start",
    )
    return True


def fetch_models() -> int:
    """Fetch the missing models of a first start, the starter's first; returns how many could not be fetched."""
    failed = 0
    for name in sorted(BUNDLED.keys() - LATER, key=lambda name: (name != STARTER_MODEL, name)):
        try:
            fetch(name, progress=_say)
        except FetchError as error:
            failed += 1
            _say(f"warning: model {name} could not be fetched: {error}")
    return failed


def _say(text: object) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(min(fetch_models(), 1))
