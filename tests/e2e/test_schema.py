"""The running gateway against the document it serves, by requests made from that document.

Schemathesis sends what the schemas allow, what they just do not, and values at their edges. Whether a
schema takes exactly what the parser takes is the business of each capability's own tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Api
from tests.stack import Stack

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """All capabilities over one model, and a key."""
    with Stack(tmp_path_factory.mktemp("schema")) as stack:
        stack.serve("embed", "rerank", "classify", "batch")
        stack.gateway()
        yield Api(stack, stack.create_key())


@pytest.mark.parametrize(
    ("examples", "seconds"),
    [
        pytest.param(5, 280, id="short"),
        pytest.param(500, 3000, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_answers_are_what_the_document_says(
    everything: Api, tmp_path: Path, examples: int, seconds: float
) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{everything.stack.url}/openapi.json",
        "--header", f"Authorization: {everything.authorization['authorization']}",
        "--checks", ",".join(CHECKS),
        "--phases", "coverage,fuzzing",
        "--max-examples", str(examples),
        "--request-timeout", "120",
        "--seed", "1",
        "--suppress-health-check", "all",
        "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
