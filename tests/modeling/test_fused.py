"""The kernels for CUDA against their plain forms: compiled where there is a GPU, else interpreted.

Without a GPU one test runs all others again in a process of its own, in which Triton interprets the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from services.core.catalog import Catalog
from services.core.modeling.cuda import frames, ops
from services.core.modeling.cuda.ops import Rows, Tile
from services.core.modeling.cuda.recording import NotRecordedError
from services.core.modeling.families import encoder
from services.core.modeling.layers import pooling
from services.core.modeling.layers.attention import alibi_slopes
from services.core.modeling.layers.linear import FusedLinear
from services.core.modeling.layers.merged import Merges
from services.core.modeling.layers.packed import (
    AdapterRun,
    Frame,
    Limits,
    PackedBatch,
    host_numbers,
    lay_out,
    place,
)
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.native import instructions
from services.core.modeling.native.instructions import InstructionSet
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem
from tests.decoder_checkpoints import write_served
from tests.modeling.support import config_of, cosine, random_ids
from tests.modeling.test_cuda import flat
from tests.text_checkpoints import FAMILIES, write_model

COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WITHIN = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Two units in the last place at 1; the interpreter cuts bf16 off where a GPU rounds."""

DECODERS = ("jina-embeddings-v5-text-nano", "jina-embeddings-v5-text-small", "jina-reranker-v3")
FORMS_OF_NETWORKS = (
    "jina-embeddings-v2-base-code",
    "jina-embeddings-v3",
    "jina-colbert-v1-en",
    "jina-embeddings-v5-text-small",
    "jina-reranker-v3",
)
"""What the interpreter runs: a model of each form that the kernels meet."""


kernel = pytest.mark.skipif(
    not (COMPILED or ops.INTERPRETED), reason="no CUDA device, and Triton does not interpret here"
)


@pytest.mark.skipif(COMPILED or ops.INTERPRETED, reason="the kernels run in this process")
@pytest.mark.timeout(1_200)
def test_everything_below_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_without_triton_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    ops.available.cache_clear()
    try:
        assert not ops.serves_device(torch.device("cuda"))
        assert not ops.serves_device(torch.device("cuda"))
        assert [record.message for record in caplog.records] == [
            "triton is not installed: on CUDA all models run on torch alone, which is slower"
        ]
    finally:
        ops.available.cache_clear()


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the compiled kernels would take the place of what is tested here."""
    monkeypatch.setattr(instructions._chosen, "instructions", InstructionSet.TORCH)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def batch_of(lengths: Sequence[int], attended: Sequence[int | None] = ()) -> PackedBatch:
    seen = dict(enumerate(attended))
    items = [EncodeItem(np.ones(n, np.int32), attended=seen.get(i)) for i, n in enumerate(lengths)]
    return place(lay_out(items, Limits(10, 1 << 20)), DEVICE)


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: PackedBatch,
    attended: Sequence[int],
    *,
    causal: bool,
    window: int | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Item by item, with a dense bias, in fp64."""
    groups, start, parts = query.shape[1] // key.shape[1], 0, []
    for length, visible in zip(batch.lengths, attended, strict=True):
        q, k, v = (t[start : start + length].double().transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) * query.shape[2] ** -0.5
        place = torch.arange(length, device=query.device)
        behind = place[:, None] - place
        if slopes is not None:
            scores = scores - slopes.double()[:, None, None] * behind.abs()
        hidden = place[None] >= visible
        if causal:
            hidden = hidden | (behind < 0)
        if window is not None:
            hidden = hidden | (behind >= window)
        parts.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(parts)


FORMS = {
    "both ways": (False, None, False),
    "causal": (True, None, False),
    "sliding": (True, 7, False),
    "alibi": (False, None, True),
    "causal alibi": (True, None, True),
}


