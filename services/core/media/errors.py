"""What is told when a URL cannot be fetched."""

from __future__ import annotations

from services.core.errors import ErrorCode, ServiceError


class FetchError(ServiceError):
    """A URL given by a caller was refused or did not deliver; ``detail`` is a sentence for the caller.

    ``retryable`` says whether the same URL may well succeed later.
    """

    def __init__(self, cause: str, *, retryable: bool, url: str | None = None) -> None:
        self.cause = cause
        self.retryable = retryable
        named = "the URL" if url is None else f"'{url}'"
        super().__init__(ErrorCode.INPUT_INVALID, reason=f"Cannot fetch {named}: {cause}.")

    def of(self, url: str) -> FetchError:
        """The same, naming the URL."""
        return FetchError(self.cause, retryable=self.retryable, url=url)


class MediaError(ServiceError):
    """A picture or document of a caller that cannot be used; ``cause`` is the end of a sentence on it."""

    def __init__(self, cause: str, *, named: str = "The input") -> None:
        self.cause = cause
        super().__init__(ErrorCode.INPUT_INVALID, reason=f"{named} cannot be used: {cause}.")

    def of(self, named: str) -> MediaError:
        """The same, saying which input it is."""
        return MediaError(self.cause, named=named)
