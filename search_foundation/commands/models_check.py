"""``search-foundation models check``: what a folder holds, and whether it would load."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from services.core.catalog import Catalog, CatalogError
from services.core.catalog.folder import FolderReport, inspect
from services.core.catalog.types import ModelSpec
from services.core.catalog.weights import WeightsNotFound, locate
from services.core.settings import Settings


def check(args: argparse.Namespace, settings: Settings, catalog: Catalog) -> int:
    """Run ``models check``: 0 if the folder loads, else 1. Raises ``CatalogError`` for a wrong name."""
    try:
        folder, spec = _folder(args, settings, catalog)
    except WeightsNotFound as error:
        print(error, file=sys.stderr)
        return 1
    # imported late: they bring torch, which is slow to start
    from services.core.modeling.native.instructions import choose

    try:
        choose(settings.cpu_instructions)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    report = inspect(folder)
    if spec is None:
        spec = _by_repository(report.repository, catalog)
    problems = [*_not_built(spec), *report.problems] or _load_problems(spec, folder, catalog)
    facts = _facts_of(report, spec, problems) | {"computes with": _computes_with(settings.device)}
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            _print_fact(name, value)
    return 1 if problems else 0


def _computes_with(device: str) -> str:
    """What runs networks here, in words; why nothing does where the device asked for is not there."""
    from services.core.modeling.cuda import ops as cuda
    from services.core.modeling.device import choose_device
    from services.core.modeling.native.instructions import describe

    try:
        chosen = choose_device(device)
    except ValueError as error:
        return f"nothing: {error}"
    return describe() if chosen.type == "cpu" else cuda.describe(chosen)


def _folder(args: argparse.Namespace, settings: Settings, catalog: Catalog) -> tuple[Path, ModelSpec | None]:
    named = catalog.require(args.model) if args.model else None
    folder = Path(args.folder)
    if folder.is_dir():
        return folder, named or catalog.get(folder.resolve().name)
    spec = catalog.get(args.folder)
    if spec is None:
        raise CatalogError(f"'{args.folder}' is neither a folder nor a model of the catalogue.")
    if sentences := _not_built(named or spec):
        raise WeightsNotFound(*sentences)
    return locate(spec, settings), named or spec


def _by_repository(repository: str, catalog: Catalog) -> ModelSpec | None:
    return next(
        (spec for spec in catalog.models.values() if repository and spec.repository == repository), None
    )


def _not_built(spec: ModelSpec | None) -> list[str]:
    if spec is None or spec.family.built:
        return []
    return [f"{spec.id} cannot be loaded: this version has no network of its family '{spec.family}' yet."]


def _load_problems(spec: ModelSpec | None, folder: Path, catalog: Catalog) -> list[str]:
    """Why the weights do not load, found by loading them on the CPU; empty if they do."""
    import torch

    from services.core.modeling.checkpoints.checkpoint import CheckpointError
    from services.core.modeling.device import choose_dtype
    from services.core.modeling.registry import load_network, recognised

    try:
        if spec is None:
            return [_which(recognised(folder), catalog)]
        cpu = torch.device("cpu")
        load_network(spec, folder, device=cpu, dtype=choose_dtype(cpu))
    except CheckpointError as error:
        return [str(error)]
    except Exception as error:  # noqa: BLE001 - whatever a foreign folder brings about is the answer
        return [f"Loading it failed unexpectedly: {type(error).__name__}: {error}"]
    return []


def _which(families: list[str], catalog: Catalog) -> str:
    likely = [spec.id for spec in catalog.models.values() if spec.family in families and not spec.alias_of]
    hint = f" By its configuration it may be one of {', '.join(likely)}." if likely else ""
    return f"It is not known which model this should be: name it with --model.{hint}"


def _facts_of(report: FolderReport, spec: ModelSpec | None, problems: list[str]) -> dict[str, Any]:
    return {
        "folder": str(report.folder),
        "origin": f"{report.repository} at {report.commit}" if report.commit else "unknown",
        "model": spec.weights_id if spec else "unknown",
        "family": spec.family.value if spec else "unknown",
        "licence": (spec.licence if spec else "") or report.licence or "unknown",
        "licence of the model card": report.licence or "not stated",
        "config": dict(report.config),
        "files": dict(report.files),
        "bytes": sum(report.files.values()),
        "tensors": report.tensors,
        "values": dict(report.values),
        "published parameters": spec.parameters if spec else "unknown",
        "loads": not problems,
        "problems": problems,
    }


def _print_fact(name: str, value: Any) -> None:
    if isinstance(value, dict):
        print(f"{name}:")
        for key, inner in value.items():
            print(f"  {key}: {inner:,}" if isinstance(inner, int) else f"  {key}: {inner}")
    elif isinstance(value, list):
        for inner in value:
            print(f"{name}: {inner}")
    elif isinstance(value, bool):
        print(f"{name}: {'yes' if value else 'no'}")
    else:
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
