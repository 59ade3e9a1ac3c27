"""``search-foundation models convert``: a sparse encoder in another form into a folder of weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from services.core.catalog import Catalog, CatalogError
from services.core.catalog.types import Family
from services.core.catalog.weights import model_root
from services.core.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``models convert``."""
    parser.add_argument("source", type=Path, help="TorchScript archive or pickled state of tensors")
    parser.add_argument("vocabulary", type=Path, help="vocab.txt, or a JSON file with a list of tokens")
    parser.add_argument("--model", default="elser-v2", help="the model it is; by default elser-v2")
    parser.add_argument("--to", type=Path, metavar="DIR", help="by default where a process looks for weights")
    parser.add_argument("--heads", type=int, help="attention heads; by default one for each 64 of the width")


def convert(args: argparse.Namespace, settings: Settings, catalog: Catalog) -> int:
    """Run ``models convert``: 0 if the folder was written, else 1. ``CatalogError`` for a wrong model."""
    spec = catalog.require(args.model)
    if spec.family is not Family.ELSER:
        raise CatalogError(f"{spec.id} is no sparse encoder; only those can be converted.")
    target = args.to or model_root(settings) / spec.id
    from services.core.modeling.checkpoints.checkpoint import CheckpointError
    from services.core.modeling.checkpoints.convert import convert_sparse

    try:
        convert_sparse(args.source, args.vocabulary, target, heads=args.heads)
    except CheckpointError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    print(f"Written to {target}. Look at it with 'search-foundation models check {target}'.")
    return 0
