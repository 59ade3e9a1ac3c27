"""Steps of a decoder that answers: the compiled form beside torch's, its threads, its company."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from services.core.modeling.layers.causal import (
    BLOCK,
    CausalForm,
    CausalLayer,
    CausalWeights,
    Chunk,
    Dense,
    TorchCausal,
)
from services.core.modeling.native.causal import FusedCausal, keeps_bf16, serves
from services.core.modeling.native.instructions import InstructionSet
from tests.checkpoints import Random

CPU = torch.device("cpu")
FORM = CausalForm(
    width=192,
    layers=2,
    heads=6,
    key_heads=2,
    head_dim=40,
    inner=600,
    vocabulary=777,
    positions=500,
    epsilon=1e-6,
    rotary_base=1e4,
)


def weights(dtype: torch.dtype = torch.float32) -> CausalWeights:
    """Make numbers that ``dtype`` holds."""
    random, f = Random(gain=1.0), FORM
    normal, matrix = random.normal, random.matrix
    random.normal = lambda *shape, scale=1.0: normal(*shape, scale=scale).to(dtype).float()  # type: ignore[method-assign]
    random.matrix = lambda out, into: matrix(out, into).to(dtype).float()  # type: ignore[method-assign]
    heads = (f.heads + 2 * f.key_heads) * f.head_dim

    def layer() -> CausalLayer:
        return CausalLayer(
            attention_norm=1 + random.normal(f.width, scale=0.2),
            joined=Dense(random.matrix(heads, f.width), random.normal(heads, scale=0.2)),
            attended=Dense(random.matrix(f.width, f.heads * f.head_dim)),
            inner_norm=1 + random.normal(f.width, scale=0.2),
            gate=random.matrix(f.inner, f.width),
            up=random.matrix(f.inner, f.width),
            down=random.matrix(f.width, f.inner),
            query_norm=1 + random.normal(f.head_dim, scale=0.2),
            key_norm=1 + random.normal(f.head_dim, scale=0.2),
        )

    words, head = random.normal(f.vocabulary + 9, f.width), random.matrix(f.vocabulary, f.width)
    return CausalWeights(f, words, [layer() for _ in range(f.layers)], 1 + random.normal(f.width), head)


def conversation(network: FusedCausal | TorchCausal) -> list[torch.Tensor]:
    """Logits of three sequences that come one after the other and go on together."""
    chance = np.random.default_rng(0)
    network.open_cache(16)
    tables = [np.array(blocks, np.int32) for blocks in ([3, 9, 0, 1], [15, 2], [7, 8, 5, 4, 6])]
    ids = [chance.integers(0, FORM.vocabulary, 300).astype(np.int32) for _ in tables]
    logits = [network.step([Chunk(ids[0][:150], 0, tables[0])])]
    logits.append(
        network.step([Chunk(ids[0][150:151], 150, tables[0]), Chunk(ids[1][:63], 0, tables[1], asks=False)])
    )
    states = torch.from_numpy(chance.normal(size=(20, FORM.width)).astype(np.float32))
    for step in range(3):
        logits.append(
            network.step(
                [
                    Chunk(ids[1][63 + step : 64 + step], 63 + step, tables[1]),
                    Chunk(ids[0][151 + step : 152 + step], 151 + step, tables[0]),
                    Chunk(
                        ids[2][100 * step : 100 * step + 100], 100 * step, tables[2], states=((70, states),)
                    ),
                ]
            )
        )
    return logits


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_compiled_steps_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    if not serves(FORM, CPU, dtype):
        pytest.skip("torch runs this dtype faster with this instruction set")
    ours = conversation(FusedCausal(weights(dtype), dtype))
    theirs = conversation(TorchCausal(weights(dtype), CPU, torch.float32))
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0.05)


@pytest.mark.usefixtures("kernels")
def test_weights_in_bf16_stay_so_and_give_what_they_give_in_fp32() -> None:
    if not keeps_bf16(CPU, torch.float32):
        pytest.skip("these kernels multiply bf16 alone")
    wide = weights(torch.bfloat16)
    narrow = dataclasses.replace(
        wide,
        words=wide.words.bfloat16(),
        head=wide.head.bfloat16(),
        layers=[
            dataclasses.replace(
                layer,
                joined=Dense(layer.joined.weight.bfloat16(), layer.joined.bias),
                attended=Dense(layer.attended.weight.bfloat16()),
                gate=layer.gate.bfloat16(),
                down=layer.down.bfloat16(),
            )
            for layer in wide.layers
        ],
    )
    ours = conversation(FusedCausal(narrow, torch.float32))
    for one, other in zip(ours, conversation(FusedCausal(wide, torch.float32)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("kernels", "threads")
def test_neither_threads_nor_company_nor_chunks_change_a_bit() -> None:
    network = FusedCausal(weights(), torch.float32)
    torch.set_num_threads(1)
    alone = conversation(network)
    torch.set_num_threads(3)
    for one, other in zip(conversation(network), alone, strict=True):
        assert torch.equal(one, other)
    ids, table = np.arange(170, dtype=np.int32) * 3, np.array([1, 0, 2], np.int32)
    network.open_cache(9)
    whole = network.step([Chunk(ids, 0, table)])
    for size in (1, 7, BLOCK, 100):
        network.open_cache(9)
        for start in range(0, len(ids), size):
            other = Chunk(ids[start : start + 5], start, table + 3, asks=False)
            parts = network.step([other, Chunk(ids[start : start + size], start, table)])
        assert torch.equal(parts, whole)


def test_shared_blocks_are_read_by_all(backend: InstructionSet) -> None:
    network = TorchCausal(weights(), CPU, torch.float32)
    if backend is not InstructionSet.TORCH:
        network = FusedCausal(weights(), torch.float32)
    ids = np.arange(100, dtype=np.int32)
    network.open_cache(4)
    first = network.step([Chunk(ids, 0, np.array([0, 1], np.int32))])
    again = network.step([Chunk(ids[BLOCK:], BLOCK, np.array([0, 2], np.int32))])
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)
