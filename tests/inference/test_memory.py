"""A model that does not fit is refused before it is loaded."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY
from safetensors.torch import load_file, save_file

from services.core.catalog import Catalog
from services.core.inference import Engine, EngineStartError, memory
from services.core.inference.memory import Budget, free_bytes, held_bytes, total_bytes, weight_bytes
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families import jina_vlm
from services.core.modeling.families.decoder import decoder_shapes, linear_sizes
from services.core.modeling.families.decoder_config import EUROBERT, DecoderConfig
from tests.checkpoints import minilm_directory
from tests.decoder_checkpoints import write_served
from tests.inference.support import running, settings
from tests.modeling.support import config_of
from tests.vlm_checkpoints import write_vlm

NANO = "jina-embeddings-v5-text-nano"
CPU = torch.device("cpu")


async def test_the_engine_says_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    write_served(tmp_path, NANO)
    with pytest.raises(EngineStartError) as refused:
        await Engine.start(settings(models=(NANO,), model_dir=tmp_path), Catalog.load())
    assert f"{NANO} takes 0.00 GiB for weights in float32" in str(refused.value)
    assert "0.00 GiB of main memory are free" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_with_their_adapters(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_served(tmp_path, NANO)
    config = DecoderConfig.read(config_of(folder), EUROBERT)
    base = sum(torch.Size(shape).numel() for shape in decoder_shapes(config).values())
    adapters = 4 * sum(4 * (out + into) for out, into in linear_sizes(config).values())
    changed = sum(out * into for out, into in linear_sizes(config).values())
    assert weight_bytes(folder, dtype) == dtype.itemsize * (base + adapters)
    assert weight_bytes(folder, dtype, merged=True) == dtype.itemsize * (base + adapters + changed)
    assert weight_bytes(minilm_directory(), dtype) // dtype.itemsize == pytest.approx(22_713_216, rel=0.001)


def test_weights_that_stay_bf16_are_counted_so(tmp_path: Path) -> None:
    write_vlm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    decoder = sum(t.numel() for name, t in tensors.items() if name.startswith(jina_vlm.DECODER))
    others = sum(t.numel() for t in tensors.values()) - decoder
    assert min(decoder, others) > 0
    assert weight_bytes(tmp_path, torch.float32, narrow=jina_vlm.DECODER) == 2 * decoder + 4 * others
    assert weight_bytes(tmp_path, torch.bfloat16, narrow=jina_vlm.DECODER) == 2 * (decoder + others)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert weight_bytes(tmp_path, torch.float32, narrow=jina_vlm.DECODER) == 4 * (decoder + others)


async def test_says_what_the_device_has_and_the_process_holds() -> None:
    def value(name: str) -> float:
        return REGISTRY.get_sample_value(f"searchfoundation_device_memory_{name}", {"device": "cpu"}) or 0.0

    async with running():
        assert value("total_bytes") == total_bytes(CPU)
        assert 1 << 20 < value("bytes") < value("total_bytes")
    before = held_bytes(CPU)
    # Not by an allocator, which may have had that much to spare, and may keep it.
    with mmap.mmap(-1, 64 << 20) as grown:
        grown.write(bytes(len(grown)))
        assert held_bytes(CPU) - before > 32 << 20


def test_the_budget_is_a_part_of_what_is_free_and_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(memory, "total_bytes", lambda _: 1200)
    assert Budget(CPU, torch.float32).limit == 900
    assert Budget(CPU, torch.float32, processes=2).limit == 540
    monkeypatch.setattr(memory, "free_bytes", lambda _: 500)
    assert Budget(CPU, torch.float32, processes=2).limit == 450
    budget = Budget(CPU, torch.float32, 2000)
    assert budget.limit == 2000
    assert [budget.lacks(size) for size in (500, 501)] == [False, True]
    budget.booked = 1600
    assert [budget.lacks(size) for size in (400, 401)] == [False, True]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        weight_bytes(tmp_path, torch.float32)


def test_the_smaller_of_machine_and_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_bytes(CPU) is None
    assert total_bytes(CPU) is None
    meminfo.write_text("MemTotal: 4096 kB\nMemAvailable:    1000 kB\n")
    assert free_bytes(CPU) == 1000 << 10
    assert total_bytes(CPU) == 4096 << 10
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 1000 << 10
    assert total_bytes(CPU) == 4096 << 10
    (tmp_path / "memory.max").write_text("500000\n")
    assert total_bytes(CPU) == 500000
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert free_bytes(CPU) == 150000
    (tmp_path / "memory.current").write_text("700000\n")
    assert free_bytes(CPU) == 0
