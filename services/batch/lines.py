"""Lines of a job's input, and the lines of its output and error files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import orjson
from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

from services.batch.openai_schemas import ENDPOINT
from services.batch.schema import JobForm, task_of
from services.batch.table import BatchJob
from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import ServiceError
from services.core.preview import preview
from services.core.requests.content import Location
from services.embed.parsing import to_request
from services.embed.rest import response_body, response_items
from services.embed.schema import INPUT_NAMES, EmbeddingRequest, request_schema
from services.embed.spellings import Spellings
from services.embed.types import EmbedRequest, EmbedResult, MultiVectorResult

DUPLICATE = "duplicate"
TOO_LONG = "too_long"
MAX_LINE_BYTES = 1 << 20

_INVALID = "VALIDATION_ERROR"
_ATTRIBUTES = {
    "embedding_type": "encodings",
    "input_type": "role",
    "return_multivector": "multivector",
    "return_tokenized_input": "tokens",
}
"""Of an ``EmbedRequest``, where they are not called as the field is."""

_TRANSLATED = frozenset({"input_type"})
"""Options that, to a model that lacks them, are put into other words, if they mean anything."""

_NO_OPTIONS = frozenset({"model", "input"})

# What many readers of lines take for the end of one; JSON may write each as an escape.
_LINE_ENDS = {mark.encode(): f"\\u{ord(mark):04x}".encode() for mark in "\u0085\u2028\u2029"}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a line has no vectors."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank: its number among those, from 0, and its ``place`` in the file, from 1.

    ``custom_id`` is what the file has there, whatever it is. There is either a ``request`` or a ``fault``.
    """

    number: int
    place: int
    custom_id: Any
    request: EmbedRequest | None = None
    fault: Fault | None = None


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """Words for what is wrong with a line."""


class LineReader:
    """Reads lines as requests to ``POST /v1/embeddings`` whose options are those of the job."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec], *, max_items: int) -> None:
        self._catalog = catalog
        self._specs = {spec.id: spec for spec in served}
        self._schemas = {name: request_schema(spec, max_items) for name, spec in self._specs.items()}
        self._spellings = {name: Spellings(spec) for name, spec in self._specs.items()}
        # A model that lacks an option ignores it in a call of its own. In a line, whose vectors nobody looks
        # at one by one, what is not done as it was asked for is refused.
        self._known = dict(_options(catalog))

    def read(self, job: BatchJob, number: int, place: int, data: bytes, known: str | None) -> Line:
        """Read a line; ``known`` is what the look at the whole input has found wrong with it."""
        custom_id = None
        try:
            if known == TOO_LONG:
                raise _Refused(f"The line is longer than {MAX_LINE_BYTES:,} bytes.")
            fields = _object(data)
            custom_id = fields.get("custom_id")
            if not isinstance(custom_id, str) or not custom_id:
                custom_id = _as_written(data)
                raise _Refused("'custom_id' should be a text that is not empty.")
            if known is not None:
                raise _Refused(_duplicate(known))
            return Line(number, place, custom_id, self._request(job, fields))
        except _Refused as refused:
            return Line(number, place, custom_id, fault=Fault(_INVALID, str(refused)))

    def _request(self, job: BatchJob, fields: dict[str, Any]) -> EmbedRequest:
        if job.form is JobForm.OPENAI:
            _check_call(fields)
        body = fields.get("body")
        if not isinstance(body, dict) or not any(name in body for name in INPUT_NAMES):
            raise _Refused("'body' should be an object with 'input'.")
        given = {name: value for name, value in cast("dict[str, Any]", body).items() if value is not None}
        self._check_model(job, given)
        spec = self._specs[job.model]
        if "task" in given and isinstance(given["task"], str):
            given = {**given, "task": task_of(spec, given["task"])}
        try:
            given = self._spellings[job.model].translate(given, _place)
            checked = self._schemas[job.model].model_validate({**given, "model": job.model})
        except ValidationError as error:
            raise _Refused(_words(error)) from None
        except ServiceError as error:
            wrong = error.field_errors[0]
            raise _Refused(f"'{wrong.field}' {wrong.message}.") from None
        request = to_request(job.model, checked)
        if job.form is JobForm.OPENAI:  # each line is a call of its own
            self._compare(replace(request, truncate=True), spec, given, checked, lacked_only=True)
            return replace(request, contents=tuple(request.contents))
        options = _options_of(job, spec)
        self._compare(options, spec, given, checked)
        return replace(options, contents=request.contents)

    def _check_model(self, job: BatchJob, body: Mapping[str, Any]) -> None:
        name = body.get("model", job.model)
        if name == job.model:
            return
        spec = self._catalog.get(name) if isinstance(name, str) else None
        # An alias and its model are one.
        if spec is None or (spec.alias_of or spec.id) != (self._specs[job.model].alias_of or job.model):
            raise _Refused(_differs("model", name, job.model))

    def _compare(
        self,
        options: EmbedRequest,
        spec: ModelSpec,
        body: Mapping[str, Any],
        checked: EmbeddingRequest,
        *,
        lacked_only: bool = False,
    ) -> None:
        """Refuse an option of a line that is not the job's, or only one that the model lacks."""
        line = to_request(options.model, checked)
        for name, names in self._known.items():
            given = next((each for each in names if each in body), None)
            lacks = name not in type(checked).model_fields
            if given is None or (lacked_only and not lacks) or (lacks and name in _TRANSLATED):
                continue
            attribute = _ATTRIBUTES.get(name, name)
            wanted = getattr(options, attribute, None)
            asked = body[given] if lacks else getattr(line, attribute, None)
            if wanted is None:  # the model's own
                wanted = {"dimensions": spec.dimensions, "task": spec.default_task}.get(name)
            if asked != wanted:
                shown = [str(each) for each in wanted] if isinstance(wanted, tuple) else wanted
                raise _Refused(_differs(given, body[given], shown))


