"""The checkpoint's tokenizer: Rust, batched, stateless, never padding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Encoding as RustEncoding
from tokenizers import Tokenizer as RustTokenizer

from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.types import TokenIds, Tokens

_HEAD_CHARACTERS_PER_TOKEN = 16
"""Of a long text, as many or twice as many are tokenised first."""

_MOST_CHARACTERS_PER_TOKEN = 64
_LEAST_READ = 1 << 15
"""Characters of any text that are read, however short its limit."""


class Tokenizer:
    """Text to ids. Holds no mutable state, so several threads may share it; the Rust side drops the GIL.

    Cutting happens here and not in Rust, where the cut length is state of the shared object.
    """

    def __init__(self, rust: RustTokenizer) -> None:
        """Wrap ``rust``, switching off the padding and truncation that its file may ask for."""
        rust.no_padding()
        rust.no_truncation()
        self._rust = rust
        probe = rust.encode("a").special_tokens_mask
        text = probe.index(0) if 0 in probe else len(probe)
        self.prefix_length = text
        self.suffix_length = probe[::-1].index(0) if 0 in probe else 0

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read ``tokenizer.json`` of a checkpoint directory. CheckpointError if missing or broken."""
        # The pool of Rust threads would take cores from the model and warns after a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory}: no tokenizer.json")
        try:
            return cls(RustTokenizer.from_file(str(path)))
        except Exception as error:
            raise CheckpointError(f"{path}: not a readable tokenizer: {error}") from error

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._rust.get_vocab_size(with_added_tokens=True)

    @property
    def special_length(self) -> int:
        """Number of special tokens around a single text."""
        return self.prefix_length + self.suffix_length

    def token_id(self, token: str) -> int | None:
        """Return the id of ``token``, None if it is not in the vocabulary."""
        return self._rust.token_to_id(token)

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ``ids`` as the vocabulary writes them; empty for an id without a token."""
        return [self._rust.id_to_token(id) or "" for id in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, specials included."""
        return self._rust.decode(list(ids), skip_special_tokens=False)

    def plain_ids(self, text: str) -> list[int]:
        """Return the ids of ``text`` without specials around it; those that it names are taken for such."""
        return self._rust.encode(text, add_special_tokens=False).ids

    def marks(self) -> dict[int, str]:
        """Return the tokens added to the vocabulary, by id: each is read as one wherever it stands."""
        return {id: token.content for id, token in self._rust.get_added_tokens_decoder().items()}

    def reading_marks_as_text(self) -> Tokenizer:
        """Return a copy that takes added tokens in a text for ordinary characters."""
        rust = RustTokenizer.from_str(self._rust.to_str())
        rust.encode_special_tokens = True
        return Tokenizer(rust)

    def pieces(self, count: int) -> list[bytes]:
        """Return the UTF-8 bytes that each of the first ``count`` ids writes; none for added specials.

        CheckpointError for a vocabulary that is not one of bytes.
        """
        if "ByteLevel" not in repr(self._rust.decoder):
            raise CheckpointError("tokenizer.json: it does not write bytes, which answers are made of")
        added = self._rust.get_added_tokens_decoder()
        letters = letters_of_bytes()
        pieces: list[bytes] = []
        for id in range(count):
            if (mark := added.get(id)) is not None:
                pieces.append(b"" if mark.special else mark.content.encode())
            else:
                token = self._rust.id_to_token(id) or ""
                pieces.append(bytes(letters[letter] for letter in token))
        return pieces

    def first_ids(self, texts: Sequence[str]) -> list[int]:
        """Return the first id of each text, without specials."""
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids[0] for encoding in encodings if encoding.ids]

    def pair_specials(self) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Return the specials before, between and behind the two texts of a pair.

        CheckpointError if nothing stands between them.
        """
        probe = self._rust.encode("a", "a")
        ids = np.asarray(probe.ids, dtype=np.int32)
        runs = [list(run) for _, run in groupby(range(len(ids)), probe.special_tokens_mask.__getitem__)]
        if len(runs) != 5:
            raise CheckpointError("tokenizer.json: it does not tell the two texts of a pair apart")
        return ids[runs[0]], ids[runs[2]], ids[runs[4]]

    def encode_batch(
        self, texts: Sequence[str], prompt: str = "", truncate_to: int | None = None
    ) -> list[Tokens]:
        """Tokenise ``prompt + text`` for each text, specials included, cut to ``truncate_to`` tokens.

        A cut keeps all specials and drops the end of the text. Of a text far longer than ``truncate_to``
        can hold only the head is read, so that its size does not decide how long the call takes: what is
        kept is the same as of the whole. At most 64 characters are read for each token of ``truncate_to``
        (and always 32,768); a longer text is cut there, however few tokens that makes.
        """
        if truncate_to is not None and truncate_to <= self.special_length:
            raise ValueError(f"truncate_to must be above the {self.special_length} special tokens")
        if truncate_to is None:
            whole = [prompt + text for text in texts] if prompt else list(texts)
            return [_uncut(encoding) for encoding in self._rust.encode_batch_fast(whole)]
        most = max(_LEAST_READ, truncate_to * _MOST_CHARACTERS_PER_TOKEN)
        read = [_beginning(text, most // 2, most) for text in texts]
        readable = [prompt + text for text in read] if prompt else read
        size = truncate_to * _HEAD_CHARACTERS_PER_TOKEN
        heads = [_beginning(text, size, 2 * size) for text in readable]
        encodings = self._rust.encode_batch_fast(heads)
        for i, encoding in enumerate(encodings):
            # Twice the limit: what the end of a head does to its last tokens does not reach the kept ones.
            if heads[i] is not readable[i] and len(encoding) < 2 * truncate_to:
                encodings[i] = self._rust.encode_batch_fast([readable[i]])[0]
        return [
            self._cut(encoding, truncate_to, whole=read[i] is texts[i])
            for i, encoding in enumerate(encodings)
        ]

    def _cut(self, encoding: RustEncoding, limit: int, *, whole: bool) -> Tokens:
        ids = np.asarray(encoding.ids, dtype=np.int32)
        length = len(ids)
        if length <= limit:
            return Tokens(ids, length, truncated=not whole)
        return Tokens(self._keep_specials(ids, limit), length, truncated=True)

    def _keep_specials(self, ids: TokenIds, limit: int) -> TokenIds:
        kept = limit - self.suffix_length
        return np.concatenate([ids[:kept], ids[len(ids) - self.suffix_length :]])


@cache
def letters_of_bytes() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (Radford et al., 2019).

    Printable letters of Latin-1 are themselves, all other bytes the letters from 256 on, in their order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _uncut(encoding: RustEncoding) -> Tokens:
    ids = np.asarray(encoding.ids, dtype=np.int32)
    return Tokens(ids, len(ids), truncated=False)


def _beginning(text: str, least: int, most: int) -> str:
    """Return a text of at most ``most`` characters itself, else its beginning.

    That ends before the last space behind ``least`` characters, if there is one.
    """
    if len(text) <= most:
        return text
    end = text.rfind(" ", least, most)
    return text[: end if end > 0 else most]
