"""Reading a job's input from where its URL points."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.core.media.decoding import gunzipped
from services.core.media.fetching import Fetcher, FetchError
from services.core.settings import ConfigurationError, Settings
from services.core.storage.objects import ObjectStoreError, RemoteStore, bucket

MAX_BYTES = 1 << 30
"""Of an input file, after decompressing."""


class SourceError(Exception):
    """The input cannot be read; the text tells the caller why. ``retryable``: it may be later."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class Sources:
    """Input files behind https, s3 and gs URLs."""

    def __init__(self, settings: Settings) -> None:
        self._fetcher = Fetcher(settings)
        self._buckets = settings.batch_input_buckets

    async def close(self) -> None:
        """Close connections."""
        await self._fetcher.aclose()

    async def stream(self, url: str) -> AsyncIterator[bytes]:
        """Read a file in pieces; raises ``SourceError``."""
        scheme = url.partition("://")[0]
        if scheme in ("s3", "gs"):
            self._check_bucket(url)
            pieces = gunzipped(_from_bucket(url), MAX_BYTES)
        else:
            pieces = self._fetcher.stream(url, max_bytes=MAX_BYTES)
        try:
            async for piece in pieces:
                yield piece
        except FetchError as error:
            raise SourceError(str(error), retryable=error.retryable) from error

    def _check_bucket(self, url: str) -> None:
        """Refuse what the operator did not open: it is read with the server's own credentials."""
        if not any(url.startswith(f"{opened.rstrip('/')}/") for opened in self._buckets):
            message = "The input URL is in no bucket that this server reads (SF_BATCH_INPUT_BUCKETS)."
            raise SourceError(message, retryable=False)


async def _from_bucket(url: str) -> AsyncIterator[bytes]:
    place, _, key = url.partition("://")[2].partition("/")
    if not place or not key:
        raise SourceError("The input URL names no object of a bucket.", retryable=False)
    try:
        store = RemoteStore(bucket(f"{url.partition('://')[0]}://{place}", "input_url"))
        async for piece in store.stream(key):
            yield piece
    except ConfigurationError as error:
        raise SourceError(str(error), retryable=False) from error
    except ObjectStoreError as error:
        raise SourceError(f"The input file cannot be read: {error}", retryable=False) from error
