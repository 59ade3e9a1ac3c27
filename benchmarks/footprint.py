"""Start-up time and resident memory of the running system.

``python -m benchmarks.footprint`` prints: seconds from ``search-foundation up`` to the first answer; resident
memory of the service after 10,000 requests, and how it moves up to ``--requests``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.workload import texts_of
from tests.servers import free_port
from tests.stack import MODEL, Stack

_WRK = """
local bodies, at = {}, 0
for line in io.lines("%s") do bodies[#bodies + 1] = line end
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", "/v1/embeddings", {["Content-Type"] = "application/json"}, bodies[at])
end
"""


def first_answer() -> float:
    """Seconds from the command's start to its first embedding."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        environment = {
            **os.environ,
            "SF_DATA_DIR": folder,
            "SF_AUTH": "false",
            "SF_HTTP_PORT": str(port),
            "SF_GRPC_PORT": str(free_port()),
            "SF_METRICS_PORT": str(free_port()),
        }
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "search_foundation.cli", "up"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not _answers(port):
                if process.poll() is not None or time.perf_counter() - began > 60:
                    raise RuntimeError("`search-foundation up` gave no answer")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _answers(port: int) -> bool:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings",
        data=json.dumps({"model": MODEL, "input": "hello"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def memory(requests: int, step: int = 10_000) -> list[tuple[int, float]]:
    """Resident MiB of the service after about each ``step`` of ``requests`` calls of 8 to 256 tokens."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise RuntimeError("needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bodies = folder / "bodies"
        texts, _ = texts_of("8-256", 512)
        bodies.write_text("".join(json.dumps({"model": MODEL, "input": t}) + "\n" for t in texts))
        script = folder / "load.lua"
        script.write_text(_WRK % bodies)
        with Stack(folder, {"SF_AUTH": "false", "SF_ACCESS_LOG": "false"}) as stack:
            pid = stack.serve().command.process.pid
            stack.gateway()
            done, readings = 0, [(0, resident_mib(pid))]
            while done < requests:
                target = done + step
                while done < target:
                    done += _load(wrk, script, stack.url)
                readings.append((done, resident_mib(pid)))
            return readings


def _load(wrk: str, script: Path, url: str) -> int:
    command = [wrk, "-t1", "-c32", "-d5s", "--timeout", "30s", "-s", str(script), url]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in answer or "Socket errors" in answer:
        raise RuntimeError(answer)
    return int(next(line for line in answer.splitlines() if "requests in" in line).split()[0])


def report(requests: int) -> str:
    """The figures as Markdown."""
    lines = [f"From `search-foundation up` to the first answer: {first_answer():.1f} s", ""]
    lines += ["| requests | resident MiB |", "| --- | --- |"]
    lines += [f"| {done:,} | {mib:.0f} |" for done, mib in memory(requests)]
    return "\n".join(lines)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    print(report(parser.parse_args().requests))


if __name__ == "__main__":
    main()
