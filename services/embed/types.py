"""Request and result of an embedding, free of any wire format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from services.core.catalog.types import InputType
from services.core.content import Content, Usage

if TYPE_CHECKING:  # the gateway reads the request schemas and needs no numpy
    from services.embed.encoding import FloatMatrix, FloatVector


class Encoding(StrEnum):
    """How vectors are written. The values are those of the REST field ``embedding_type``."""

    FLOAT = "float"
    BASE64 = "base64"
    """Little-endian float32; raw bytes where the wire can carry them, base64 in JSON."""
    BINARY = "binary"
    UBINARY = "ubinary"
    INT8 = "int8"
    UINT8 = "uint8"
    BINARY_BASE64 = "binary_base64"
    """The bytes of the numbers in base64, as Voyage's clients ask for them; of the three below likewise."""
    UBINARY_BASE64 = "ubinary_base64"
    INT8_BASE64 = "int8_base64"
    UINT8_BASE64 = "uint8_base64"

    @property
    def numbers(self) -> Encoding:
        """The same without base64."""
        return Encoding(self.value.removesuffix("_base64"))


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """What to embed and how; already checked against what ``model`` offers.

    ``role`` is the side of a search that the contents stand on. With ``late_chunking`` all of them, which are
    texts then, are read as one. ``dimensions`` is the wanted width of a vector, ``None`` for the model's own.
    ``encodings`` has no repetitions and at least one member. ``multivector`` asks for a vector of each token,
    ``tokens`` for what the vocabulary calls them.
    """

    model: str
    contents: Sequence[Content]
    encodings: tuple[Encoding, ...] = (Encoding.FLOAT,)
    task: str | None = None
    dimensions: int | None = None
    normalized: bool = True
    truncate: bool = False
    role: InputType = InputType.DOCUMENT
    late_chunking: bool = False
    multivector: bool = False
    tokens: bool = False


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """``vectors`` is (n, dimensions) float32; ``usage`` is what was billed.

    There is one row for each content in order, of a PDF one for each page: ``counts`` says how many of each,
    ``usages`` what each row was billed.
    """

    model: str
    vectors: FloatMatrix
    encodings: tuple[Encoding, ...]
    usage: Usage
    counts: Sequence[int] = ()
    usages: Sequence[Usage] = ()


@dataclass(frozen=True, slots=True)
class MultiVectorResult:
    """``vectors`` holds for each content in order (vectors, dimensions) float32, a vector for each token.

    ``tokens`` are the names of those, None unless asked for; the rest is as of ``EmbedResult``.
    """

    model: str
    vectors: Sequence[FloatMatrix]
    encodings: tuple[Encoding, ...]
    usage: Usage
    counts: Sequence[int] = ()
    usages: Sequence[Usage] = ()
    tokens: Sequence[list[str]] | None = None


@dataclass(frozen=True, slots=True)
class SparseWeights:
    """Entries of the vocabulary and their weights, the largest first; ``weights`` is (entries,) float32.

    ``ids`` are the numbers of ``tokens`` in the vocabulary.
    """

    ids: Sequence[int]
    tokens: Sequence[str]
    weights: FloatVector


@dataclass(frozen=True, slots=True)
class SparseResult:
    """``vectors`` holds the entries of each text in order."""

    model: str
    vectors: Sequence[SparseWeights]
    usage: Usage

    @property
    def entries(self) -> int:
        """Entries of all texts together."""
        return sum(len(vector.tokens) for vector in self.vectors)


Result: TypeAlias = EmbedResult | MultiVectorResult | SparseResult