@kernel
@pytest.mark.gpu
class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(2, 1, 24)])
    def test_is_that_of_a_dense_bias(
        self, form: str, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int
    ) -> None:
        self.check([1, 5, 33, 2], form, dtype, heads, key_heads, head_dim)

    @pytest.mark.parametrize("form", ["both ways", "alibi", "causal"])
    @pytest.mark.parametrize("lengths", [[1], [1] * 40, [200, 3, 129, 64]])
    def test_of_other_lengths(self, form: str, lengths: list[int]) -> None:
        self.check(lengths, form, torch.float32, 2, 1, 32)

    @pytest.mark.skipif(COMPILED, reason="a GPU reads in bulk wherever it can")
    @pytest.mark.parametrize("form", FORMS)
    def test_read_in_bulk(self, form: str) -> None:
        self.check([1, 5, 33, 2], form, torch.float16, 4, 2, 16, Tile(16, 16, 4, 1, bulk=True))

    def test_of_two_thousand_tokens(self) -> None:
        self.check([2_000, 1], "alibi", torch.float32, 1, 1, 16, Tile(128, 128, 4, 1))

    @pytest.mark.skipif(not COMPILED, reason="for the tiles that a GPU uses")
    @pytest.mark.parametrize(
        ("form", "dtype", "head_dim"),
        [
            *((form, torch.bfloat16, head_dim) for form in FORMS for head_dim in (64, 128)),
            *(("both ways", torch.bfloat16, head_dim) for head_dim in (32, 80, 256)),
            *(("causal alibi", dtype, 64) for dtype in (torch.float16, torch.float32)),
            ("both ways", torch.float32, 128),
        ],
        ids=str,
    )
    def test_of_the_tiles_of_a_gpu(self, form: str, dtype: torch.dtype, head_dim: int) -> None:
        for lengths in ([16] * 300, [7, 64, 9, 33], [500, 1, 1_999, 64, 130, 128]):
            self.check(lengths, form, dtype, 12, 4, head_dim)

    def test_items_that_hide_their_end(self) -> None:
        lengths, attended = [32, 32, 7, 90], [32, 5, 1, 64]
        batch = batch_of(lengths, attended)
        order = sorted(range(4), key=lambda i: lengths[i])
        query, key, value = random(161, 6, 16).split((2, 2, 2), dim=1)
        assert batch.rows is not None
        found = ops.attention(query, key, value, batch.rows, longest=90)
        wanted = plain_attention(
            query, key, value, batch, [attended[i] for i in order], causal=False, window=None, slopes=None
        )
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)

    def test_a_row_that_sees_nothing_gets_zeros(self) -> None:
        query, key, value = random(20, 3, 16).split((1, 1, 1), dim=1)
        here = torch.arange(20, dtype=torch.int32, device=DEVICE)
        first = torch.where(here < 13, 0, here)
        last = torch.where(here < 13, 13, here)
        found = ops.attention(query, key, value, Rows(here, first.int(), last.int()), longest=13)
        assert not found[13:].any()
        scores = query[:13, 0] @ key[:13, 0].T * 0.25
        torch.testing.assert_close(found[:13, 0], scores.softmax(-1) @ value[:13, 0], atol=1e-5, rtol=1e-5)

    def check(
        self,
        lengths: list[int],
        form: str,
        dtype: torch.dtype,
        heads: int,
        key_heads: int,
        head_dim: int,
        cut: Tile | None = None,
    ) -> None:
        causal, window, alibi = FORMS[form]
        batch = batch_of(lengths)
        slopes = alibi_slopes(heads).to(DEVICE) if alibi else None
        joined = random(sum(lengths), heads + 2 * key_heads, head_dim, dtype=dtype)
        query, key, value = joined.split((heads, key_heads, key_heads), dim=1)
        assert batch.rows is not None
        found = ops.attention(
            query,
            key,
            value,
            batch.rows,
            longest=max(lengths),
            items=len(lengths),
            causal=causal,
            window=window,
            slopes=slopes,
            cut=cut or (Tile(16, 16, 4, 1) if ops.INTERPRETED and sum(lengths) < 100 else None),
        )
        assert found.dtype == dtype
        assert found.is_contiguous()
        wanted = plain_attention(
            query, key, value, batch, batch.lengths, causal=causal, window=window, slopes=slopes
        )
        torch.testing.assert_close(found.double(), wanted, atol=2 * WITHIN[dtype], rtol=WITHIN[dtype])


