"""The catalogue: every model we know, the operator's own and the operator's aliases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from services.core.catalog.parse import CatalogError, read_file
from services.core.catalog.types import ModelSpec

_FOLDER = Path(__file__).parent / "models"
VENDORS = ("jina-ai", "jinaai")
"""Prefixes, with a slash, under which callers may name every model."""


class Catalog:
    """Which models exist. Immutable; ``models`` maps ids, aliases included, to their entries.

    Names of callers are resolved here, by ``get``, and once: everybody else speaks of ids.
    """

    def __init__(self, specs: Iterable[ModelSpec], aliases: Mapping[str, str] | None = None) -> None:
        models = {spec.id: spec for spec in specs}
        entries = {name: _alias(name, target, models) for name, target in (aliases or {}).items()}
        self.models: Mapping[str, ModelSpec] = MappingProxyType({**models, **entries})
        self._repositories = {spec.repository: spec for spec in models.values() if spec.repository}

    @classmethod
    def load(cls, extra: Path | None = None, aliases: Mapping[str, str] | None = None) -> Catalog:
        """Read our files, then the operator's (``extra``), whose entries replace ours of the same id.

        ``aliases`` (own name -> model id) come on top of those in the file. Raises ``CatalogError``.
        """
        specs = {spec.id: spec for spec in _own()}
        named: dict[str, str] = {}
        if extra is not None:
            content = read_file(extra)
            specs.update({spec.id: spec for spec in content.specs})
            named.update(content.aliases)
        named.update(aliases or {})
        return cls(specs.values(), named)

    def get(self, name: str) -> ModelSpec | None:
        """The entry of an id, alias or repository, with or without Jina's prefix; None when there is none."""
        return self.models.get(name) or self.models.get(_short(name)) or self._repositories.get(name)

    def require(self, name: str) -> ModelSpec:
        """As ``get``, but raises ``CatalogError`` with the known ids."""
        spec = self.get(name)
        if spec is None:
            raise CatalogError(f"Unknown model '{name}'. Known models: {', '.join(sorted(self.models))}.")
        return spec

    def select(self, names: Iterable[str]) -> tuple[ModelSpec, ...]:
        """Entries of what a process is told to serve: those named, and every alias of them.

        Raises ``CatalogError`` for a name that is neither a model nor an alias.
        """
        chosen = {spec.id: spec for spec in map(self.require, names)}
        for spec in self.models.values():
            if spec.alias_of in chosen:
                chosen.setdefault(spec.id, spec)
        return tuple(chosen.values())


def _short(name: str) -> str:
    vendor, _, rest = name.partition("/")
    return rest if vendor in VENDORS else name


@cache
def _own() -> tuple[ModelSpec, ...]:
    return tuple(spec for path in sorted(_FOLDER.glob("*.yaml")) for spec in read_file(path).specs)


def _alias(name: str, target: str, models: Mapping[str, ModelSpec]) -> ModelSpec:
    spec = models.get(_short(target))
    if spec is None:
        raise CatalogError(f"Alias '{name}' points to '{target}', which is not a model of the catalogue.")
    if not name or name != name.strip() or name == spec.id:
        raise CatalogError(f"'{name}' cannot be an alias of '{spec.id}'.")
    return replace(
        spec,
        id=name,
        name=f"{name} (alias of {spec.id})",
        alias_of=spec.id,
        description=f"Alias, set by the operator, of {spec.id}. {spec.description}",
    )
