"""What can go wrong with the store, in words a person can act on."""

import contextlib
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError


class StoreError(RuntimeError):
    """The store cannot do what was asked; the text says what to do."""


class StoreURLError(ValueError):
    """The database URL cannot be used."""


class StoreOutdated(StoreError):
    """The database has no tables yet, or those of an older attnlab."""

    def __init__(self, label: str, found: str | None, expected: str) -> None:
        state = (
            "has no attnlab tables yet"
            if found is None
            else f"is at revision {found}, this program needs {expected}"
        )
        super().__init__(f"the database {label} {state}; run `attnlab migrate`")

    @staticmethod
    def or_newer(label: str, found: str | None, expected: str) -> "StoreError":
        """The error that fits: revisions are numbers that grow."""
        if found is not None and not (found.isdigit() and int(found) < int(expected)):
            return StoreNewer(label, found, expected)
        return StoreOutdated(label, found, expected)


class StoreNewer(StoreError):
    """The database was migrated by a newer attnlab."""

    def __init__(self, label: str, found: str, expected: str) -> None:
        super().__init__(
            f"the database {label} is at revision {found}, newer than this program ({expected}); "
            "run the newer attnlab (`pip install --upgrade attnlab`), "
            "or open another database (ATTNLAB_DATABASE_URL)"
        )


class StoreFull(StoreError):
    """The disk or the database's quota is full; the transaction was rolled back whole."""


class StoreBusy(StoreError):
    """Another process held the database for longer than the store waits."""


class StoreUnreachable(StoreError):
    """The database cannot be opened or the connection broke."""


class LostLease(StoreError):
    """The run is no longer this attempt's: it was reaped, finished or claimed anew. Stop working on it."""


@contextlib.contextmanager
def translated(label: str) -> Iterator[None]:
    """Turns the driver's errors that a person can act on into `StoreError`s; others pass unchanged."""
    try:
        yield
    except DBAPIError as error:
        found = _meaning(error, label)
        if found is None:
            raise
        raise found from error


def _meaning(error: DBAPIError, label: str) -> StoreError | None:
    code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", "") or ""
    if code in ("53100", "SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"):
        return StoreFull(
            f"the disk of the database {label} is full; nothing of this step was stored. Free some space"
        )
    if code in ("55P03", "40P01") or code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreBusy(f"the database {label} is held by another process; try again")
    if code.startswith(("08", "57P")) or code in ("SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return StoreUnreachable(f"the database {label} cannot be used: {_first_line(error)}")
    if not code and type(error.orig).__name__ == "OperationalError":  # psycopg without a server has no code
        return StoreUnreachable(f"the database {label} cannot be reached: {_first_line(error)}")
    return None


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