@kernel
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestRows:
    """What goes row by row."""

    @pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 96), (5, 384), (3, 1_000)])
    @pytest.mark.parametrize("adds", [False, True])
    def test_layer_norm(self, dtype: torch.dtype, rows: int, width: int, adds: bool) -> None:
        x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
        weight, bias = random(width, dtype=dtype, seed=2), random(width, dtype=dtype, seed=3)
        found = ops.layer_norm(x, weight, bias, 1e-5, residual if adds else None)
        summed = x.double() + residual.double() if adds else x.double()
        wanted = functional.layer_norm(summed, (width,), weight.double(), bias.double(), 1e-5)
        self.same(found, wanted, dtype)

    @pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 96), (3, 1_000)])
    def test_rms_norm(self, dtype: torch.dtype, rows: int, width: int) -> None:
        x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype, seed=2)
        wanted = functional.rms_norm(x.double(), (width,), weight.double(), 1e-6)
        self.same(ops.rms_norm(x, weight, 1e-6), wanted, dtype)
        self.same(ops.rms_norm(x[None], weight, 1e-6), wanted[None], dtype)

    @pytest.mark.parametrize(("queries", "keys", "head_dim"), [(4, 2, 32), (3, 3, 24), (1, 1, 2)])
    @pytest.mark.parametrize("normed", [False, True])
    def test_turn(self, dtype: torch.dtype, queries: int, keys: int, head_dim: int, normed: bool) -> None:
        positions = torch.tensor([0, 1, 7, 500, 3], device=DEVICE)
        rotation = Rotation(positions, head_dim, 10_000.0)
        joined = random(5, queries + 2 * keys, head_dim, dtype=dtype)
        gains = random(head_dim, dtype=dtype, seed=1), random(head_dim, dtype=dtype, seed=2)
        wanted = joined.double()
        if normed:
            for part, gain in zip((slice(queries), slice(queries, queries + keys)), gains, strict=True):
                wanted[:, part] = functional.rms_norm(wanted[:, part], (head_dim,), gain.double(), 1e-6)
        a, b = wanted[:, : queries + keys].chunk(2, dim=-1)
        cosines, sines = rotation.cosines.double()[:, None], rotation.sines.double()[:, None]
        turned = torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)
        wanted[:, : queries + keys] = turned
        ops.norm_rope(
            joined, rotation.cosines, rotation.sines, queries, keys, gains if normed else None, 1e-6
        )
        self.same(joined, wanted, dtype)

    @pytest.mark.parametrize(("rows", "inner"), [(1, 3), (5, 96), (2, 1_500)])
    def test_gate(self, dtype: torch.dtype, rows: int, inner: int) -> None:
        x = random(rows, 2 * inner, dtype=dtype)
        a, b = x.double().chunk(2, dim=1)
        self.same(ops.gate(x, gelu=True), functional.gelu(a) * b, dtype)
        self.same(ops.gate(x, gelu=False), functional.silu(a) * b, dtype)

    @pytest.mark.parametrize("shape", [(1, 3), (3, 1_500), (2, 3, 40)])
    def test_gelu(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        x = random(*shape, dtype=dtype)
        wanted = functional.gelu(x.double())
        assert ops.gelu_(x) is x
        self.same(x, wanted, dtype)

    def test_activations_keep_their_precision(self, dtype: torch.dtype) -> None:
        x = torch.linspace(-6, 6, 4_000, device=DEVICE).to(dtype)[None]
        least = torch.finfo(dtype).tiny
        wanted = functional.gelu(x.double())
        found = ops.gelu_(x.clone()).double()
        # As exact as the dtype, but where erfc has all but gone.
        within = 2 * torch.finfo(dtype).eps * wanted.abs() + 3e-7 + least
        assert bool(((found - wanted).abs() <= within).all())

    @pytest.mark.parametrize("lengths", [[1], [3, 16, 17, 200], [1] * 9])
    @pytest.mark.parametrize("width", [8, 130])
    def test_mean(self, dtype: torch.dtype, lengths: list[int], width: int) -> None:
        batch, hidden = batch_of(lengths), random(sum(lengths), width, dtype=dtype)
        found = pooling.mean(hidden, batch)
        wanted = torch.stack([part.double().mean(0) for part in hidden.split(batch.lengths)])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)

    def test_mean_of_nothing_is_zeros(self, dtype: torch.dtype) -> None:
        starts = torch.tensor([0, 0, 2, 2], dtype=torch.int32, device=DEVICE)
        hidden = random(2, 8, dtype=dtype)
        found = ops.mean(hidden, starts)
        assert not found[[0, 2]].any()
        torch.testing.assert_close(found[1].double(), hidden.double().mean(0), atol=1e-5, rtol=1e-5)

    def same(self, found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, atol=WITHIN[dtype], rtol=WITHIN[dtype])


