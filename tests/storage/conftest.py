from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.core.settings import Settings
from services.core.storage import Database
from tests.servers import shared_postgres
from tests.storage.notes import NOTES


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An empty database of each kind."""
    url = shared_postgres().new_database() if request.param == "postgresql" else None
    return Settings(data_dir=tmp_path / "data", database_url=url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = await Database.open(settings, NOTES)
    yield database
    await database.close()
