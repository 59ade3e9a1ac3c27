"""What a folder of weights holds, told without loading any: configuration, files, tensors, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from services.core.catalog.headers import BrokenFileError, TensorInfo, read_header, totals
from services.core.catalog.pull import RECORD
from services.core.catalog.weights import WeightsNotFound, missing_files, pickle_note

CONFIG_FACTS = (
    "model_type",
    "architectures",
    "position_embedding_type",
    "feed_forward_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "lora_adaptations",
    "task_names",
)
"""Fields of config.json that tell the families apart or their size."""


@dataclass(frozen=True, slots=True)
class FolderReport:
    """``problems`` are sentences; a folder without any may still not load (see ``core.modeling``)."""

    folder: Path
    repository: str
    commit: str
    config: Mapping[str, Any]
    files: Mapping[str, int]
    tensors: int
    values: Mapping[str, int]
    licence: str
    problems: tuple[str, ...]


def inspect(folder: Path) -> FolderReport:
    """Read what ``folder`` holds: sizes in bytes, number of tensors, values by dtype."""
    problems: list[str] = []
    tensors = _headers(folder, problems)
    record = _object(folder / RECORD, problems)
    return FolderReport(
        folder=folder,
        repository=str(record.get("repository", "")),
        commit=str(record.get("commit", "")),
        config=_config(folder, problems),
        files=_files(folder),
        tensors=len(tensors),
        values=totals(tensors),
        licence=str(record.get("licence") or _card_licence(folder)),
        problems=(*_lacking(folder), *problems),
    )


def _headers(folder: Path, problems: list[str]) -> tuple[TensorInfo, ...]:
    tensors: list[TensorInfo] = []
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            tensors += read_header(path)
        except BrokenFileError as error:
            problems.append(str(error))
    return tuple(tensors)


def _config(folder: Path, problems: list[str]) -> Mapping[str, Any]:
    config = _object(folder / "config.json", problems)
    return {name: config[name] for name in CONFIG_FACTS if config.get(name) is not None}


def _object(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path} is not a JSON object.")
        return {}
    return cast("dict[str, Any]", value)


def _files(folder: Path) -> Mapping[str, int]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.stat().st_size for path in found}


def _lacking(folder: Path) -> tuple[str, ...]:
    try:
        lacking = tuple(f"{name} is missing." for name in missing_files(folder))
    except WeightsNotFound as error:
        return (str(error),)
    note = pickle_note(folder).strip()
    return (*lacking, note) if note else lacking


def _card_licence(folder: Path) -> str:
    """The licence named in the front matter of a model card; empty if there is none."""
    try:
        card = (folder / "README.md").read_text("utf-8")
    except OSError:
        return ""
    parts = card.split("---\n", 2)
    if parts[0].strip() or len(parts) < 3:
        return ""
    try:
        matter: Any = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return ""
    return str(cast("dict[str, Any]", matter).get("license") or "") if isinstance(matter, dict) else ""
