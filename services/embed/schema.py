"""What ``POST /v1/embeddings`` takes, one class per model, made from the catalogue, and what it answers.

The same classes check requests and describe them in the served OpenAPI document. Fields that a model does
not have are ignored like all unknown ones; ``null`` stands for the default. Those of answers only describe:
``rest`` writes answers by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    SkipValidation,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from services.core.catalog.types import Modality, ModelSpec, OutputKind
from services.core.content import Content
from services.core.requests.content import Accepted, read_content, read_contents, read_one
from services.core.requests.fields import Flag, Whole, class_name, without_default
from services.embed.spellings import Spellings
from services.embed.types import Encoding

EncodingName = Literal["float", "base64", "binary", "ubinary", "int8", "uint8"]
EncodingNames = Annotated[list[EncodingName], Field(min_length=1)]

INPUT_NAMES = ("input", "texts", "content")
"""Names callers know the input by; the first one wins."""

_one_encoding: TypeAdapter[Any] = TypeAdapter(EncodingName)
_many_encodings: TypeAdapter[Any] = TypeAdapter(EncodingNames)
_BY_NAME = {name: (Encoding(name),) for name in get_args(EncodingName)}


_ENCODING_NAMES = AliasChoices("embedding_type", "encoding_format", "encoding_type", "embedding_types")
_Number = Literal["float"]
_Numbers = _Number | Annotated[list[_Number], Field(min_length=1)] | None
_only_numbers: TypeAdapter[Any] = TypeAdapter(_Numbers)


def _parse_numbers(value: object) -> tuple[Encoding, ...]:
    _only_numbers.validate_python(value)
    return (Encoding.FLOAT,)


def _parse_encodings(value: object) -> tuple[Encoding, ...]:
    if value is None:
        return (Encoding.FLOAT,)
    if type(value) is str and (known := _BY_NAME.get(value)):
        return known
    if isinstance(value, list):
        names = cast("list[str]", _many_encodings.validate_python(value))
        return tuple(dict.fromkeys(map(Encoding, names)))
    if isinstance(value, tuple):  # no JSON is one: it stands for another vendor's words
        return cast("tuple[Encoding, ...]", value)
    return _BY_NAME[_one_encoding.validate_python(value)]


class EmbeddingRequest(BaseModel):
    """What every model takes. ``input`` and ``model`` come with the subclass of a model."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    foreign: ClassVar[Mapping[str, Any]] = {}
    """Fields of other vendors, which are put into the words of the model before they come here."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe those as well."""
        schema = handler(core_schema)
        handler.resolve_ref_schema(schema).setdefault("properties", {}).update(cls.foreign)
        return schema

    embedding_type: Annotated[
        tuple[Encoding, ...],
        PlainValidator(_parse_encodings, json_schema_input_type=EncodingName | EncodingNames | None),
    ] = Field(
        (Encoding.FLOAT,),
        validation_alias=_ENCODING_NAMES,
        description="How vectors are written: numbers, base64 of little-endian float32, one bit per "
        "component as bytes minus 128 (`binary`) or as bytes (`ubinary`), or one byte per component, scaled "
        "so that the largest of a vector is 127 (`int8`), or the same plus 128 (`uint8`). With several, "
        "`embedding` holds the first and `embeddings_by_type` all of them.",
        json_schema_extra={"default": Encoding.FLOAT.value},
    )


def request_schema(spec: ModelSpec, max_items: int) -> type[EmbeddingRequest]:
    """Make the request class of one model; ``max_items`` bounds the list form of ``input``."""
    accepted = Accepted.by(spec)
    fields: dict[str, Any] = {
        "model": (SkipValidation[Literal[spec.id]], Field(description="Id of the model.")),
        "input": (
            input_field(accepted, max_items),
            Field(validation_alias=AliasChoices(*INPUT_NAMES), description=accepted.described(max_items)),
        ),
        **_optional_fields(spec),
    }
    schema = create_model(
        class_name(spec, "EmbeddingRequest"),
        __base__=EmbeddingRequest,
        __validators__=_validators(spec),
        __doc__=f"Embeddings by {spec.id}: texts of up to {spec.context_length} tokens.",
        **fields,
    )
    schema.foreign = Spellings(spec).described()
    return schema


