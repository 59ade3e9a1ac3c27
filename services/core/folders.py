"""Folders for the owner of the process alone."""

from __future__ import annotations

from pathlib import Path


def private_folder(path: Path) -> None:
    """Make a folder and those above it, each with mode 0700; what is there stays as it is.

    Raises ``OSError``.
    """
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
