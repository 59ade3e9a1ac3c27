"""Where the database is: settings to a SQLAlchemy URL."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from services.core.settings import ConfigurationError, Settings

SQLITE_FILE = "search-foundation.sqlite3"

_DRIVERS = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
}


def database_url(settings: Settings) -> URL:
    """Give the URL with its async driver.

    Raises ``ConfigurationError`` for a URL that cannot be used; the sentence never holds the password.
    """
    if settings.database_url is None:
        return URL.create("sqlite+aiosqlite", database=str(settings.data_dir / SQLITE_FILE))
    try:
        url = make_url(settings.database_url.get_secret_value())
    except ArgumentError:
        message = "SF_DATABASE_URL is not a URL like postgresql://user:password@host/name."
        raise ConfigurationError(message) from None
    if url.drivername not in _DRIVERS:
        raise ConfigurationError(
            f"SF_DATABASE_URL begins with '{url.drivername}'; it must be postgresql:// or sqlite:///."
        )
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigurationError("SF_DATABASE_URL must name a file: sqlite:///folder/file.sqlite3.")
    return url.set(drivername=_DRIVERS[url.drivername])


def sqlite_path(url: URL) -> Path:
    """Give the file of a SQLite URL made by ``database_url``."""
    assert url.database is not None
    return Path(url.database)
