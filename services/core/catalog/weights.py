"""Where a model's weights are on this machine. Nothing here opens the network or imports torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from services.core.catalog.types import ModelSpec
from services.core.settings import Settings

INDEX = "model.safetensors.index.json"


class WeightsNotFound(Exception):  # noqa: N818  (reads as what it says where it is caught)
    """No usable weights of a model on this machine; the text tells the operator what to do."""


def model_root(settings: Settings) -> Path:
    """The folder of one sub-folder per model: ``SF_MODEL_DIR``, else ``models`` in ``SF_DATA_DIR``."""
    return settings.model_dir or settings.data_dir / "models"


def locate(spec: ModelSpec, settings: Settings) -> Path:
    """The folder with the weights of ``spec``.

    Looks in ``SF_MODEL_DIR/<id>``, then in the model's Python package, then in the Hugging Face cache.
    Raises ``WeightsNotFound`` if none has them, or if the first that exists lacks files: an operator who
    put a folder there means that one.
    """
    for where, find in _places(spec, settings):
        folder = find()
        if folder is None:
            continue
        if lacking := missing_files(folder):
            raise WeightsNotFound(
                f"The weights of {spec.weights_id} in {folder} ({where}) are not whole: "
                f"{', '.join(lacking)} missing. {pickle_note(folder)}{_remedy(spec, settings)}"
            )
        return folder
    raise WeightsNotFound(f"There are no weights of {spec.weights_id} here. {_remedy(spec, settings)}")


def place(spec: ModelSpec, settings: Settings) -> str:
    """Where ``locate`` would find the weights, in a word or two; empty if nowhere."""
    for where, find in _places(spec, settings):
        folder = find()
        if folder is not None:
            return where if not missing_files(folder) else f"{where} (not whole)"
    return ""


def missing_files(folder: Path) -> list[str]:
    """Names of files that any model needs and ``folder`` lacks: configuration, tokeniser, every shard."""
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    if not (folder / "tokenizer.json").is_file():
        lacking.append("tokenizer.json")
    if (folder / "model.safetensors").is_file():
        return lacking
    if not (folder / INDEX).is_file():
        return [*lacking, "model.safetensors"]
    return [*lacking, *(name for name in shards(folder) if not (folder / name).is_file())]


def pickle_note(folder: Path) -> str:
    """A sentence on weights in ``folder`` that are there as pickles only; empty if there are none."""
    found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if not found or any(folder.glob("*.safetensors")):
        return ""
    return f"{', '.join(found)} is not read: a pickle can run code of its author's when it is opened. "


def shards(folder: Path) -> list[str]:
    """File names that ``model.safetensors.index.json`` spreads the tensors over, sorted."""
    try:
        index: Any = json.loads((folder / INDEX).read_bytes())
        weight_map = cast("Mapping[str, Any]", index["weight_map"])
        return sorted({str(name) for name in weight_map.values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsNotFound(f"{folder / INDEX} is not an index of safetensors files.") from error


def _places(spec: ModelSpec, settings: Settings) -> Iterator[tuple[str, Callable[[], Path | None]]]:
    own = model_root(settings) / spec.weights_id
    yield "model folder", lambda: own if own.is_dir() else None
    yield "package", lambda: _packaged(spec)
    yield "Hugging Face cache", lambda: _cached(spec)


def _packaged(spec: ModelSpec) -> Path | None:
    # find_spec does not run the package, whose import would pull in sentence-transformers.
    found = find_spec(spec.package) if spec.package else None
    for location in (found.submodule_search_locations if found else None) or ():
        folder = Path(location) / "model"
        if folder.is_dir():
            return folder
    return None


def _cached(spec: ModelSpec) -> Path | None:
    if not spec.repository:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.repository, "config.json", revision=spec.revision)
    return Path(found).parent if isinstance(found, str) else None


def _remedy(spec: ModelSpec, settings: Settings) -> str:
    folder = model_root(settings) / spec.weights_id
    if not spec.repository:
        return f"None are published: put a copy that you own into {folder}."
    return f"Fetch them with 'search-foundation models pull {spec.weights_id}', or put them into {folder}."
