"""Ids of classifiers: UUIDs of version 4 that say which model's pool can serve them."""

from __future__ import annotations

import re
import uuid
import zlib

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_OWNERS = uuid.UUID("7f1d3c52-7c43-5b5e-9a64-2f0a5d7c1e90")


def model_mark(model: str) -> str:
    """Return the first 8 digits of the ids of a model's classifiers.

    Requests with a classifier's id name no model, so a gateway with several pools needs it in the id.
    """
    return f"{zlib.crc32(model.encode()):08x}"


def new_id(model: str) -> str:
    """Make an id with 90 random bits, which is what protects a public classifier."""
    return model_mark(model) + str(uuid.uuid4())[8:]


def parse_id(text: str) -> str | None:
    """Return the id in lower case, None for what is no UUID."""
    text = text.lower()
    return text if _UUID.fullmatch(text) else None


def owner_uuid(owner: str) -> str:
    """Return a UUID for an owner's key id, which the REST contract wants."""
    return str(uuid.uuid5(_OWNERS, owner))
