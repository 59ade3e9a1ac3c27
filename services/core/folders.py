"""Folders for the owner of the process alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_folder(path: Path) -> None:
    """Make a folder and those above it, each with mode 0700; what is there stays as it is.

    Raises ``OSError``.
    """
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)


def data_folder(path: Path) -> None:
    """Make the folder of all our data, or close it to others if it is there and ours.

    One that everybody may write to (as ``/tmp``), or whose group is given on to what is made in it (as a
    Kubernetes volume's), was meant to be shared. Raises ``OSError``.
    """
    private_folder(path)
    found = path.stat()
    shared = found.st_mode & (stat.S_ISVTX | stat.S_ISGID)
    if found.st_uid == os.geteuid() and not shared and found.st_mode & _OTHERS:
        path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
