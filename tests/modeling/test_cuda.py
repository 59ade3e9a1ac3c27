"""Every text family on CUDA beside fp32 on the CPU, tasks and lengths mixed in one batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from services.core.catalog import Catalog
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, SparseVector
from tests.modeling.support import config_of, cosine, random_ids
from tests.text_checkpoints import FAMILIES, write_model

LENGTHS = (65, 1, 500, 7, 64, 7, 2, 300, 63, 33)


def results(folder: Path, model: str, device: torch.device, dtype: torch.dtype) -> list[np.ndarray]:
    spec = Catalog.load().require(model)
    network = load_network(spec, folder, device=device, dtype=dtype)
    network.warm_up()
    adapters = (None, *spec.adapters.values())
    items = [
        EncodeItem(random_ids(length, config_of(folder)["vocab_size"], i), adapters[i % len(adapters)])
        for i, length in enumerate(LENGTHS)
    ]
    return [flat(each, config_of(folder)["vocab_size"]) for each in network.forward(items)]  # type: ignore[union-attr]


def flat(result: object, vocabulary: int) -> np.ndarray:
    """Any kind of result as one vector; of a score, the side of the logit too."""
    if isinstance(result, SparseVector):
        dense = np.zeros(vocabulary, np.float32)
        dense[result.indices] = result.values
        return dense
    return np.array([result, 1 - result]) if isinstance(result, float) else np.ravel(np.asarray(result))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99999), (torch.bfloat16, 0.999)])
@pytest.mark.parametrize("model", FAMILIES)
def test_cuda_gives_what_the_cpu_gives(tmp_path: Path, model: str, dtype: torch.dtype, least: float) -> None:
    folder = write_model(tmp_path, model)
    wanted = results(folder, model, torch.device("cpu"), torch.float32)
    found = results(folder, model, torch.device("cuda"), dtype)
    assert [each.shape for each in found] == [each.shape for each in wanted]
    assert min(cosine(a, b) for a, b in zip(found, wanted, strict=True) if a.any() and b.any()) > least
