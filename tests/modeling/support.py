"""What the tests of several families share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (1, 2, 63, 64, 65, 512)
LONG = 2000


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def random_ids(length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + length).integers(0, vocabulary, length, dtype=np.int32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
