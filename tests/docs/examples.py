"""Fenced blocks of the documentation, run as a reader would run them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUNNABLE = ("sh", "python", "js")
_SHOWN = ("json", "text")


@dataclass(frozen=True)
class Example:
    """A block to run, and the one right behind it that shows what comes out (``json`` or ``text``)."""

    page: str
    line: int
    language: str
    code: str
    shown: str = ""
    output: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def replacing(self, replaced: Mapping[str, str]) -> str:
        """The code with addresses and such ``replaced``."""
        code = self.code
        for written, real in replaced.items():
            code = code.replace(written, real)
        return code

    def run(self, replaced: Mapping[str, str], **environment: str) -> str:
        """Run with addresses and such ``replaced``; returns standard output. Not for JavaScript."""
        code = self.replacing(replaced)
        command = (
            ["bash", "-euo", "pipefail", "-c", code]
            if self.language == "sh"
            else [sys.executable, "-c", code]
        )
        run = subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert run.returncode == 0, f"{self} ended with {run.returncode}:\n{run.stderr}"
        return run.stdout

    def check(self, output: str) -> None:
        """Fail unless ``output`` is what the page shows; numbers may differ by what bf16 makes of them."""
        if self.shown == "json":
            assert alike(json.loads(output), json.loads(self.output)), f"{self} gave {output}"
        elif self.shown == "text":
            assert output == self.output, f"{self} gave {output}"
        elif self.language == "sh":
            assert "code" not in json.loads(output), f"{self} gave {output}"


def examples(page: str) -> Iterator[Example]:
    """The runnable blocks of a page: Python, JavaScript, and shell blocks that call curl."""
    text = (ROOT / page).read_text("utf-8")
    blocks = list(_FENCED.finditer(text))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        language, code = block.groups()
        if language not in _RUNNABLE or (language == "sh" and "curl " not in code):
            continue
        line = text.count("\n", 0, block.start()) + 1
        if following is not None and following[1] in _SHOWN and following.start() == block.end() + 1:
            yield Example(page, line, language, code, following[1], following[2])
        else:
            yield Example(page, line, language, code)


def alike(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same but for what bf16 makes of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1.5e-2)
    return one == other