def _check_call(fields: Mapping[str, Any]) -> None:
    """Refuse a line for another endpoint, as OpenAI's form names one in each."""
    for name, wanted in (("method", "POST"), ("url", ENDPOINT)):
        given = fields.get(name)
        if given is not None and given != wanted:
            raise _Refused(f"'{name}' is {_shown(given)}, and only {_shown(wanted)} is served.")


def custom_id_of(data: bytes) -> str | None:
    """Return the ``custom_id`` of a line, None for a line without a good one."""
    try:
        value: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    found = cast("dict[str, Any]", value).get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) and found else None


def output_line(job_id: str, line: Line, result: EmbedResult | MultiVectorResult) -> bytes:
    """Write the result of a line: what ``POST /v1/embeddings`` answers. The same for the same line."""
    name = _line_name(job_id, line.number)
    body = response_body(result, response_items(result, 0, len(result.vectors)))
    return _dump(
        {
            "id": f"batch_req_{name}",
            "custom_id": line.custom_id,
            "response": {"status_code": 200, "request_id": name, "body": body},
            "error": None,
        }
    )


def error_line(job_id: str, line: Line, fault: Fault) -> bytes:
    """Write why a line failed, and which it is."""
    return _dump(
        {
            "id": f"batch_req_{_line_name(job_id, line.number)}",
            "custom_id": line.custom_id,
            "response": None,
            "error": {"code": fault.code, "message": fault.message, "line": line.place},
        }
    )


def split_lines(data: bytes, first: int) -> list[tuple[int, bytes]]:
    """Cut a piece of the input into its lines, each with its place; blank ones count there and are left out.

    ``first`` is the place of the first line of the piece.
    """
    return [(place, line) for place, line in enumerate(data.split(b"\n"), first) if line.strip()]


def _dump(value: Any) -> bytes:
    line = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    for mark, escape in _LINE_ENDS.items():
        line = line.replace(mark, escape)
    return line


def _line_name(job_id: str, number: int) -> str:
    return hashlib.blake2b(f"{job_id}:{number}".encode(), digest_size=12).hexdigest()


def _object(data: bytes) -> dict[str, Any]:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise _Refused("The line is not UTF-8 but, by its bytes, UTF-16. Files should be UTF-8.")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _Refused(f"The line is not valid JSON: {error.msg} (column {error.colno}).") from None
    if not isinstance(value, dict):
        raise _Refused("The line should be a JSON object.")
    return cast("dict[str, Any]", value)


def _as_written(data: bytes) -> Any:
    """Give a ``custom_id`` that is no good name for a line to be echoed, numbers digit by digit."""

    def number(digits: str) -> orjson.Fragment:
        return orjson.Fragment(digits.encode())

    try:
        found = json.loads(data, parse_int=number, parse_float=number).get("custom_id")
    except (ValueError, RecursionError):
        return None
    return None if isinstance(found, dict | list) else found


def _duplicate(known: str) -> str:
    place = known.partition(":")[2]
    earlier = f"Line {place}" if place else "An earlier line"
    return f"{earlier} of this job has the same 'custom_id'."


def _options(catalog: Catalog) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Give every option that a model of the catalogue has, with all names that callers know it by."""
    for spec in catalog.models.values():
        if spec.supports(Capability.EMBED):
            fields = cast("type[BaseModel]", request_schema(spec, 1)).model_fields
            for name, field in fields.items():
                if name not in _NO_OPTIONS:
                    yield name, _names(name, field)


def _names(name: str, field: FieldInfo) -> tuple[str, ...]:
    alias = field.validation_alias
    return tuple(map(str, alias.choices)) if isinstance(alias, AliasChoices) else (name,)


def _options_of(job: BatchJob, spec: ModelSpec) -> EmbedRequest:
    return EmbedRequest(
        job.model,
        (),
        task=job.task,
        dimensions=job.dimensions,
        normalized=job.normalized,
        # Models that leave the choice to the caller refuse a text that is too long, the others cut it.
        truncate=not spec.truncate_choice,
    )


def _differs(name: str, asked: object, wanted: object) -> str:
    return (
        f"'body.{name}' is {_shown(asked)}, and {_shown(wanted)} in this job. "
        "The options of a job hold for all of its lines."
    )


def _shown(value: object) -> str:
    if isinstance(value, list) and len(cast("list[object]", value)) == 1:
        value = cast("list[object]", value)[0]
    return "not set" if value is None else orjson.dumps(preview(value)).decode()


def _words(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"'body{_path(first['loc'])}' {first['msg']}"


def _place(_model: str | None, location: Location) -> str:
    return f"body{_path(location)}"


def _path(location: Location) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
