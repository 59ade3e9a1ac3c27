"""Reading a checkpoint directory: safetensors only, and every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

Shape = tuple[int, ...]
Config = Mapping[str, Any]

_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_NAMED_AT_MOST = 8


class CheckpointError(Exception):
    """A checkpoint that cannot be served; the message names the file and what is wrong with it."""


class Checkpoint:
    """The configuration and tensors of one directory.

    Opening reads headers only. A loader first calls ``verify`` with everything it will use, then reads
    tensor by tensor, so that no more than one fp32 copy exists beside the model.
    """

    def __init__(self, directory: Path) -> None:
        """Open ``directory``. CheckpointError if a file is missing, broken or not safetensors."""
        self.directory = directory
        self.config: Config = read_json(directory / "config.json")
        self._files = {path: _open(path) for path in _weight_files(directory)}
        self._where: dict[str, tuple[Path, str]] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                if name in self._where:
                    raise CheckpointError(f"{path}: tensor '{name}' is in {self._where[name][0].name} too")
                self._where[name] = path, name

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, with the changes that were made to them."""
        return frozenset(self._where)

    def strip_prefix(self, prefix: str) -> None:
        """Leave ``prefix`` out of every name that has it, if any has; e.g. ``bert.``.

        CheckpointError if a tensor is there under both names.
        """
        self.rename({prefix: ""})

    def rename(self, prefixes: Mapping[str, str]) -> None:
        """Put another beginning in place of the first of ``prefixes`` that a name has, for every name.

        CheckpointError if two tensors then have one name.
        """
        renamed: dict[str, tuple[Path, str]] = {}
        twice: list[str] = []
        for name, where in self._where.items():
            prefix = next((each for each in prefixes if name.startswith(each)), None)
            new = name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)
            if new in renamed:
                twice.append(new)
            renamed[new] = where
        if twice:
            what = f"tensors with and without {', '.join(map(repr, prefixes))}"
            raise CheckpointError(f"{self.directory}: {'; '.join(_complaint(what, sorted(twice)))}")
        self._where = renamed

    def verify(self, expected: Mapping[str, Shape], *, unused: Sequence[str] = ()) -> None:
        """Check that exactly the ``expected`` names are there, in those shapes.

        ``unused`` are patterns (``pooler.*``) of tensors that may be there and are not served.
        CheckpointError lists what is missing, left over or of the wrong shape.
        """
        names = self.names
        missing = sorted(expected.keys() - names)
        left_over = sorted(
            name for name in names - expected.keys() if not any(fnmatchcase(name, p) for p in unused)
        )
        wrong = [self._wrong(name, shape) for name, shape in sorted(expected.items()) if name in names]
        complaints = [
            *_complaint("missing tensors", missing),
            *_complaint("tensors that this network does not know", left_over),
            *_complaint("tensors of the wrong kind", [text for text in wrong if text]),
        ]
        if complaints:
            raise CheckpointError(f"{self.directory}: {'; '.join(complaints)}")

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor on the CPU as ``dtype`` (that of the file by default).

        Always a copy: a tensor that shared the file's mapping would keep the whole file in memory.
        """
        path, full = self._locate(name)
        try:
            tensor = cast(torch.Tensor, self._files[path].get_tensor(full))
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot read '{full}': {error}") from error
        return tensor.to(dtype or tensor.dtype, copy=True)

    def _wrong(self, name: str, shape: Shape) -> str | None:
        path, full = self._locate(name)
        header = self._files[path].get_slice(full)
        found = tuple(header.get_shape())
        if found != shape:
            return f"{name} is {list(found)} and should be {list(shape)}"
        return None if header.get_dtype() in _FLOATS else f"{name} holds {header.get_dtype()}"

    def _locate(self, name: str) -> tuple[Path, str]:
        if name not in self._where:
            raise CheckpointError(f"{self.directory}: no tensor '{name}'")
        return self._where[name]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. CheckpointError if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return cast(dict[str, Any], value)


def require(config: Config, name: str, kind: type, *, source: str = "config.json") -> Any:
    """Return ``config[name]``; JSON may write a float as an integer. CheckpointError if it is no ``kind``."""
    value = config.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise CheckpointError(f"{source}: '{name}' must be a {kind.__name__}, found {value!r}")
    return value


def positive(config: Config, name: str, default: int | None = None) -> int:
    """Return a whole number of config.json, or else ``default``. CheckpointError if it is below 1."""
    value = require({name: default, **config}, name, int)
    if value < 1:
        raise CheckpointError(f"config.json: '{name}' must be at least 1")
    return value


def _weight_files(directory: Path) -> Iterable[Path]:
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        raise CheckpointError(f"{directory}: no model.safetensors{_instead(directory)}")
    shards = require(read_json(index), "weight_map", dict, source=index.name)
    files = sorted({str(name) for name in shards.values()})
    if any(Path(name).name != name for name in files):
        raise CheckpointError(f"{index}: a shard lies outside the directory")
    if lacking := [name for name in files if not (directory / name).is_file()]:
        raise CheckpointError(f"{index}: it names {', '.join(lacking)}, which the directory does not have")
    return [directory / name for name in files]


def _instead(directory: Path) -> str:
    """Say why weights in another format are not read, where there are some."""
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return "; other weight formats are not read"
    return f"; {', '.join(pickles)} is not read: a pickle can run code of its author's when it is opened"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error


def _complaint(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:_NAMED_AT_MOST])
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return [f"{what}: {shown}{more}"]
