"""Contents in a request: a string, or an object with ``text``, ``image`` and so on, as far as they are taken.

Lists are checked by hand: the union of pydantic costs about a microsecond per item and names the branches
it tried instead of the item at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, NoReturn, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Content, Group, Media

T = TypeVar("T")
Location = tuple[str | int, ...]

MAX_ERRORS = 10
"""Bad items named in one answer."""

_IMAGE_NAMES = ("url", "bytes", "image_url", "image_base64")
"""What other servers call ``image``, and some clients of the hosted API."""

_SOURCES = ("url", "bytes", "base64")
"""Fields of an object that some put where a media field has a string."""

BARE_IMAGE = "data:image/"
"""How a string begins that is an image for models that take some, as clients of the hosted API send them."""

_KINDS = (Modality.IMAGE, Modality.AUDIO, Modality.VIDEO, Modality.PDF)
_MEDIA_KEYS = (*map(str, _KINDS), "content", *_IMAGE_NAMES)
_PARTS = frozenset(Modality) - {Modality.PDF}


class TextDoc(BaseModel):
    """A text as an object."""

    text: str = Field(description="The text.")


class ImageDoc(BaseModel):
    """An image as an object."""

    image: str = Field(description="An http or https URL, or the file in base64.", min_length=1)


class AudioDoc(BaseModel):
    """A sound as an object."""

    audio: str = Field(description="An http or https URL, or the file in base64.", min_length=1)


class VideoDoc(BaseModel):
    """A film as an object."""

    video: str = Field(description="An http or https URL, or the file in base64.", min_length=1)


class PDFDoc(BaseModel):
    """A PDF as an object; it has one result for each page."""

    pdf: str = Field(description="An http or https URL, or the file in base64.", min_length=1)


class MergedContentGroup(BaseModel):
    """Texts and media that have one result together; their order matters."""

    content: list[TextDoc | ImageDoc | VideoDoc | AudioDoc] = Field(
        description="At least one part.", min_length=1
    )


_DOCS: Mapping[Modality, type[BaseModel]] = {
    Modality.TEXT: TextDoc,
    Modality.IMAGE: ImageDoc,
    Modality.AUDIO: AudioDoc,
    Modality.VIDEO: VideoDoc,
    Modality.PDF: PDFDoc,
}


@dataclass(frozen=True, slots=True)
class Accepted:
    """The contents that a field takes, texts always; others are refused in the name of ``model``."""

    model: str
    kinds: frozenset[Modality] = frozenset({Modality.TEXT})
    groups: bool = False

    @classmethod
    def by(cls, spec: ModelSpec) -> Accepted:
        """Return what a model takes as an input."""
        return cls(spec.id, frozenset(spec.modalities) | {Modality.TEXT}, spec.merged_content)

    @property
    def only_texts(self) -> bool:
        """Whether nothing but texts is taken."""
        return len(self.kinds) == 1 and not self.groups

    def schema(self, *, listed: bool = False) -> Any:
        """Return the type of one content for the OpenAPI document; a PDF stands alone, not in a list."""
        kinds = [kind for kind in _DOCS if kind in self.kinds and not (listed and kind is Modality.PDF)]
        docs: list[Any] = [_DOCS[kind] for kind in kinds]
        return reduce(or_, [*docs, *([MergedContentGroup] if self.groups else [])], str)

    @property
    def keys(self) -> list[str]:
        """The fields of an object that is one content, one of them each time."""
        return [str(kind) for kind in _DOCS if kind in self.kinds] + (["content"] if self.groups else [])

    def described(self, max_items: int) -> str:
        """Describe a field that takes one content or a list of them."""
        return f"A text, an object with {_either(self.keys, '`')}, or a list of 1 to {max_items} of them."


class RefusedItem(Exception):  # noqa: N818 - no error of the program's; it never leaves the parsing
    """An item that is not what it should be."""

    def __init__(self, details: InitErrorDetails) -> None:
        super().__init__(details)
        self.details = details


def read_content(item: object, at: Location, accepted: Accepted) -> Content:
    """Return the content of a string or object.

    Raises RefusedItem, located at ``at`` or at the field inside. The typed door puts ``Media`` where the REST
    one has strings.
    """
    if isinstance(item, str):
        if item.startswith(BARE_IMAGE) and Modality.IMAGE in accepted.kinds:
            return Media(Modality.IMAGE, item)
        return item
    if not isinstance(item, dict):
        keys = _either(accepted.keys, "'")
        refuse(at, item, "text_type", "Input should be a string or an object with {keys}", keys=keys)
    doc = cast("dict[str, object]", item)
    text = doc.get("text")
    if isinstance(text, str):
        return text
    if "text" in doc:
        raise RefusedItem(InitErrorDetails(type="string_type", loc=(*at, "text"), input=text))
    return _read_other(doc, at, accepted)


def read_one(item: object, read: Callable[[object, Location], T]) -> T:
    """Read a value that is no list; raises pydantic's ValidationError for the enclosing model to locate."""
    try:
        return read(item, ())
    except RefusedItem as refused:
        raise _failure([refused.details]) from None


