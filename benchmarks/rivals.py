"""The product's REST door beside another server of all-MiniLM-L6-v2, in fp32, loaded alike in turns.

    python -m benchmarks.rivals --infinity FOLDER [--seconds 5] [--rounds 2]

FOLDER is a virtual environment of its own with infinity-emb 0.0.77, ``optimum[onnxruntime]`` 1.24 and
transformers 4.48; its ONNX engine serves the graph that torch exports of transformers' class. Both servers
are started at once, only one is loaded at a time. wrk sends both the same bodies; texts/s, ratios of one run.
Without ``--infinity`` the other side is missing and only the product's rows are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import torch

from benchmarks.doors import load
from benchmarks.footprint import resident_mib
from benchmarks.processors import MiniLmStates, export_onnx
from benchmarks.workload import TEXTS_IN_ONE_CALL
from tests.checkpoints import minilm_directory
from tests.servers import free_port
from tests.stack import MODEL, Stack

CASES = (
    ("16", 1, 1),
    ("16", 16, 1),
    ("16", 64, 1),
    ("16", 1, TEXTS_IN_ONE_CALL),
    ("128", 16, 1),
    ("256", 16, 1),
    ("8-256", 16, 1),
)
"""Workload, calls in flight, texts in each."""

START_SECONDS = 120.0


@contextmanager
def infinity(environment: Path, folder: Path) -> Generator[str]:
    """Serve MiniLM with Infinity's ONNX engine; yields its URL. RuntimeError if it does not start."""
    model = folder / MODEL
    shutil.copytree(minilm_directory(), model)
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(export_onnx(MiniLmStates(), ("input_ids", "attention_mask")))
    port = free_port()
    command = [environment / "bin" / "infinity_emb", "v2", "--model-id", model, "--served-model-name", MODEL]
    command += ["--engine", "optimum", "--device", "cpu", "--port", str(port), "--no-bettertransformer"]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "infinity.log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env={**own, "HF_HUB_OFFLINE": "1"}
        )
    url = f"http://127.0.0.1:{port}/embeddings"
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((folder / "infinity.log").read_text()[-3000:])
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    body = json.dumps({"model": MODEL, "input": "hello"})
    command = ["curl", "-sf", "-o", os.devnull, "-H", "Content-Type: application/json", "-d", body, url]
    return subprocess.run(command, check=False).returncode == 0


def measure(environment: Path | None, seconds: float, rounds: int) -> str:
    """The table as Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = nullcontext(None) if environment is None else infinity(environment, folder)
        settings = {"SF_AUTH": "false", "SF_ACCESS_LOG": "false", "SF_DTYPE": "float32"}
        with Stack(folder, settings) as stack, other as rival:
            services = stack.serve()
            stack.gateway()
            lines = ["| tokens | calls x texts | texts/s | p50 ms | Infinity texts/s | p50 ms | times |"]
            lines.append("|" + " --- |" * 7)
            for workload, calls, texts in CASES:
                sides = {"ours": f"{stack.url}/v1/embeddings"} | ({} if rival is None else {"other": rival})
                found = {side: [] for side in sides}
                for _ in range(rounds):
                    for side, url in sides.items():
                        found[side].append(load(url, folder, workload, calls, texts, seconds))
                rate, p50 = (
                    {side: median(getattr(each, of) for each in rows) for side, rows in found.items()}
                    for of in ("texts_per_second", "p50_ms")
                )
                cells = [f"{rate['ours']:.0f}", f"{p50['ours']:.1f}"]
                if rival is not None:
                    times = rate["ours"] / rate["other"]
                    cells += [f"{rate['other']:.0f}", f"{p50['other']:.1f}", f"{times:.2f}"]
                lines.append(f"| {workload} | {calls} x {texts} | {' | '.join(cells)} |")
            lines += [
                "",
                f"Resident memory of the service: {resident_mib(services.command.process.pid):.0f} MiB",
            ]
            return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--infinity", type=Path, help="the virtual environment that Infinity is installed in")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of one measurement")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side takes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(measure(chosen.infinity, chosen.seconds, chosen.rounds))


if __name__ == "__main__":
    main()
