"""The headers ``If-Match`` and ``If-None-Match`` of a download."""

from __future__ import annotations

import re

from services.core.errors import ErrorCode, ServiceError

_TAG = re.compile(r'(?:W/)?"[^"]*"')
_ANY = "*"


def unchanged(etag: str, if_match: str, if_none_match: str) -> bool:
    """Whether a caller has the file with ``etag`` already, by its headers, which are empty when not sent.

    Raises ``ServiceError`` PRECONDITION_FAILED if it wants another file than this.
    """
    # A weak tag never matches strongly, as RFC 9110 (13.1.1) has it; If-None-Match compares weakly (13.1.2).
    if if_match and if_match.strip() != _ANY and etag not in _TAG.findall(if_match):
        raise ServiceError(ErrorCode.PRECONDITION_FAILED)
    known = {tag.removeprefix("W/") for tag in _TAG.findall(if_none_match)}
    return if_none_match.strip() == _ANY or etag in known