@kernel
@pytest.mark.gpu
class TestProduct:
    """Products with what comes behind them."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("rows", "width", "inner"), [(1, 8, 8), (33, 40, 72), (300, 96, 64)])
    @pytest.mark.parametrize("gelu", [True, False])
    def test_gated(self, dtype: torch.dtype, rows: int, width: int, inner: int, gelu: bool) -> None:
        x, weight = self.factors(dtype, rows, width, 2 * inner)
        a, b = functional.linear(x.double(), weight.double()).chunk(2, dim=1)
        wanted = (functional.gelu(a) if gelu else functional.silu(a)) * b
        found = ops.product(x, weight, None, gelu=gelu, gated=True)
        self.same(found, wanted, dtype)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("rows", "width", "out"), [(1, 8, 8), (33, 40, 72), (300, 96, 64)])
    @pytest.mark.parametrize("biased", [True, False])
    def test_activated(self, dtype: torch.dtype, rows: int, width: int, out: int, biased: bool) -> None:
        x, weight = self.factors(dtype, rows, width, out)
        bias = random(out, dtype=dtype, seed=3) if biased else None
        product = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        found = ops.product(x, weight, bias, gelu=True, gated=False)
        self.same(found, functional.gelu(product), dtype)

    @pytest.mark.skipif(not COMPILED, reason="for the sizes that a GPU joins")
    @pytest.mark.parametrize("rows", [2_048, 5_001])
    def test_layers_are_those_of_a_product_and_a_kernel_behind_it(self, rows: int) -> None:
        x, weight = self.factors(torch.bfloat16, rows, 768, 6_144)
        bias = random(6_144, dtype=torch.bfloat16, seed=3)
        assert ops.joins(x, weight, gated=True)
        assert ops.joins(x, weight, gated=False)
        assert not ops.joins(x[:100], weight, gated=True)
        biased, plain = FusedLinear(weight, bias), FusedLinear(weight, None)
        self.same(biased.gelu(x), functional.gelu(biased(x).double()), torch.bfloat16)
        for gelu, activation in ((True, functional.gelu), (False, functional.silu)):
            a, b = plain(x).double().chunk(2, dim=1)
            self.same(plain.gated(x, gelu=gelu), activation(a) * b, torch.bfloat16)

    def factors(
        self, dtype: torch.dtype, rows: int, width: int, out: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return random(rows, width, dtype=dtype), random(out, width, dtype=dtype, seed=1) * width**-0.5

    def same(self, found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, atol=2 * WITHIN[dtype], rtol=WITHIN[dtype])


@kernel
@pytest.mark.gpu
class TestMerges:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("outs", "ins", "rank"), [(1, 1, 1), (70, 130, 8), (33, 20, 45), (64, 128, 96)], ids=str
    )
    def test_a_change_is_added_and_rounded_once(
        self, dtype: torch.dtype, outs: int, ins: int, rank: int
    ) -> None:
        base, down = random(outs, ins, dtype=dtype), random(rank, ins, dtype=dtype, seed=1) * 0.1
        up, kept, out = random(outs, rank, dtype=dtype, seed=2), base.clone(), torch.empty_like(base)
        ops.merge(base, down, up, out)
        wanted = base.double() + up.double() @ down.double()
        torch.testing.assert_close(out.double(), wanted, atol=WITHIN[dtype], rtol=WITHIN[dtype])
        assert torch.equal(base, kept)

    def test_the_network_rests_on_one_task_at_a_time(self) -> None:
        merges = Merges(DEVICE, ["a", "b"])
        base, down, up = random(6, 5), random(2, 5, seed=1), random(6, 2, seed=2)
        table, other = random(4, 3), random(4, 3, seed=3)
        product, beside = merges.product(base, {"a": (down, up)})
        choice = merges.choice(table, {"b": other})
        assert beside is not None
        for task in (None, "a", "a", "b", None, "b", "a"):
            merges.rest_on(task)
            torch.testing.assert_close(product, base + up @ down if task == "a" else base)
            assert torch.equal(choice, other if task == "b" else table)
        x, y = random(3, 5, seed=4), random(3, 6, seed=5)
        wanted = y.clone()
        wanted[:2] += x[:2] @ (up @ down).T
        tags = merges.tags([AdapterRun(0, 2, "a"), AdapterRun(2, 3, "b")])
        assert tags.tolist() == [0, 0, 1]
        beside.add_to(y, x, torch.from_numpy(tags).to(DEVICE))
        torch.testing.assert_close(y, wanted)


@kernel
@pytest.mark.gpu
class TestLowRank:
    """The narrow products of all tasks of a batch at once."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "tags",
        [[-1], [2], [-1] * 70, [0, 0, 1, 2, 2], [-1, -1, 0, 2], [2, -1, 0, 1, 0, -1], [0] * 60 + [1] * 80],
        ids=["none", "one", "none of many", "groups", "a task without rows", "in any order", "blocks"],
    )
    def test_is_that_of_each_row(self, dtype: torch.dtype, tags: list[int]) -> None:
        self.check(tags, dtype, into=40, rank=8, out=24)

    @pytest.mark.parametrize(("into", "rank", "out"), [(1, 1, 1), (300, 4, 300), (33, 45, 17), (64, 96, 64)])
    def test_of_other_sizes(self, into: int, rank: int, out: int) -> None:
        self.check([-1, 0, 0, 1, 2], torch.float32, into, rank, out)

    @pytest.mark.skipif(not COMPILED, reason="for the blocks that a GPU uses")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("into", "rank", "out"), [(1024, 8, 4096), (3072, 32, 1024), (1024, 96, 4096)])
    def test_of_the_blocks_of_a_gpu(self, dtype: torch.dtype, into: int, rank: int, out: int) -> None:
        for count in (1, 100, 2_000):
            self.check(sorted(i % 4 - 1 for i in range(count)), dtype, into, rank, out)

    def check(self, tags: list[int], dtype: torch.dtype, into: int, rank: int, out: int) -> None:
        x, y = random(len(tags), into, dtype=dtype), random(len(tags), out, dtype=dtype, seed=1)
        downs = (random(3, rank, into, seed=2) * into**-0.5).to(dtype)
        ups = (random(3, out, rank, seed=3) * rank**-0.5).to(dtype)
        wanted = y.double()
        for i, tag in enumerate(tags):
            if tag >= 0:
                wanted[i] += ups[tag].double() @ (downs[tag].double() @ x[i].double())
        alone = [i for i, tag in enumerate(tags) if tag < 0]
        before = y[alone].clone()
        ops.add_low_rank(x, downs, ups, torch.tensor(tags, dtype=torch.int32, device=DEVICE), y)
        assert torch.equal(y[alone], before)
        torch.testing.assert_close(y.double(), wanted, atol=2 * WITHIN[dtype], rtol=2 * WITHIN[dtype])


