"""Names: of jobs, of their tasks, and of their files in the object store."""

from __future__ import annotations

import re
import uuid

from services.batch.types import File

_ID = re.compile(r"batch_[0-9a-f]{32}")


def new_job_id() -> str:
    """Make an id of 122 random bits."""
    return f"batch_{uuid.uuid4().hex}"


def is_job_id(text: str) -> bool:
    """Whether a text can be the id of a job."""
    return _ID.fullmatch(text) is not None


def new_file_id() -> str:
    """Make the id of an uploaded file."""
    return f"file-{uuid.uuid4().hex}"


def job_file_id(job_id: str, file: File) -> str:
    """Give the id of a job's file beside the uploaded ones."""
    return f"file-{job_id.removeprefix('batch_')}-{file}"


def file_key(file_id: str) -> str:
    """Give the key of an uploaded file."""
    return f"files/{file_id}.jsonl"


def folder(job_id: str) -> str:
    """Give what the keys of all files of a job begin with."""
    return f"batches/{job_id}"


def input_key(job_id: str, name: str | None = None) -> str:
    """Give the key of a job's input; ``name`` is that of one attempt at fetching it from elsewhere."""
    return f"{folder(job_id)}/input.jsonl" if name is None else f"{folder(job_id)}/input-{name}.jsonl"


def part_key(job_id: str, name: str, file: File) -> str:
    """Give the key of a chunk's part of a file; ``name`` is that of one attempt at the chunk."""
    return f"{folder(job_id)}/parts/{name}.{file}.jsonl"


def joined_key(job_id: str, file: File) -> str:
    """Give the key of a whole file."""
    return f"{folder(job_id)}/{file}.jsonl"
