"""Runs the compiled kernels over memory that ends, or begins, at a page that nobody may touch.

A read or write outside of a buffer ends the process, whatever instruction it is by: sanitizers do not see
masked vector instructions. Run as a program by ``test_native`` with names of instruction sets; prints of each
how many runs went well. With ``overrun`` before a name it does what ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.core.modeling.layers.attention import alibi_slopes
from services.core.modeling.layers.packed import Limits, PackedBatch, pack
from services.core.modeling.native import decoder, encoder, library, ops
from services.core.modeling.native.instructions import InstructionSet, choose
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.checkpoints import minilm_directory, minilm_spec, spec
from tests.decoder_checkpoints import V5_TASKS, write_v5
from tests.text_checkpoints import TASKS, write_jina_bert, write_v3

_PAGE = mmap.PAGESIZE
_CPU = torch.device("cpu")
_libc = ctypes.CDLL(None, use_errno=True)
_mapped: list[mmap.mmap] = []
_empty = torch.empty


class Fence:
    """Makes tensors whose bytes end at a forbidden page, or begin behind one."""

    def __init__(self, *, behind: bool) -> None:
        self._behind = behind

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        sizes = tuple(shape[0]) if shape and isinstance(shape[0], (tuple, torch.Size)) else shape
        count = prod(sizes)
        if count == 0:
            return _empty(*sizes, dtype=dtype)
        size = count * dtype.itemsize
        pages = -(-size // _PAGE) * _PAGE
        memory = mmap.mmap(-1, pages + _PAGE)
        _mapped.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fence, offset = (pages, pages - size) if self._behind else (0, _PAGE)
        if _libc.mprotect(ctypes.c_void_p(start + fence), _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(sizes)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def scratch(self, size: int) -> int:
        return self.empty(size, dtype=torch.uint8).data_ptr()


def _batch(
    fence: Fence, lengths: tuple[int, ...], vocabulary: int, tasks: tuple[str | None, ...]
) -> PackedBatch:
    chance = np.random.default_rng(sum(lengths))
    items = [
        EncodeItem(chance.integers(0, vocabulary, n, dtype=np.int32), tasks[i % len(tasks)])
        for i, n in enumerate(lengths)
    ]
    batch = pack(items, _CPU, Limits(vocabulary, max(lengths), frozenset(task for task in tasks if task)))
    ids, ends = fence.copy(batch.token_ids), fence.copy(batch.cu_lengths)
    return replace(batch, token_ids=ids, cu_lengths=ends)


def _networks(fence: Fence, encoder_of: TextEncoder, tasks: tuple[str | None, ...]) -> int:
    """Run the network behind ``encoder_of`` over batches of odd sizes."""
    runs, vocabulary = 0, encoder_of._limits.vocabulary  # type: ignore[attr-defined]
    for lengths in ((1,), (2, 3), (17, 1, 64, 65), (600, 5, 5), (95, 1, 96)):
        batch = _batch(fence, lengths, vocabulary, tasks)
        states = encoder_of._backbone(batch)  # type: ignore[attr-defined]
        last = np.cumsum(batch.lengths, dtype=np.int32) - 1
        some = encoder_of._backbone(replace(batch, wanted=last))  # type: ignore[attr-defined]
        assert torch.isfinite(states.float()).all()
        # Not by torch.testing, which imports for two seconds what nothing here needs.
        np.testing.assert_allclose(some[last].float(), states[last].float(), atol=0.05, rtol=0.05)
        runs += 1
    return runs


def _attention(fence: Fence, dtype: torch.dtype) -> int:
    runs = 0
    for heads, key_heads, head_dim in ((1, 1, 8), (3, 1, 12), (4, 2, 64), (7, 1, 34), (2, 2, 80)):
        for causal in (False, True):
            batch = _batch(fence, (1, 7, 513, 30), 8, (None,))
            parts = [
                fence.empty(batch.tokens, n, head_dim, dtype=dtype) for n in (heads, key_heads, key_heads)
            ]
            query, key, value = (part.copy_(torch.randn(part.shape)) for part in parts)
            slopes = fence.copy(alibi_slopes(heads)) if runs % 2 else None
            out = ops.attention(query, key, value, batch, causal=causal, slopes=slopes, scale=0.1)
            assert torch.isfinite(out.float()).all()
            runs += 1
    return runs


def _encoders(directory: Path) -> list[tuple[str, Path]]:
    """Encoders of odd sizes, by family."""
    sizes = {"hidden_size": 36, "num_attention_heads": 6, "intermediate_size": 70}
    return [
        ("jina_bert", write_jina_bert(directory / "v2", **sizes)),
        ("jina_bert", write_jina_bert(directory / "v2-code", query_norm=True, **sizes)),
        ("jina_v3", write_v3(directory / "v3", lora_rank=3, **sizes)),
    ]


def _with(fence: Fence, directory: Path, dtype: torch.dtype) -> int:
    kernels = library.library(dtype)
    assert kernels is not None
    runs = _attention(fence, kernels.elements)
    sizes = (
        {},
        {"hidden_size": 34, "intermediate_size": 70, "num_attention_heads": 3, "num_key_value_heads": 1},
    )
    for i, (size, changes) in enumerate((size, changes) for size in ("nano", "small") for changes in sizes):
        folder = write_v5(directory / str(i), size, **changes, head_dim=10)
        entry = spec(
            family="jina_v5_text",
            dimensions=changes.get("hidden_size", 32),
            context_length=4096,
            tasks=V5_TASKS,
            adapters={task: task for task in V5_TASKS},
        )
        network = load_text_encoder(entry, folder, device=_CPU, dtype=dtype)
        runs += _networks(fence, network, (None, *V5_TASKS))
    for family, folder in _encoders(directory):
        tasks = TASKS if family == "jina_v3" else ()
        entry = spec(
            family=family,
            dimensions=36,
            context_length=1024,
            tasks=tasks,
            adapters={task: task for task in tasks},
        )
        network = load_text_encoder(entry, folder, device=_CPU, dtype=dtype)
        runs += _networks(fence, network, (None, *tasks))
    minilm = load_text_encoder(minilm_spec(), minilm_directory(), device=_CPU, dtype=dtype)
    batch = _batch(fence, (1, 17, 512, 96), 30000, (None,))
    assert torch.isfinite(minilm._backbone(batch).float()).all()  # type: ignore[attr-defined]
    return runs + 1


def _overrun(chosen: InstructionSet) -> None:
    """Do what the fence is there for."""
    kernels = library.load(chosen)
    assert kernels is not None
    short, angles = Fence(behind=True).empty(4, 64, dtype=kernels.elements), torch.zeros(5, 32)
    kernels.functions.sf_rope(short.data_ptr(), 5, 64, 1, 64, angles.data_ptr(), angles.data_ptr())


def _fenced() -> int:
    """Run all on the kernels that are chosen; returns how many runs went well."""
    threads: Callable[[int], None] = torch.set_num_threads
    runs = 0
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for behind in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                threads(2 if behind else 1)
                fence = Fence(behind=behind)
                for module in (decoder, encoder, ops):
                    module.scratch = fence.scratch  # type: ignore[attr-defined]
                torch.empty = fence.empty  # type: ignore[assignment]
                runs += _with(fence, Path(folder) / f"{behind}-{dtype}", dtype)
                torch.empty = _empty
    _mapped.clear()
    return runs


def main() -> None:
    if sys.argv[1] == "overrun":
        _overrun(choose(sys.argv[2]))
        return
    for name in sys.argv[1:]:
        choose(name)
        print(name, _fenced(), flush=True)


if __name__ == "__main__":
    main()
