"""Every environment variable has one reader, a default, and a clear error."""

import re
from pathlib import Path

import pytest

from attnlab_storage import settings

FLOORS = ("kernels", "storage", "lab", "workers", "webui")


def test_everything_lives_in_the_home(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert settings.home_folder() == home
    assert settings.database_url() == f"sqlite:///{home}/attnlab.db"
    monkeypatch.delenv("ATTNLAB_MODELS")
    assert settings.models_folder() == home / "models"
    monkeypatch.delenv("ATTNLAB_HOME")
    assert settings.home_folder() == Path.home() / ".attnlab"


def test_a_relative_home_makes_an_absolute_database(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTNLAB_HOME", "here")
    assert settings.database_url() == f"sqlite:///{Path.cwd()}/here/attnlab.db"


@pytest.mark.parametrize("value", ["0", "-3", "soon", "nan", "inf"])
def test_a_lease_must_be_a_positive_number(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", value)
    with pytest.raises(
        settings.SettingError, match=f"ATTNLAB_LEASE_SECONDS must be a positive number, got '{value}'"
    ):
        settings.lease_seconds()


def test_values_are_read_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    assert settings.lease_seconds() == 30
    assert settings.max_upload_bytes() == 64 * 2**20
    assert settings.api_token() is None
    monkeypatch.setenv("ATTNLAB_LEASE_SECONDS", "2.5")
    monkeypatch.setenv("ATTNLAB_MAX_UPLOAD_BYTES", "1000")
    monkeypatch.setenv("ATTNLAB_TOKEN", "secret")
    assert settings.lease_seconds() == 2.5
    assert settings.max_upload_bytes() == 1000
    assert settings.api_token() == "secret"


def test_no_other_module_reads_an_attnlab_variable():
    root = Path(__file__).parents[1]
    reading = re.compile(r"""environ(\.get\(|\[)["']ATTNLAB_|getenv\(["']ATTNLAB_""")
    found = [
        str(path.relative_to(root))
        for floor in FLOORS
        for path in (root / floor).rglob("*.py")
        if reading.search(path.read_text())
    ]
    assert set(found) <= {"storage/attnlab_storage/settings.py"}
