"""The SQL database: one door to SQLite and PostgreSQL, and the migrations of every room."""

from services.core.storage.database import Database
from services.core.storage.migrations import Migration, Schema

__all__ = ["Database", "Migration", "Schema"]