@kernel
@pytest.mark.gpu
def test_a_frame_holds_a_batch_and_rows_that_see_nothing() -> None:
    items = [EncodeItem(random_ids(n, 50, n), attended=seen) for n, seen in ((5, None), (3, 2), (1, None))]
    batch = lay_out(items, Limits(50, 10))
    frame = Frame(20, 4)
    batch = replace(batch, wanted=np.array([0, 3], np.int32))
    numbers = host_numbers(batch, frame)
    whole = frame.view(batch, numbers, 20)
    assert whole.token_ids.tolist() == [*batch.token_ids.tolist(), *[0] * 11]
    assert whole.rows is not None
    assert whole.rows.positions.tolist() == [0, 0, 1, 2, 0, 1, 2, 3, 4, *[0] * 11]
    assert whole.rows.first.tolist() == [0, 1, 1, 1, 4, 4, 4, 4, 4, *range(9, 20)]
    assert whole.rows.last.tolist() == [1, 3, 3, 3, 9, 9, 9, 9, 9, *range(9, 20)]
    assert whole.wanted_rows is not None
    assert whole.wanted_rows.tolist() == [0, 3, 19, 19]
    assert whole.cu_lengths.tolist() == [0, 1, 4, 9]


@kernel
@pytest.mark.gpu
@pytest.mark.parametrize("model", [*FAMILIES, *DECODERS] if COMPILED else FORMS_OF_NETWORKS)
def test_networks_are_those_of_plain_torch(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = (write_served if model in DECODERS else write_model)(tmp_path, model)
    spec = Catalog.load().require(model)
    lengths = (65, 1, 130, 7, 64, 7, 2, 300, 63, 33) if COMPILED else (17, 1, 40, 7, 7, 2)
    adapters = (None, *spec.adapters.values())
    items = [
        EncodeItem(random_ids(length, config_of(folder)["vocab_size"], i), adapters[i % len(adapters)])
        for i, length in enumerate(lengths)
    ]
    if model == "jina-reranker-v3":
        items = [marked(folder, item) for item in items if len(item.token_ids) > 3]
    if model.startswith("jina-colbert"):
        items = [*items, EncodeItem(items[0].token_ids, attended=5)]
    fused = load_network(spec, folder, device=DEVICE, dtype=torch.float32)
    together = fused.forward(items)
    alone = [fused.forward([item])[0] for item in items] if COMPILED else []
    with monkeypatch.context() as patch:
        patch.setattr(ops, "INTERPRETED", False)
        plain = load_network(spec, folder, device=torch.device("cpu"), dtype=torch.float32)
        wanted = plain.forward(items)
    vocabulary = config_of(folder)["vocab_size"]
    for results in (together, alone):
        for one, other in zip(results, wanted, strict=bool(results)):
            a, b = flat(one, vocabulary), flat(other, vocabulary)
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)
            assert not b.any() or cosine(a, b) > 0.99999