def _validators(spec: ModelSpec) -> dict[str, Any]:
    """Return what checks the options of a model together, where some exclude others."""
    if spec.multivector_choice or (spec.late_chunking and set(spec.modalities) != {Modality.TEXT}):
        return {"_together": model_validator(mode="after")(_go_together)}
    return {}


def _go_together(request: EmbeddingRequest) -> EmbeddingRequest:
    """Refuse options that exclude each other, in the words of the hosted API."""
    values = vars(request)
    several = values.get("return_multivector") is True
    chunking = values.get("late_chunking") is True
    if several and values.get("dimensions") is not None:
        raise _incompatible("dimensions", "cannot be set when 'return_multivector' is True")
    if several and chunking:
        raise _incompatible("late_chunking", "cannot be set when 'return_multivector' is True")
    if values.get("return_tokenized_input") is True and not several:
        raise _incompatible("return_tokenized_input", "requires 'return_multivector' to be True")
    if chunking and set(map(type, values["input"])) != {str}:
        raise _incompatible("late_chunking", "reads texts only")
    return request


def _incompatible(field: str, why: str) -> ValidationError:
    words: Any = f"Incompatible options: '{field}' {why}"
    error = PydanticCustomError("incompatible_options", words)
    details = InitErrorDetails(type=error, loc=(field,), input=None)
    return ValidationError.from_exception_data("options", [details])


