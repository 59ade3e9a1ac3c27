"""Shared by the catalogue's tests: the fake hub, a tiny set of model files, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.catalog.fake_hub import FakeHub, running_hub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as running:
        yield running


def tiny_files(values: int = 64) -> dict[str, bytes]:
    """Files of the least model a folder can hold; ``values`` floats of weights."""
    weights = np.arange(values, dtype=np.float32).reshape(-1, 8)
    return {
        "config.json": json.dumps({"model_type": "bert", "hidden_size": 8}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": save({"embeddings.weight": weights}),
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@dataclass
class Command:
    """Runs ``search-foundation models`` as a user does."""

    variables: dict[str, str]

    def start(self, *words: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SF_", "HF_"))}
        return subprocess.Popen(
            [sys.executable, "-m", "search_foundation.cli", "models", *words],
            env=kept | self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        with self.start(*words) as process:
            out, err = process.communicate(timeout=180)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture
def command(tmp_path: Path, hub: FakeHub) -> Command:
    return Command(
        {
            "SF_MODEL_DIR": str(tmp_path / "models"),
            "SF_DATA_DIR": str(tmp_path / "data"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
        }
    )
