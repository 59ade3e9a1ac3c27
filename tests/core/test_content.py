"""Contents of a request: what is taken becomes one plain type, the rest is refused where it stands."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from searchfoundation.v1 import common_pb2

from services.core.catalog.types import Modality
from services.core.content import Content, Group, Media
from services.core.requests.content import Accepted, read_contents
from services.core.serving.messages import content_value

TEXTS = Accepted("some-model")
CLIP = Accepted("some-model", frozenset({Modality.TEXT, Modality.IMAGE, Modality.PDF}))
OMNI = Accepted("some-model", frozenset(Modality), groups=True)
URL = "https://example.com/a.png"
URI = "data:image/png;base64,AAAA"


def read(item: object, accepted: Accepted) -> Content:
    (content,) = read_contents([item], accepted)
    return content


def image(source: str | bytes) -> Media:
    return Media(Modality.IMAGE, source)


@pytest.mark.parametrize(
    ("item", "content"),
    [
        ({"image": URL}, image(URL)),
        ({"image": "aGk="}, image("aGk=")),
        ({"image_base64": "aGk="}, image("aGk=")),
        ({"image_url": URL}, image(URL)),
        ({"image_url": {"url": URL, "detail": "low"}, "type": "image_url"}, image(URL)),
        ({"url": URL}, image(URL)),
        ({"bytes": "aGk="}, image("aGk=")),
        (URI, image(URI)),
        ({"text": URI}, URI),
        ("data:text/plain,a", "data:text/plain,a"),
        ({"pdf": URL}, Media(Modality.PDF, URL)),
        (URL, URL),
        ({"type": "text", "text": "a", "image": URL}, "a"),
    ],
)
def test_every_form_of_a_content(item: object, content: Content) -> None:
    assert read(item, CLIP) == content


def test_texts_and_images_keep_their_order() -> None:
    assert read_contents(["a", {"image": URL}, {"text": "b"}], CLIP) == ["a", image(URL), "b"]


def test_a_group_holds_texts_and_media_in_order() -> None:
    parts = [{"text": "a"}, {"image": URL}, {"audio": "aGk="}]
    assert read({"content": parts}, OMNI) == Group(("a", image(URL), Media(Modality.AUDIO, "aGk=")))


def test_bytes_of_the_typed_door_are_taken_as_they_are() -> None:
    picture = common_pb2.Media(data=b"\xff\xd8", mime_type="image/jpeg")
    part = common_pb2.ContentPart(image=picture)
    group = common_pb2.ContentGroup(parts=[common_pb2.ContentPart(text="a"), part])
    media = Media(Modality.IMAGE, b"\xff\xd8", "image/jpeg")
    assert read(content_value(common_pb2.Content(image=picture)), CLIP) == media
    assert read(content_value(common_pb2.Content(group=group)), OMNI) == Group(("a", media))
    assert read(content_value(common_pb2.Content(pdf=common_pb2.Media(url=URL))), CLIP) == Media(
        Modality.PDF, URL
    )


def test_a_text_of_the_typed_door_stays_one() -> None:
    assert read(content_value(common_pb2.Content(text=URI)), CLIP) == URI
    assert read(content_value(common_pb2.Content(text="a")), CLIP) == "a"


def test_a_text_stays_one_where_no_images_are_taken() -> None:
    assert read(URI, TEXTS) == URI


@pytest.mark.parametrize(
    ("accepted", "item", "place", "kind", "words"),
    [
        (
            TEXTS,
            {"image": URL},
            (),
            "unsupported_modality",
            "Model 'some-model' takes text only, not 'image'.",
        ),
        (TEXTS, 5, (), "text_type", "Input should be a string or an object with 'text'"),
        (CLIP, 5, (), "text_type", "Input should be a string or an object with 'text', 'image' or 'pdf'"),
        (CLIP, {"audio": URL}, (), "unsupported_modality", "Model 'some-model' does not take 'audio'."),
        (CLIP, {"content": []}, (), "unsupported_modality", "Model 'some-model' does not take 'content'."),
        (CLIP, {"image": 5}, ("image",), "string_type", "Input should be a valid string"),
        (
            CLIP,
            {"image_url": {"url": 5}},
            ("image_url", "url"),
            "string_type",
            "Input should be a valid string",
        ),
        (CLIP, {"image": ""}, ("image",), "string_too_short", "String should have at least 1 character"),
        (CLIP, {}, ("text",), "missing", "Field required"),
        (OMNI, {"content": "a"}, ("content",), "list_type", "Input should be a valid list"),
        (
            OMNI,
            {"content": []},
            ("content",),
            "too_short",
            "A group cannot be empty. Provide at least one part.",
        ),
        (
            OMNI,
            {"content": ["a", {"pdf": URL}]},
            ("content", 1),
            "unsupported_modality",
            "Model 'some-model' does not take 'pdf'.",
        ),
    ],
)
def test_what_is_refused_is_named_where_it_stands(
    accepted: Accepted, item: Any, place: tuple[str | int, ...], kind: str, words: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        read_contents(["first", item], accepted)
    (error,) = refused.value.errors(include_url=False)
    assert (error["loc"], error["type"], error["msg"]) == ((1, *place), kind, words)


def test_a_pdf_stands_alone() -> None:
    with pytest.raises(ValidationError) as refused:
        read_contents(["a", {"pdf": URL}], CLIP)
    (error,) = refused.value.errors(include_url=False)
    assert (error["loc"], error["type"]) == ((1, "pdf"), "pdf_alone")