class _Repeating:
    """In place of a recorder, where there is no device: a replay does the work again."""

    bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.records = 0

    def record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        self.records += 1
        return SimpleNamespace(replay=work), work()


def test_a_pass_that_cannot_be_recorded_is_launched_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(_Repeating):
        def record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
            raise NotRecordedError("operation not permitted when stream is capturing")

    monkeypatch.setattr(frames, "Recorder", Refusing)
    monkeypatch.setattr(frames.Frames, "_free", lambda self: 1 << 40)
    table = random(10, 4)
    passes = frames.Frames(lambda batch: table[batch.token_ids.long()], DEVICE, 64, (16,))
    batch = lay_out([EncodeItem(np.array([1, 2, 3], np.int32))], Limits(10, 64))
    for _ in range(2):
        hidden, _ = passes.run(batch)
        assert torch.equal(hidden, table[1:4])
    assert [record.message for record in caplog.records] == [
        "passes of 16 tokens are launched kernel by kernel: operation not permitted when stream is capturing"
    ]


@kernel
@pytest.mark.gpu
@pytest.mark.parametrize("model", ["jina-embeddings-v3", "jina-embeddings-v5-text-small"])
def test_several_tasks_in_one_pass_are_those_of_a_pass_each(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = (write_served if model in DECODERS else write_model)(tmp_path, model)
    spec = Catalog.load().require(model)
    first, second = sorted(set(spec.adapters.values()))[:2]
    items = [
        EncodeItem(random_ids(length, config_of(folder)["vocab_size"], i), adapter)
        for i, (length, adapter) in enumerate([(3, second), (5, None), (2, first), (4, second)])
    ]
    network: Any = load_network(spec, folder, device=DEVICE, dtype=torch.float32)
    network._frames = None
    together = network.forward(items)
    assert network._merges.task is None, "the weights were not touched"
    if not COMPILED:
        monkeypatch.setattr(frames, "Recorder", _Repeating)
        monkeypatch.setattr(frames.Frames, "_free", lambda self: 1 << 40)
    network._frames = frames.Frames(network._backbone, DEVICE, network._limits.positions, (16, 32))
    replayed = [network.forward(items), network.forward(items[::-1])[::-1]]
    assert len(network._frames) == 1
    network._frames = None
    monkeypatch.setattr(encoder, "TOGETHER_TOKENS", 0)
    apart = network.forward(items)
    assert network._merges.task is not None
    for found in (together, *replayed):
        for one, other in zip(found, apart, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
            assert cosine(one, other) > 0.99999


def marked(folder: Path, item: EncodeItem) -> EncodeItem:
    """A prompt with the markers of a query and of one document."""
    from services.core.modeling.checkpoints.tokenizer import Tokenizer
    from services.core.modeling.families.listwise import ListTokenizer

    tokenizer = ListTokenizer(Tokenizer.load(folder))
    ids = item.token_ids.copy()
    ids[np.isin(ids, (tokenizer.document_marker, tokenizer.query_marker))] = 0
    ids[1], ids[-1] = tokenizer.document_marker, tokenizer.query_marker
    return EncodeItem(ids)


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="graphs need a CUDA device")
class TestFrames:
    """Passes replayed as graphs against the same passes launched kernel by kernel."""

    @pytest.fixture(
        params=["jina-embeddings-v3", "jina-embeddings-v2-base-en", "jina-embeddings-v5-text-small"]
    )
    def pair(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, int, list[str | None]]:
        """A network with graphs, one without, the vocabulary and the adapters."""
        model = request.param
        folder = (write_served if "v5" in model else write_model)(tmp_path, model)
        spec = Catalog.load().require(model)
        networks = [load_network(spec, folder, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
        networks[1]._frames = None  # type: ignore[union-attr]
        adapters: list[str | None] = [None, *spec.adapters.values()]
        return networks[0], networks[1], config_of(folder)["vocab_size"], adapters

    def test_each_size_gives_what_launches_give(self, pair: tuple[Any, Any, int, list[str | None]]) -> None:
        graphs, launches, vocabulary, adapters = pair
        for count in (1, 15, 16, 17, 64, 65, 300, 512, 1_000, 2_500, 8_192, 9_000):
            for longest in (7, 400):
                lengths = [min(longest, count - start) for start in range(0, count, longest)]
                items = [
                    EncodeItem(random_ids(n, vocabulary, i), adapters[-1]) for i, n in enumerate(lengths)
                ]
                for one, other in zip(graphs.forward(items), launches.forward(items), strict=True):
                    np.testing.assert_allclose(one, other, atol=4e-2, rtol=4e-2)
                    assert cosine(one, other) > 0.9995

    def test_a_bad_item_leaves_the_next_batch_right(
        self, pair: tuple[Any, Any, int, list[str | None]]
    ) -> None:
        graphs, _, vocabulary, _ = pair
        good = [EncodeItem(random_ids(n, vocabulary)) for n in (5, 9, 40)]
        wanted = graphs.forward(good)
        for bad in (
            EncodeItem(np.array([vocabulary], np.int32)),
            EncodeItem(good[0].token_ids, "no such task"),
        ):
            with pytest.raises(ValueError, match=r"vocabulary|adapter"):
                graphs.forward([*good, bad])
            for one, other in zip(graphs.forward(good), wanted, strict=True):
                np.testing.assert_array_equal(one, other)

    def test_threads_take_turns(self, pair: tuple[Any, Any, int, list[str | None]]) -> None:
        graphs, _, vocabulary, adapters = pair
        calls = [
            [
                EncodeItem(random_ids(5 + i % 60, vocabulary, i), adapters[(i + j) % len(adapters)])
                for j in range(4)
            ]
            for i in range(40)
        ]
        wanted = [graphs.forward(call) for call in calls]
        with ThreadPoolExecutor(4) as threads:
            for found, alone in zip(threads.map(graphs.forward, calls), wanted, strict=True):
                for one, other in zip(found, alone, strict=True):
                    np.testing.assert_array_equal(one, other)
