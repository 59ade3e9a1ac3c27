"""What each instruction set of this processor gives in fp32, beside ONNX Runtime and bare matrix products.

    python -m benchmarks.processors [--seconds 2] [--threads 1] [--only minilm] [--instructions avx2]

all-MiniLM-L6-v2: the network alone, no tokenising. ONNX Runtime runs the graph that torch exports of
transformers' class, made anew each time; texts of mixed lengths are padded for it. The bare products are
torch's, of the shapes of the network's layers. jina-embeddings-v5-text-nano, with random weights of true
size, stands beside transformers' class in fp32. The sides take turns; what counts is processor time, the
median of it, and ratios of one run. ONNX Runtime comes with the extra ``bench``.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.decoder_models import CONFIGS, NANO, write
from services.core.catalog import Catalog
from services.core.modeling.native.instructions import InstructionSet, available, choose
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem
from tests.checkpoints import minilm_directory, minilm_spec

CASES: Mapping[str, tuple[int, ...]] = {
    "1 x 16": (16,),
    "8 x 16": (16,) * 8,
    "1 x 128": (128,),
    "1 x 256": (256,),
    "32 x 8..256, mixed": tuple(int(n) for n in np.geomspace(8, 256, 32)),
}
NANO_CASES: Mapping[str, tuple[int, ...]] = {
    "4 x 128": (128,) * 4,
    "16 x 8..256, mixed": tuple(int(n) for n in np.geomspace(8, 256, 16)),
}
LAYERS, WIDTH, INNER = 6, 384, 1536
_CPU = torch.device("cpu")

Run = Callable[[], object]


def items(lengths: Sequence[int]) -> list[EncodeItem]:
    chance = np.random.default_rng(0)
    return [EncodeItem(chance.integers(1000, 30000, n, dtype=np.int32)) for n in lengths]


def padded(batch: Sequence[EncodeItem]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and mask (texts, longest) int64, the longest text first."""
    ordered = sorted(batch, key=lambda item: -len(item.token_ids))
    ids = np.zeros((len(ordered), len(ordered[0].token_ids)), np.int64)
    mask = np.zeros_like(ids)
    for row, item in enumerate(ordered):
        ids[row, : len(item.token_ids)] = item.token_ids
        mask[row, : len(item.token_ids)] = 1
    return ids, mask


class MiniLmStates(torch.nn.Module):
    """transformers' class of MiniLM: ids and mask (texts, tokens) in, states (texts, tokens, width) out."""

    def __init__(self) -> None:
        """Load the weights in fp32."""
        from transformers import BertModel

        super().__init__()
        self.network = BertModel.from_pretrained(
            minilm_directory(), dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return self.network(input_ids=ids, attention_mask=mask).last_hidden_state


def export_onnx(network: torch.nn.Module, names: tuple[str, str]) -> bytes:
    """The graph of ``network`` whose inputs have ``names``; texts and tokens of any number."""
    graph = io.BytesIO()
    example = torch.ones(2, 16, dtype=torch.long)
    axes = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        network,
        (example, example),
        graph,  # type: ignore[arg-type]
        input_names=list(names),
        output_names=["last_hidden_state"],
        dynamic_axes={**dict.fromkeys(names, axes), "last_hidden_state": axes},
        opset_version=17,
        dynamo=False,
    )
    return graph.getvalue()


