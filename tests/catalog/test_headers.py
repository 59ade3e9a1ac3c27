"""Reading safetensors headers and folders without loading tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from services.core.catalog.folder import inspect
from services.core.catalog.headers import BrokenFileError, read_header, totals
from tests.catalog.conftest import tiny_files, write_files


def file_of(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(first: int, last: int, *shape: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def test_a_header_gives_names_dtypes_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": np.zeros((2, 3), np.float32),
        "b": np.zeros(4, np.float16),
        "c": np.array(1.0, np.float32),
    }
    path.write_bytes(save(tensors, {"format": "pt"}))
    found = read_header(path)
    assert {(t.name, t.dtype, t.shape) for t in found} == {
        ("a", "F32", (2, 3)),
        ("b", "F16", (4,)),
        ("c", "F32", ()),
    }
    assert totals(found) == {"F32": 7, "F16": 4}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "too short"),
        (b"PK\x03\x04" + bytes(60), "header cannot be read"),
        (b"\xff" * 16, "not a safetensors file"),
        (struct.pack("<Q", 4) + b"nope", "header cannot be read"),
        (file_of({"a": tensor(0, 8, 2)}, bytes(7)), "its header says"),
        (file_of({"a": tensor(0, 8, 2)}, bytes(9)), "its header says"),
        (file_of({"a": tensor(0, 8, 3)}, bytes(8)), "tensor 'a' does not fit"),
        (file_of({"a": tensor(0, 8, 2), "b": tensor(4, 12, 2)}, bytes(12)), "tensor 'b' does not fit"),
        (file_of({"a": tensor(0, 8, 2, dtype="F31")}, bytes(8)), "header cannot be read"),
        (file_of({"a": {"dtype": "F32"}}, bytes(8)), "header cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BrokenFileError, match=complaint) as broken:
        read_header(path)
    assert str(path) in str(broken.value)


def test_a_folder_is_told_without_loading(tmp_path: Path) -> None:
    report = inspect(write_files(tmp_path, tiny_files()))
    assert report.config == {"model_type": "bert", "hidden_size": 8}
    assert (report.tensors, report.values, report.licence) == (1, {"F32": 64}, "apache-2.0")
    assert set(report.files) == set(tiny_files())
    assert report.problems == ()


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    files = tiny_files()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    report = inspect(write_files(tmp_path, files))
    assert report.problems == ("model-00002-of-00002.safetensors is missing.",)


def test_broken_files_are_problems_of_the_folder(tmp_path: Path) -> None:
    files = tiny_files() | {"config.json": b"[]"}
    files["model.safetensors"] = files["model.safetensors"][:-1]
    config, weights = sorted(inspect(write_files(tmp_path, files)).problems)
    assert "config.json is not a JSON object" in config + weights
    assert "its header says" in config + weights


def test_weights_that_are_a_pickle_are_told_why_not(tmp_path: Path) -> None:
    files = tiny_files()
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    report = inspect(write_files(tmp_path, files))
    assert report.problems == (
        "model.safetensors is missing.",
        "pytorch_model.bin is not read: a pickle can run code of its author's when it is opened.",
    )
