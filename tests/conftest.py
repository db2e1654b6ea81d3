"""What every test has: a home of its own and a settled heap; the other fixtures stand in the files beside this one."""

import gc
import os
import sys
from pathlib import Path

import pytest

from attnlab_storage import settings

pytest_plugins = ("store_fixtures", "traced_fixtures", "page_fixtures", "model_fixtures", "worker_fixtures")

REAL_MODELS = settings.models_folder()
# packages to compare with that the lab itself must not find, see .ci/install_oracles.sh
ORACLES = Path(sys.prefix) / "oracles"


def pytest_configure(config: pytest.Config) -> None:
    """Gradio's queue uses an option that pandas 3 deprecates; it is not ours to change."""
    config.addinivalue_line("filterwarnings", "ignore:'future.no_silent_downcasting' is deprecated")


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """What is imported stays: a run collects garbage more than once, and walking all of it takes a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ATTNLAB_HOME; the converted models, which take minutes to make, stay the user's."""
    for name in [name for name in os.environ if name.startswith("ATTNLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ATTNLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ATTNLAB_MODELS", str(REAL_MODELS))
    return tmp_path / "home"


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the packages to compare with, importable in this test."""
    if not ORACLES.is_dir():
        pytest.skip("the packages of .venv/oracles are not installed; make oracles installs them")
    monkeypatch.syspath_prepend(str(ORACLES))
    return ORACLES