def onnx_runtime(threads: int) -> Callable[[Sequence[EncodeItem]], Run]:
    """MiniLM in ONNX Runtime."""
    import onnxruntime

    graph = export_onnx(MiniLmStates(), ("ids", "mask"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def over(batch: Sequence[EncodeItem]) -> Run:
        ids, mask = padded(batch)
        return lambda: session.run(None, {"ids": ids, "mask": mask})

    return over


def products(tokens: int) -> Run:
    """The matrix products of MiniLM over so many rows, and nothing else."""
    x, inner = torch.randn(tokens, WIDTH), torch.randn(tokens, INNER)
    sizes = ((x, 3 * WIDTH), (x, WIDTH), (x, INNER), (inner, WIDTH))
    weights = [(rows, torch.randn(rows.shape[1], out)) for rows, out in sizes]

    def run() -> None:
        for _ in range(LAYERS):
            for rows, weight in weights:
                torch.mm(rows, weight)

    return run


def transformers_nano() -> Callable[[Sequence[EncodeItem]], Run]:
    """The stock class of nano in fp32, padded."""
    from transformers import EuroBertConfig, EuroBertModel

    raw: dict[str, Any] = {name: v for name, v in CONFIGS[NANO][0].items() if name != "model_type"}
    network = EuroBertModel(EuroBertConfig(**raw, pad_token_id=0)).float().eval()

    def over(batch: Sequence[EncodeItem]) -> Run:
        ids, mask = map(torch.from_numpy, padded(batch))
        return lambda: network(input_ids=ids, attention_mask=mask).last_hidden_state

    return over


def turns(runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
    """Let the sides take turns; the median processor time of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            before = time.process_time()
            run()
            times[name].append(time.process_time() - before)
    return {name: median(each) for name, each in times.items()}


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [title, "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def minilm(sets: Sequence[InstructionSet], threads: int, seconds: float) -> str:
    """A row for each instruction set and case."""
    theirs = onnx_runtime(threads)
    rows: list[Sequence[str]] = []
    for chosen in sets:
        choose(chosen)
        network = load_text_encoder(minilm_spec(), minilm_directory(), device=_CPU, dtype=torch.float32)
        for case, lengths in CASES.items():
            batch = items(lengths)
            runs: dict[str, Run] = {
                "ours": lambda network=network, batch=batch: network.forward(batch),
                "onnx": theirs(batch),
                "bare": products(sum(lengths)),
            }
            took = turns(runs, seconds)
            rows.append(
                (
                    *(chosen.value, case, f"{took['ours'] * 1e3:.2f}", f"{took['onnx'] * 1e3:.2f}"),
                    *(f"{took['onnx'] / took['ours']:.2f}", f"{took['bare'] / took['ours']:.0%}"),
                )
            )
    heads = ("instructions", "texts x tokens", "ours ms", "ONNX Runtime ms", "times", "of bare products")
    return table(f"all-MiniLM-L6-v2 in fp32, {threads} thread(s):", heads, rows)


def nano(sets: Sequence[InstructionSet], threads: int, seconds: float) -> str:
    """The decoder against the padded class of transformers."""
    theirs = transformers_nano()
    rows: list[Sequence[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = write(Path(folder), NANO)
        spec = Catalog.load().get(NANO)
        assert spec is not None
        for chosen in sets:
            choose(chosen)
            network = load_text_encoder(spec, directory, device=_CPU, dtype=torch.float32)
            for case, lengths in NANO_CASES.items():
                batch = items(lengths)
                ours: Run = lambda network=network, batch=batch: network.forward(batch)  # noqa: E731
                took = turns({"ours": ours, "padded": theirs(batch)}, seconds)
                cells = (f"{took[name] * 1e3:.0f}" for name in ("ours", "padded"))
                rows.append((chosen.value, case, *cells, f"{took['padded'] / took['ours']:.2f}"))
    heads = ("instructions", "texts x tokens", "ours ms", "transformers ms", "times")
    return table(f"{NANO} in fp32, {threads} thread(s):", heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each case is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("minilm", "nano"))
    parser.add_argument(
        "--instructions", action="append", type=InstructionSet, help="a set, all if not given"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    sets = chosen.instructions or available()
    print(
        f"{torch.cpu.get_capabilities().get('cpu_name', 'a processor')}, torch {torch.__version__}",
        flush=True,
    )
    with torch.inference_mode():
        for name, report in (("minilm", minilm), ("nano", nano)):
            if chosen.only in (None, name):
                print("\n" + report(sets, chosen.threads, chosen.seconds), flush=True)


if __name__ == "__main__":
    main()