def _optional_fields(spec: ModelSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if set(spec.outputs) == {OutputKind.SPARSE}:
        fields["embedding_type"] = (
            Annotated[tuple[Encoding, ...], PlainValidator(_parse_numbers, json_schema_input_type=_Numbers)],
            Field(
                (Encoding.FLOAT,),
                validation_alias=_ENCODING_NAMES,
                description="Weights are always numbers.",
                json_schema_extra={"default": Encoding.FLOAT.value},
            ),
        )
    if spec.input_types:
        names: Any = Literal[tuple(map(str, spec.input_types))]
        fields["input_type"] = (
            names | None,
            Field(
                str(spec.input_types[-1]),
                description="The side of a search that the texts stand on: a query is written otherwise "
                "than a document.",
            ),
        )
    if spec.late_chunking:
        fields["late_chunking"] = (
            Flag,
            Field(
                False,
                description="Read all texts as one, so that each vector knows its neighbours; together they "
                f"share the {spec.context_length} tokens of the context.",
            ),
        )
    if spec.multivector_choice:
        fields["return_multivector"] = (
            Flag,
            Field(
                False,
                description="Answer a vector for each token instead of one for each input; without "
                "`dimensions`.",
            ),
        )
        fields["return_tokenized_input"] = (
            Flag,
            Field(
                False,
                description="Answer the tokens beside their vectors; needs `return_multivector`.",
            ),
        )
    if spec.truncate_choice:
        fields["truncate"] = (
            Flag,
            Field(
                False,
                validation_alias=AliasChoices("truncate", "truncation"),
                description="Cut a text that is longer than the model's context instead of refusing it.",
            ),
        )
    if spec.normalize_choice:
        fields["normalized"] = (
            Flag,
            Field(
                True,
                validation_alias=AliasChoices("normalized", "normalize"),
                description="Scale vectors to length 1.",
            ),
        )
    if spec.matryoshka or spec.dimension_choices:
        fields["dimensions"] = (
            _dimensions(spec) | None,
            Field(
                None,
                validation_alias=AliasChoices("dimensions", "output_dimensionality", "output_dimension"),
                json_schema_extra=without_default,
                description=f"Keep only the first components. The full width is {spec.dimensions}.",
            ),
        )
    if spec.tasks:
        shown: Any = {"default": spec.default_task} if spec.default_task else without_default
        tasks: Any = Literal[spec.tasks]
        fields["task"] = (
            tasks | None,
            Field(
                None,
                validation_alias=AliasChoices("task", "task_type"),
                json_schema_extra=shown,
                description="What the vectors are for. Gemini's `task_type` means the nearest of these.",
            ),
        )
    return fields


def _dimensions(spec: ModelSpec) -> Any:
    if spec.dimension_choices:
        return Annotated[Literal[spec.dimension_choices], Whole]
    return Annotated[int, Field(gt=0, le=spec.dimensions), Whole]


def input_field(accepted: Accepted, max_items: int) -> Any:
    """Build the annotation of ``input``; the value becomes a ``list[Content]``.

    Errors lie at ``()`` for the list as a whole, at ``(i,)`` for an item of it and at ``(..., "text")`` (or
    another field) inside an object.
    """
    items = Annotated[list[accepted.schema(listed=True)], Field(min_length=1, max_length=max_items)]
    validator = PlainValidator(_parser(accepted, max_items), json_schema_input_type=accepted.schema() | items)
    return Annotated[Any, validator]


def _parser(accepted: Accepted, max_items: int) -> Callable[[object], list[Content]]:
    read = partial(read_content, accepted=accepted)

    def parse(value: object) -> list[Content]:
        if not isinstance(value, list):
            return [read_one(value, read)]
        items = cast("list[object]", value)
        if not items:
            raise PydanticCustomError("too_short", "Input list cannot be empty. Provide at least one item.")
        if len(items) > max_items:
            raise PydanticCustomError(
                "too_long", "Each input list can contain at most {max_items} items.", {"max_items": max_items}
            )
        kinds = set(map(type, items))
        if int in kinds or list in kinds:
            _refuse_token_ids(items)
        return read_contents(items, accepted)

    return parse


def _refuse_token_ids(items: list[object]) -> None:
    """Raise where the list is one text as token ids, or several of them, as OpenAI clients may send."""
    arrays = [cast("list[object]", item) for item in items if isinstance(item, list)] or [items]
    if any(array and all(type(token) is int for token in array) for array in arrays):
        raise PydanticCustomError(
            "token_ids_not_supported",
            "Arrays of token ids are not supported. Send the text itself "
            "(with LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False).",
        )


Number = int | float
Vector = list[Number] | str
Weights = dict[str, float]


class EmbeddingUsage(BaseModel):
    """Tokens of a request, special tokens included. Both counts are the same number."""

    total_tokens: int = Field(description="Tokens billed, after truncation.", ge=0)
    prompt_tokens: int = Field(description="Tokens of the input.", ge=0)
    image_tokens: int | None = Field(None, description="Those of images, if any.", ge=0)
    audio_tokens: int | None = Field(None, description="Those of sounds, if any.", ge=0)
    video_tokens: int | None = Field(None, description="Those of films, if any.", ge=0)


class SparseEmbeddingUsage(BaseModel):
    """Tokens of a request to a model of sparse vectors, special tokens included."""

    total_tokens: int = Field(description="Tokens billed, after truncation.", ge=0)
    input_tokens: int = Field(description="Tokens of the input.", ge=0)
    output_tokens: int = Field(description="Entries of the vectors answered.", ge=0)


class SingleEmbeddingData(BaseModel):
    """The vector of one input."""

    object: Literal["embedding"] = Field(description="Always `embedding`.")
    index: int = Field(description="Position of the input, from 0.", ge=0)
    embedding: Vector | Weights = Field(
        description="Numbers for `float`, `binary` and `ubinary`, a string for `base64`, in the first type "
        "asked for. Of a model of sparse vectors an object of tokens and their weights, the largest first."
    )
    embeddings_by_type: dict[EncodingName, Vector] | None = Field(
        None, description="The vector in every type asked for; only there when several were."
    )


class MultiEmbeddingData(BaseModel):
    """The vectors of one input, one for each of its tokens."""

    object: Literal["embeddings"] = Field(description="Always `embeddings`.")
    index: int = Field(description="Position of the input, from 0.", ge=0)
    embeddings: list[Vector] = Field(description="Each as `embedding` of a single vector.")
    tokenized_input: list[str] | None = Field(
        None, description="The tokens of the vectors; only there with `return_tokenized_input`."
    )
    embeddings_by_type: dict[EncodingName, list[Vector]] | None = Field(
        None, description="The vectors in every type asked for; only there when several were."
    )


class EmbeddingResponse(BaseModel):
    """One vector per input, or one for each token of it, in the order of the inputs."""

    model: str = Field(description="Id of the model that answered, without a prefix.")
    object: Literal["list"] = Field(description="Always `list`.")
    usage: EmbeddingUsage | SparseEmbeddingUsage
    data: list[SingleEmbeddingData] | list[MultiEmbeddingData]
