"""``search-foundation embed``: vectors of texts and files, without a server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_foundation.library import One


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "embed",
        help="print vectors of texts, pictures, sounds and films",
        description="Print a line of JSON for each input. An argument that names a file is that file, any "
        "other one a text; without arguments each line of the standard input is a text.",
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="FILE|TEXT", help="texts, and files of what the model takes beside texts"
    )
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="id of the catalogue (%(default)s)")
    parser.add_argument("--task", help="what the vectors are for, of those that the model knows")
    parser.add_argument("--dimensions", type=int, metavar="N", help="shorter vectors")
    parser.add_argument(
        "--together", action="store_true", help="join all inputs to one vector, in their order"
    )


def run(args: argparse.Namespace) -> int:
    """Print the vectors; 1 for what cannot be embedded, with the reason."""
    from search_foundation.library import ModelError, load

    words: list[str] = args.inputs or sys.stdin.read().splitlines()
    inputs = [_input(word) for word in words]
    if not inputs:
        return 0
    try:
        with load(args.model) as model:
            given: Any = [{"content": inputs}] if args.together else inputs
            if len(inputs) == 1 and _is_pdf(inputs[0]):
                given = inputs[0]
            for index, vector in enumerate(model.encode(given, task=args.task, dimensions=args.dimensions)):
                print(json.dumps({"index": index, "embedding": _listed(vector)}))
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _input(word: str) -> One:
    path = Path(word)
    try:
        return path if path.is_file() else word
    except OSError:  # a text too long for a path
        return word


def _is_pdf(one: One) -> bool:
    """Whether an input is a file that gives a vector for each page."""
    if not isinstance(one, Path):
        return False
    with one.open("rb") as file:
        return b"%PDF-" in file.read(1024)


def _listed(vector: Any) -> Any:
    return vector if isinstance(vector, dict) else vector.tolist()
