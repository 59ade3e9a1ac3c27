"""The running gateway against the document it serves, by requests made from that document.

Schemathesis sends what the schemas allow, what they just do not, and values at their edges. Whether a
schema takes exactly what the parser takes is the business of each capability's own tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import Api
from tests.gateway.client import get
from tests.stack import Stack

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
METHODS = ("get", "post", "put", "patch", "delete", "head", "options")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """All capabilities over one model, and a key."""
    with Stack(tmp_path_factory.mktemp("schema")) as stack:
        stack.serve("embed", "rerank", "classify", "batch")
        stack.gateway()
        yield Api(stack, stack.create_key())


@dataclass
class Requests:
    """One run of schemathesis in a process of its own, which makes requests of one kind or of all."""

    mode: str
    process: subprocess.Popen[bytes]
    log: Path
    answers: Path

    @classmethod
    def start(cls, api: Api, folder: Path, mode: str, examples: int) -> Requests:
        log, answers = folder / f"{mode}.log", folder / f"{mode}.json"
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{api.stack.url}/openapi.json",
            "--header", f"Authorization: {api.authorization['authorization']}",
            "--checks", ",".join(CHECKS),
            "--phases", "coverage,fuzzing",
            "--mode", mode,
            "--max-examples", str(examples),
            "--request-timeout", "120",
            "--seed", "1",
            "--suppress-health-check", "all",
            "--generation-database", "none",
            "--no-color",
        ]  # fmt: skip
        hooks = {"SCHEMATHESIS_HOOKS": "tests.e2e.schema_hooks", "SCHEMA_ANSWERS_FILE": str(answers)}
        environment = {**os.environ, **hooks, "PYTHONPATH": str(Path(__file__).parents[2])}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        return cls(mode, process, log, answers)

    def finish(self, seconds: float) -> Counter[tuple[str, str, int]]:
        """Wait for the end, which must have found nothing; returns answers by operation, kind and status."""
        assert self.process.wait(seconds) == 0, self.log.read_text()[-8000:]
        return Counter(
            {(label, mode, code): n for label, mode, code, n in json.loads(self.answers.read_text())}
        )


@pytest.mark.parametrize(
    ("modes", "examples", "seconds"),
    [
        pytest.param(["all"], 5, 280, id="short"),
        pytest.param(
            ["positive", "negative"],
            500,
            3000,
            id="long",
            marks=[pytest.mark.soak, pytest.mark.timeout(3600)],
        ),
    ],
)
def test_answers_are_what_the_document_says(
    everything: Api, tmp_path: Path, modes: Sequence[str], examples: int, seconds: float
) -> None:
    answers: Counter[tuple[str, str, int]] = Counter()
    with ExitStack() as begun:
        runs = [Requests.start(everything, tmp_path, mode, examples) for mode in modes]
        for run in runs:
            begun.callback(run.process.kill)
        for run in runs:
            answers += run.finish(seconds)
    by_operation: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for (label, _, code), number in answers.items():
        by_operation[label][code] += number
    for label, codes in sorted(by_operation.items()):
        print(f"{label:50} {codes.total():6} {dict(sorted(codes.items()))}")
    for mode in sorted({mode for _, mode, _ in answers}):
        total: Counter[int] = Counter()
        for (_, each, code), number in answers.items():
            total[code] += number * (each == mode)
        print(f"{mode:10} {total.total():6} {dict(sorted(total.items()))}")
    paths = get(everything.stack.http_port, "/openapi.json").json["paths"]
    described = {f"{m.upper()} {path}" for path, methods in paths.items() for m in methods if m in METHODS}
    assert set(by_operation) == described
    assert max(code for _, _, code in answers) < 500
