"""Reading a job's input from where its URL points."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.core.media.decoding import gunzipped
from services.core.media.fetching import Fetcher, FetchError, shown
from services.core.requests.fields import clean_url
from services.core.settings import ConfigurationError, Settings
from services.core.storage.objects import (
    ObjectMissingError,
    ObjectStoreError,
    RemoteStore,
    bucket,
    is_key,
)

logger = logging.getLogger(__name__)


MAX_FETCHES = 256
"""Inputs fetched at a time by a process. Most of them wait, so many keys are needed to hold all places."""


class SourceError(Exception):
    """The input cannot be read; the text tells the caller why. ``retryable``: it may be later."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class Sources:
    """Input files behind https, s3 and gs URLs."""

    def __init__(self, settings: Settings) -> None:
        self._fetcher = Fetcher(settings, connections=MAX_FETCHES)
        self._buckets = tuple(f"{clean_url(opened).rstrip('/')}/" for opened in settings.batch_input_buckets)
        self._max_bytes = settings.batch_max_input_bytes

    async def close(self) -> None:
        """Close connections."""
        await self._fetcher.aclose()

    async def stream(self, url: str) -> AsyncGenerator[bytes]:
        """Read a file in pieces, gzip undone; raises ``SourceError``."""
        if url.startswith(("s3://", "gs://")):
            pieces = self._from_bucket(url)
        else:
            pieces = self._fetcher.stream(url, max_bytes=self._max_bytes)
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece
        except FetchError as error:
            raise SourceError(error.of(shown(url)).detail, retryable=error.retryable) from error

    async def _from_bucket(self, url: str) -> AsyncGenerator[bytes]:
        scheme, _, rest = url.partition("://")
        place, _, key = rest.partition("/")
        if not place or not is_key(key):
            raise SourceError("The input URL names no object of a bucket.", retryable=False)
        # It is read with the server's own credentials, so only what the operator has opened.
        if not url.startswith(self._buckets):
            message = "The input URL is in no bucket that this server reads (SF_BATCH_INPUT_BUCKETS)."
            raise SourceError(message, retryable=False)
        try:
            store = RemoteStore(bucket(f"{scheme}://{place}", "input_url"))
            async with (
                aclosing(store.stream(key)) as stored,
                aclosing(gunzipped(stored, self._max_bytes)) as pieces,
            ):
                async for piece in pieces:
                    yield piece
        except ConfigurationError as error:
            raise SourceError(str(error), retryable=False) from error
        except ObjectMissingError as error:
            raise SourceError(f"There is no object '{shown(url)}'.", retryable=False) from error
        except ObjectStoreError as error:
            logger.warning("%s cannot be read: %s", shown(url), error)
            raise SourceError(f"'{shown(url)}' cannot be read by this server.", retryable=True) from error
