"""Tables of this room."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.schema import CreateIndex, CreateTable

from services.core.storage import Migration, Schema

_V1 = MetaData()
_JOBS = Table(
    "batch_jobs",
    _V1,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("model", String(200), nullable=False),
    Column("task", String(64)),
    Column("dimensions", Integer),
    Column("normalized", Boolean, nullable=False),
    Column("input_url", Text),
    Column("webhook_url", Text),
    Column("webhook_tries", Integer, nullable=False),
    Column("webhook_ended", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("error", Text),
    Column("base_url", Text, nullable=False),
    Column("joined", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("completed_at", Double),
    Column("expires_at", Double, nullable=False),
    Column("chunks", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("total_tokens", BigInteger, nullable=False),
)
# A part of a job's input: ``lines`` lines from number ``first`` on, ``length`` bytes at ``start``. ``faults``
# is JSON, what is known to be wrong with lines by their place; ``tries`` is JSON, how often a worker died at
# a range of lines. ``name`` tells the part files that count from those of a worker that came late.
_CHUNKS = Table(
    "batch_chunks",
    _V1,
    Column("job_id", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("first", Integer, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("faults", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("tries", Text, nullable=False),
    Column("done", Boolean, nullable=False),
    Column("name", String(40)),
    Column("output_bytes", BigInteger, nullable=False),
    Column("error_bytes", BigInteger, nullable=False),
)
_WORKERS = Table(
    "batch_workers",
    _V1,
    Column("id", String(200), primary_key=True),
    Column("seen", Double, nullable=False),
)
# Files that callers have uploaded, and those of the jobs made from them, which have a ``job_id``.
_FILES = Table(
    "batch_files",
    MetaData(),
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("job_id", String(40)),
)
_FILES_BY_OWNER = Index("batch_files_by_owner", _FILES.c.owner, _FILES.c.created_at)
# One row: what signs webhooks, the newest first, with spaces between; empty until it is first needed.
_SECRETS = Table("batch_webhook_secrets", _V1, Column("secrets", Text, nullable=False))
_BY_OWNER = Index("batch_jobs_by_owner", _JOBS.c.owner, _JOBS.c.created_at)
_BY_EXPIRY = Index("batch_jobs_by_expiry", _JOBS.c.state, _JOBS.c.expires_at)

BATCH = Schema(
    "batch",
    (
        Migration(
            1,
            "jobs",
            (
                CreateTable(_JOBS),
                CreateTable(_CHUNKS),
                CreateTable(_WORKERS),
                CreateIndex(_BY_OWNER),
                CreateIndex(_BY_EXPIRY),
            ),
        ),
        Migration(
            2,
            "webhook secrets",
            (CreateTable(_SECRETS), text("INSERT INTO batch_webhook_secrets (secrets) VALUES ('')")),
        ),
        # Which of the files that were fetched for a job is the one its chunks were cut from.
        Migration(3, "names of inputs", (text("ALTER TABLE batch_jobs ADD COLUMN input_name VARCHAR(40)"),)),
        # Of the first line of a chunk in the file, for errors. Chunks planned before count their lines alone.
        Migration(
            4,
            "places of lines",
            (
                text("ALTER TABLE batch_chunks ADD COLUMN place INTEGER NOT NULL DEFAULT 0"),
                text("UPDATE batch_chunks SET place = first + 1"),
            ),
        ),
        # What a key has stored: the input until the job has ended, the files of its chunks until it expires.
        Migration(
            5,
            "quotas",
            (
                text("ALTER TABLE batch_jobs ADD COLUMN tier VARCHAR(64) NOT NULL DEFAULT ''"),
                text("ALTER TABLE batch_jobs ADD COLUMN input_bytes BIGINT NOT NULL DEFAULT 0"),
                text("ALTER TABLE batch_jobs ADD COLUMN file_bytes BIGINT NOT NULL DEFAULT 0"),
            ),
        ),
        Migration(
            6,
            "uploaded files",
            (
                CreateTable(_FILES),
                CreateIndex(_FILES_BY_OWNER),
                text("ALTER TABLE batch_jobs ADD COLUMN form VARCHAR(16) NOT NULL DEFAULT 'own'"),
                text("ALTER TABLE batch_jobs ADD COLUMN input_file VARCHAR(64)"),
                text("ALTER TABLE batch_jobs ADD COLUMN metadata TEXT NOT NULL DEFAULT ''"),
            ),
        ),
    ),
)
