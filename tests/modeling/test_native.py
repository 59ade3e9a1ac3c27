"""The compiled kernels of each instruction set: threads, guarded memory, and what happens without them."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from services.core.modeling.layers.attention import attention
from services.core.modeling.layers.lora import add_low_rank
from services.core.modeling.layers.packed import Limits, pack
from services.core.modeling.native import encoder as native
from services.core.modeling.native import library, ops
from services.core.modeling.native.instructions import InstructionSet
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.checkpoints import minilm_directory, minilm_spec
from tests.modeling.conftest import SETS

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=DTYPES, ids=str)
def minilm(request: pytest.FixtureRequest, kernels: InstructionSet) -> TextEncoder:
    return load_text_encoder(
        minilm_spec(), minilm_directory(), device=torch.device("cpu"), dtype=request.param
    )


def items(lengths: list[int]) -> list[EncodeItem]:
    chance = np.random.default_rng(sum(lengths))
    return [EncodeItem(chance.integers(1000, 30000, length, dtype=np.int32)) for length in lengths]


def run(encoder: TextEncoder, batch: list[EncodeItem], threads: int) -> np.ndarray:
    torch.set_num_threads(threads)
    return np.stack([np.asarray(v) for v in encoder.forward(batch)])


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing_in_the_result(minilm: TextEncoder) -> None:
    for lengths in ([1], [16], [49], [130], [3, 7, 7, 60, 100]):
        batch = items(lengths)
        alone = run(minilm, batch, 1)
        for threads in (2, 5):
            np.testing.assert_array_equal(run(minilm, batch, threads), alone)


@pytest.mark.usefixtures("threads")
def test_calls_at_once_share_the_helpers(minilm: TextEncoder) -> None:
    batches = [items([1 + 17 * i % 60, 40, 5]) for i in range(12)]
    wanted = [run(minilm, batch, 1) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: run(minilm, batch, 3), batches))
    for ours, alone in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(ours, alone)


@pytest.mark.usefixtures("threads", "kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_threads_changes_nothing(cpu: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(237, 3 * 6, 32, generator=generator).to(dtype).split(6, dim=1)
    batch = pack([EncodeItem(np.zeros(n, np.int32)) for n in (1, 36, 200)], cpu, Limits(1, 200))
    torch.set_num_threads(1)
    alone = attention(query, key, value, batch)
    torch.set_num_threads(4)
    assert torch.equal(attention(query, key, value, batch), alone)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("rows", "into", "out", "rank"),
    [(1, 16, 16, 1), (3, 24, 7, 4), (9, 33, 100, 5), (4, 64, 48, 64), (6, 8, 8, 70)],
)
def test_an_adapter_adds_what_float64_adds(
    rows: int, into: int, out: int, rank: int, gelu: bool, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, down, up, y = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, into), (rank, into), (rank, out), (rows, out))
    )
    up *= (into * rank) ** -0.5
    wanted = y.double() + x.double() @ down.double().T @ up.double()
    if gelu:
        wanted = torch.nn.functional.gelu(wanted)
    add_low_rank(x, down, up, y, gelu=gelu)
    np.testing.assert_allclose(y.double(), wanted, atol=tolerance, rtol=tolerance / 2)


def _guarded(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.modeling.guarded", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def fenced() -> subprocess.CompletedProcess[str]:
    """One process that runs the kernels of every set, one after the other."""
    return _guarded(*SETS)


def test_no_kernel_touches_memory_outside_of_its_buffers(
    kernels: InstructionSet, fenced: subprocess.CompletedProcess[str]
) -> None:
    runs = dict(line.split() for line in fenced.stdout.splitlines())
    assert int(runs.get(kernels, 0)) > 100, f"ended with {fenced.returncode}: {fenced.stderr[-2000:]}"
    assert _guarded("overrun", kernels).returncode == -signal.SIGSEGV


def test_structs_have_in_python_the_size_that_they_have_in_c(kernels: InstructionSet) -> None:
    loaded = library.load(kernels)
    assert loaded is not None
    library.check_sizes(loaded, attention=ops._Attention)
    with pytest.raises(RuntimeError, match="struct linear has"):
        library.check_sizes(loaded, linear=ops._Attention)


def test_memory_of_states_is_used_again_by_its_thread_alone() -> None:
    states = library.States(8, torch.float32)
    first, larger = states.rows(10), states.rows(60)
    assert (first.shape, larger.shape) == ((10, 8), (60, 8))
    assert larger.data_ptr() == first.data_ptr() == states.rows(1).data_ptr()
    assert states.rows(65).data_ptr() == states.rows(3).data_ptr() != first.data_ptr()
    assert library.States(8, torch.float32).rows(3).data_ptr() != states.rows(3).data_ptr()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: states.rows(3)).result().data_ptr() != states.rows(3).data_ptr()
    # What is too large to be kept is nobody's twice.
    most = library._KEPT_BYTES // (8 * 4)
    kept, one, another = states.rows(most), states.rows(most + 1), states.rows(most + 1)
    assert len({kept.data_ptr(), one.data_ptr(), another.data_ptr()}) == 3
    assert states.rows(most).data_ptr() == kept.data_ptr()


def test_fp32_beside_products_of_bf16_takes_the_set_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "current", lambda: InstructionSet.AMX)
    monkeypatch.setattr(library, "load", lambda name: name)
    assert library.library(torch.float32) is InstructionSet.AVX512
    assert library.passes(torch.float32) is InstructionSet.AVX512
    assert library.library(torch.bfloat16) is InstructionSet.AMX
    assert library.passes(torch.bfloat16) is None
    assert library.library(torch.float16) is None


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_kernels_do_not_take_is_left_to_torch(cpu: torch.device, dtype: torch.dtype) -> None:
    assert native.serves(384, 1536, 12, 6, cpu, dtype)
    assert not native.serves(384, 1536, 12, 6, torch.device("cuda"), dtype)
    assert not native.serves(384, 1537, 12, 6, cpu, dtype)
    assert not native.serves(48, 64, 16, 6, cpu, dtype)
    assert not native.serves(384, 1536, 12, 6, cpu, torch.float16)
