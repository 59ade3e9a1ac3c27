"""All figures in one run, with the machine they come from; benchmarks/README.md keeps those of quiet ones.

``python -m benchmarks [--only SECTION ...]``; without sections, all of them. The machine should do nothing
else meanwhile. With ``--device cuda`` the sections that can run there do.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date

from benchmarks import doors, engine, footprint
from benchmarks.workload import TEXTS_IN_ONE_CALL, Row


def embeddings() -> str:
    """Engine and doors against sentence-transformers."""
    inside, top = engine.rows(), engine.ceiling()
    return engine.table(inside, top) + "\n\n" + door_table([*inside, *doors.rows()])


def door_table(measured: list[Row]) -> str:
    """The typed and the REST door beside the engine in process."""
    cells = {(r.variant, r.workload, r.calls, r.texts): r for r in measured}
    lines = [
        "| tokens | calls x texts | engine texts/s | gRPC texts/s | REST texts/s | gRPC / engine "
        "| REST / engine | engine p50 ms | gRPC p50 ms | REST p50 ms | REST p95 ms |",
        "|" + " --- |" * 11,
    ]
    for (variant, workload, calls, texts), ours in cells.items():
        if variant != "engine":
            continue
        typed, rest = (cells[name, workload, calls, texts] for name in ("grpc", "rest"))
        speeds = [r.texts_per_second for r in (ours, typed, rest)]
        cell = [workload, f"{calls} x {texts}", *(f"{speed:,.0f}" for speed in speeds)]
        cell += [f"{speed / speeds[0]:.0%}" for speed in speeds[1:]]
        cell += [f"{r.p50_ms:.2f}" for r in (ours, typed, rest)] + [f"{rest.p95_ms:.2f}"]
        lines.append(f"| {' | '.join(cell)} |")
    return "\n".join(lines)


def _module(name: str, *arguments: str) -> Callable[[], str]:
    def run() -> str:
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    return run


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "embeddings": (
        "Embeddings of all-MiniLM-L6-v2: sentence-transformers `encode` (fp32, bf16), the engine in process, "
        f"typed gRPC, REST through Envoy. Single texts per call, and {TEXTS_IN_ONE_CALL} in one call.",
        embeddings,
    ),
    "processors": (
        "Every instruction set of this processor in fp32, beside ONNX Runtime; sets without rows were not "
        "measured.",
        _module("processors"),
    ),
    "footprint": ("Start-up and memory.", lambda: footprint.report(20_000)),
    "fairness": ("A quiet caller beside a loud tenant and beside batch work.", _module("fairness")),
    "encoders": (
        "Larger text encoders, random weights, in process: no padding beside a padded batch; task adapters; "
        "memory of a long text.",
        _module("encoders"),
    ),
    "decoders": (
        "Decoder embedders of published size, random weights, through the engine, beside padded batches.",
        _module("decoders"),
    ),
    "images": (
        "Pictures in jina-clip, random weights: each stage alone, and all through the engine.",
        _module("images"),
    ),
    "vision": (
        "Towers and decoders of jina-embeddings-v4 and jina-reranker-m0, of true width with fewer layers, "
        "beside transformers' own classes; memory by patches.",
        _module("vision"),
    ),
    "media": (
        "Pictures, sounds and films in jina-embeddings-v5-omni, random weights: each stage alone, and all "
        "through the engine.",
        _module("media"),
    ),
    "reranker": (
        "The listwise reranker of published size, random weights: one block, and its memory.",
        _module("long_texts", "--only", "reranker"),
    ),
    "long": (
        "Long texts in the decoder embedders: time and memory of one text.",
        _module("long_texts", "--only", "embedder"),
    ),
    "rerank": ("Reranking 100 documents of about 128 tokens.", _module("rerank")),
    "batch": ("A batch job over SQLite beside the engine alone.", _module("batch")),
    "chat": (
        "The decoder of jina-vlm, random weights: tokens a second of 1, 4 and 16 answers and of a prompt, "
        "beside transformers; what short conversations and embedding calls notice of long ones.",
        _module("chat"),
    ),
    "classify": ("Zero-shot classification, and training.", _module("classify")),
}


ON_CUDA = {
    "encoders": _module("encoders", "--device", "cuda"),
    "decoders": _module("decoders", "--device", "cuda"),
}


def _on_cuda(chosen: Sequence[str]) -> str:
    if other := sorted(set(chosen) - ON_CUDA.keys()):
        raise SystemExit(f"no section on CUDA: {', '.join(other)}; there are {', '.join(ON_CUDA)}")
    return "\n\n".join(ON_CUDA[name]() for name in chosen or ON_CUDA)


def machine() -> str:
    """One sentence on where the figures come from."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"Measured on {date.today().isoformat()}: {model}, {os.cpu_count()} cores, "
        f"Linux {platform.release()}, CPython {platform.python_version()}; load before the run {load}. "
        "Load generators run on the same cores."
    )


def main() -> None:
    """Run the chosen sections and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="the same, by name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    chosen = [*arguments.sections, *(arguments.only or ())] or list(SECTIONS)
    if arguments.device == "cuda":
        print(_on_cuda([*arguments.sections, *(arguments.only or ())]), flush=True)
        return
    print("\n".join(["# Benchmarks", "", machine()]), flush=True)
    for name in chosen:
        title, run = SECTIONS[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        print("\n".join(["", f"## {name.capitalize()}", "", title, "", run()]), flush=True)


if __name__ == "__main__":
    main()
