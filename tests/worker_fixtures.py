"""What the tests of workers start: a child process in reserve."""

from collections.abc import Iterator

import pytest

from attnlab_workers.child_process import Spare


@pytest.fixture
def spare() -> Iterator[Spare]:
    """A child that waits for an order; nothing of it is left."""
    spare = Spare()
    yield spare
    spare.close()
