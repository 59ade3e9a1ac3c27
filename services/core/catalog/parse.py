"""Catalogue files: YAML in, checked ``ModelSpec`` entries out. One format for ours and the operator's.

A file is a mapping with ``models`` (a list of entries), ``defaults`` (keys that every entry of the file
starts from) and ``aliases`` (own name -> model id), all optional. Unknown keys refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from services.core.catalog.types import Capability, Modality, ModelSpec, OutputKind

_FILE_KEYS = frozenset({"models", "defaults", "aliases"})
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"main|[0-9a-f]{40}")
_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CatalogError(ValueError):
    """A catalogue file, an alias or a model name that cannot be used; the text is for the operator."""


@dataclass(frozen=True, slots=True)
class CatalogFile:
    """What one file says."""

    specs: tuple[ModelSpec, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])


def read_file(path: Path) -> CatalogFile:
    """Read and check one catalogue file; raises ``CatalogError`` naming the file and what is wrong."""
    try:
        document = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise CatalogError(f"Cannot read the catalogue file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogError(f"The catalogue file {path} is not valid YAML: {error}") from error
    try:
        return _parse(document)
    except CatalogError as error:
        raise CatalogError(f"Catalogue file {path}: {error}") from error


def _parse(document: object) -> CatalogFile:
    if not isinstance(document, dict):
        raise CatalogError("it must be a mapping with 'models' or 'aliases'.")
    content = cast("dict[str, Any]", document)
    if unknown := sorted(map(str, content.keys() - _FILE_KEYS)):
        raise CatalogError(f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_FILE_KEYS))}.")
    defaults = _mapping(content.get("defaults"), "'defaults'")
    entries = content.get("models") or []
    if not isinstance(entries, list):
        raise CatalogError("'models' must be a list of entries.")
    specs = tuple(_entry(entry, defaults) for entry in cast("list[Any]", entries))
    _refuse_twice([spec.id for spec in specs])
    aliases = _mapping(content.get("aliases"), "'aliases'")
    return CatalogFile(specs, {str(name): str(target) for name, target in aliases.items()})


def _mapping(value: object, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CatalogError(f"{what} must be a mapping.")
    return cast("dict[str, Any]", value)


def _refuse_twice(ids: list[str]) -> None:
    if twice := sorted({id for id in ids if ids.count(id) > 1}):
        raise CatalogError(f"{', '.join(twice)} stands there more than once.")


@cache
def _adapter() -> TypeAdapter[ModelSpec]:
    return TypeAdapter(ModelSpec)


def _entry(entry: object, defaults: Mapping[str, Any]) -> ModelSpec:
    fields = _mapping(entry, "each entry of 'models'")
    label = f"model {fields.get('id', '(without id)')!r}"
    try:
        spec = _adapter().validate_python({**defaults, **fields})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors()
        )
        raise CatalogError(f"{label}: {problems}.") from error
    if problems := "; ".join(contradictions(spec)):
        raise CatalogError(f"{label}: {problems}.")
    return spec


def contradictions(spec: ModelSpec) -> Iterator[str]:
    """Yield what in an entry does not fit together, one sentence part each."""
    yield from _identity(spec)
    yield from _tasks(spec)
    yield from _output(spec)
    yield from _capabilities(spec)


def _identity(spec: ModelSpec) -> Iterator[str]:
    if not _ID.fullmatch(spec.id):
        yield "id may hold letters, digits, '.', '_' and '-' only"
    if not _REVISION.fullmatch(spec.revision):
        yield f"revision must be a commit of 40 hex digits or main, not {spec.revision!r}"
    if spec.alias_of:
        yield "alias_of cannot be set in an entry, use 'aliases'"
    if spec.context_length < 1:
        yield "context_length must be at least 1"
    if not spec.capabilities or not spec.modalities or not spec.outputs:
        yield "capabilities, modalities and outputs must not be empty"


def _tasks(spec: ModelSpec) -> Iterator[str]:
    known = set(spec.tasks)
    for what, names in (
        ("prompts", set(spec.prompts)),
        ("adapters", set(spec.adapters)),
        ("default_task", {spec.default_task} - {None}),
        ("classify_task", {spec.classify_task} - {None}),
    ):
        if strange := sorted(map(str, names - known)):
            yield f"{what} names {', '.join(strange)}, which is not among its tasks"


def _output(spec: ModelSpec) -> Iterator[str]:
    dense = {OutputKind.DENSE, OutputKind.MULTI_VECTOR} & set(spec.outputs)
    if bool(dense) != (spec.dimensions > 0):
        yield "dimensions must be positive for dense and multi-vector outputs, and 0 for others"
    if (spec.dimension_choices or spec.trained_dimensions) and not spec.matryoshka:
        yield "dimension_choices and trained_dimensions need matryoshka"
    if any(not 0 < width <= spec.dimensions for width in (*spec.dimension_choices, *spec.trained_dimensions)):
        yield f"dimension_choices and trained_dimensions must lie between 1 and {spec.dimensions}"
    if spec.multivector_choice and OutputKind.MULTI_VECTOR not in spec.outputs:
        yield "multivector_choice needs multi_vector among its outputs"


def _capabilities(spec: ModelSpec) -> Iterator[str]:
    if spec.supports(Capability.RERANK) != (spec.rerank is not None):
        yield "the capability rerank and the field rerank go together"
    if spec.supports(Capability.CLASSIFY) != bool(spec.classify_inputs):
        yield "the capability classify and the field classify_inputs go together"
    if strange := sorted({*spec.classify_inputs, *spec.train_inputs} - set(spec.modalities)):
        yield f"classify_inputs or train_inputs name {', '.join(strange)}, which is not among its modalities"
    if (Modality.IMAGE in spec.modalities) != (spec.images is not None):
        yield "the modality image and the field images go together"
