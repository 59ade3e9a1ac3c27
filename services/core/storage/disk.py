"""Room on the disk of ``SF_DATA_DIR``, a part of which is kept for what has to go on."""

from __future__ import annotations

import shutil
from pathlib import Path

from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings

_LARGEST_RESERVE = 1 << 30
_RESERVE_SHARE = 20


class Disk:
    """The file system of a folder.

    With less than ``reserve`` bytes free it is ``low``: nothing new is taken, so that what was taken before
    can be finished, cancelled and deleted. With half of that it is ``full``: files wait.
    """

    def __init__(self, folder: Path, reserve: int | None) -> None:
        self._folder = folder
        self._reserve = reserve

    @classmethod
    def of(cls, settings: Settings) -> Disk:
        """Give the disk of ``SF_DATA_DIR`` with the reserve of ``SF_DISK_RESERVE_BYTES``."""
        return cls(settings.data_dir, settings.disk_reserve_bytes)

    @property
    def tight(self) -> bool:
        """Whether what is left should go to those who hold little: twice the reserve is."""
        return self._is_below(2.0)

    @property
    def low(self) -> bool:
        """Whether nothing new should be taken."""
        return self._is_below(1.0)

    @property
    def full(self) -> bool:
        """Whether no file should be written."""
        return self._is_below(0.5)

    def require_room(self, what: str) -> None:
        """Raise ``ServiceError`` STORAGE_FULL when the disk is low; ``what`` names what is refused."""
        if self.low:
            raise ServiceError(ErrorCode.STORAGE_FULL, what=what)

    def _is_below(self, part: float) -> bool:
        folder = self._folder
        while not folder.exists():
            folder = folder.parent
        usage = shutil.disk_usage(folder)
        reserve = self._reserve
        if reserve is None:
            reserve = min(_LARGEST_RESERVE, usage.total // _RESERVE_SHARE)
        return usage.free < reserve * part
