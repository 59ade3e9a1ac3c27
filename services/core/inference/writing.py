"""From tokens to text as it may be shown: whole characters, and nothing of what ends an answer."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Writer:
    """The text of one answer. ``stopped`` says that one of ``stops`` has come; it is not part of the text."""

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        """``pieces`` are the bytes of each id."""
        self._pieces = pieces
        self._stops = tuple(stops)
        # What the bytes of a character that does not come whole become is the same in one piece and in many.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def add(self, id: int) -> str:
        """Take a token in; returns what may be shown since the last one."""
        return self._shown(self._decoder.decode(self._pieces[id]))

    def finish(self) -> str:
        """Return what was held back, at the end of an answer that no stop has ended."""
        text = self._shown(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text += self._held
            self._held = ""
        return text

    def _shown(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        kept = max((_begun(self._held, stop) for stop in self._stops), default=0)
        end = len(self._held) - kept
        shown, self._held = self._held[:end], self._held[end:]
        return shown


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
