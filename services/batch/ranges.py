"""The header ``Range`` of a download."""

from __future__ import annotations

import re

from services.core.errors import ErrorCode, ServiceError

_ONE = re.compile(r"bytes=([0-9]{1,18})?-([0-9]{1,18})?")


def byte_range(header: str, length: int) -> range | None:
    """Give the bytes that are asked for of ``length``, None for all: nothing, or no single range, is named.

    Raises ``ServiceError`` RANGE_NOT_SATISFIABLE for a range that begins behind the end.
    """
    found = _ONE.fullmatch(header)
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found.groups()
    if first is None:  # the last bytes
        asked = range(max(0, length - int(last)), length)
    else:
        asked = range(int(first), length if last is None else min(int(last) + 1, length))
        if last is not None and int(last) < int(first):
            return None
    if not asked:
        raise ServiceError(
            ErrorCode.RANGE_NOT_SATISFIABLE, headers={"content-range": f"bytes */{length}"}, length=length
        )
    return asked