def read_each(items: Sequence[object], read: Callable[[object, Location], T]) -> list[T]:
    """Read every item of a list; raises pydantic's ValidationError naming the first bad ones by position."""
    values: list[T] = []
    errors: list[InitErrorDetails] = []
    for position, item in enumerate(items):
        try:
            values.append(read(item, (position,)))
        except RefusedItem as refused:
            errors.append(refused.details)
            if len(errors) == MAX_ERRORS:
                break
    if errors:
        raise _failure(errors)
    return values


def read_contents(items: list[object], accepted: Accepted) -> list[Content]:
    """Read the contents of a list, of which a PDF is the only one; raises as ``read_each``."""
    if set(map(type, items)) == {str} and accepted.only_texts:
        return cast("list[Content]", items)

    def read(item: object, at: Location) -> Content:
        content = read_content(item, at, accepted)
        if len(items) > 1 and isinstance(content, Media) and content.kind is Modality.PDF:
            refuse((*at, "pdf"), item, "pdf_alone", "A PDF must be the only input of its request")
        return content

    return read_each(items, read)


def refuse(at: Location, value: object, kind: Any, message: Any, **context: Any) -> NoReturn:
    """Raise RefusedItem with words of our own."""
    error = PydanticCustomError(kind, message, context)
    raise RefusedItem(InitErrorDetails(type=error, loc=at, input=value))


def _read_other(doc: dict[str, object], at: Location, accepted: Accepted) -> Content:
    """Read an object without ``text``."""
    key = next((key for key in _MEDIA_KEYS if key in doc), None)
    if (
        key is None
        and doc.get("type") == Modality.IMAGE
        and "value" in doc
        and Modality.IMAGE in accepted.kinds
    ):
        return _read_media(Modality.IMAGE, doc["value"], (*at, "value"))
    if key is None:
        raise RefusedItem(InitErrorDetails(type="missing", loc=(*at, "text"), input=doc))
    if key == "content":
        if accepted.groups:
            return _read_group(doc[key], (*at, key), accepted)
    elif (kind := Modality.IMAGE if key in _IMAGE_NAMES else Modality(key)) in accepted.kinds:
        return _read_media(kind, doc[key], (*at, key))
    words = "takes text only, not" if accepted.only_texts else "does not take"
    message = f"Model '{{model}}' {words} '{{key}}'."
    refuse(at, doc, "unsupported_modality", message, model=accepted.model, key=key)


def _read_media(kind: Modality, source: object, at: Location) -> Media:
    if isinstance(source, Media):
        return source
    if isinstance(source, dict):
        inside = cast("dict[str, object]", source)
        name = next((name for name in _SOURCES if name in inside), _SOURCES[0])
        at, source = (*at, name), inside.get(name)
    if not isinstance(source, str):
        raise RefusedItem(InitErrorDetails(type="string_type", loc=at, input=source))
    if not source:
        refuse(at, source, "string_too_short", "String should have at least 1 character")
    return Media(kind, source)


def _read_group(parts: object, at: Location, accepted: Accepted) -> Group:
    if not isinstance(parts, list):
        raise RefusedItem(InitErrorDetails(type="list_type", loc=at, input=parts))
    if not parts:
        refuse(at, parts, "too_short", "A group cannot be empty. Provide at least one part.")
    inside = Accepted(accepted.model, accepted.kinds & _PARTS)
    read = [read_content(part, (*at, i), inside) for i, part in enumerate(cast("list[object]", parts))]
    return Group(tuple(cast("list[str | Media]", read)))


def _either(names: Sequence[str], quote: str) -> str:
    quoted = [f"{quote}{name}{quote}" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _failure(errors: list[InitErrorDetails]) -> ValidationError:
    """Pack errors so that the enclosing model puts its own location in front of each."""
    return ValidationError.from_exception_data("input", errors)
