"""``search-foundation models``: the catalogue, and fetching, checking and converting weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from search_foundation.commands.models_check import check
from search_foundation.commands.models_convert import add_arguments, convert
from search_foundation.commands.models_progress import pull_progress
from services.core.catalog import Catalog, CatalogError
from services.core.catalog.types import Capability, ModelSpec
from services.core.catalog.weights import WeightsNotFound, locate, model_root, place
from services.core.settings import Settings, load_settings

_LOOK_SECONDS = 1.0

Parsers = Any
"""What ``add_subparsers`` returns; argparse has no public name for it."""


def add_parser(subparsers: Parsers) -> None:
    """Add the command and its own sub-commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "models", help="list the catalogue, fetch weights, check a folder of weights"
    )
    commands = parser.add_subparsers(dest="models_command", required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "list",
        help="list the models of the catalogue: which are served, and whose weights are here",
    )
    listing.add_argument(
        "--capability", choices=[str(name) for name in Capability], help="only models that can do this"
    )
    listing.add_argument("--json", action="store_true", help="print it as JSON")
    listing.set_defaults(models_run=_list)

    show = commands.add_parser("show", help="show one entry of the catalogue")
    show.add_argument("id", help="the model's id, alias or repository")
    show.add_argument("--json", action="store_true", help="print it as JSON")
    show.set_defaults(models_run=_show)

    pull = commands.add_parser("pull", help="fetch the weights of models into SF_MODEL_DIR")
    pull.add_argument("id", nargs="+", help="ids of models")
    pull.add_argument(
        "--accept-license", action="store_true", help="accept a licence that does not allow commercial use"
    )
    kept = pull.add_mutually_exclusive_group()
    kept.add_argument("--force", action="store_true", help="replace a folder that is there already")
    kept.add_argument(
        "--missing",
        action="store_true",
        help="leave out models whose weights are here, without asking the hub",
    )
    pull.set_defaults(models_run=_pull)

    waiting = commands.add_parser("wait", help="wait until another process has fetched the weights of models")
    waiting.add_argument("id", nargs="+", help="ids of models")
    waiting.add_argument(
        "--seconds", type=float, default=math.inf, help="give up after these; without it never"
    )
    waiting.set_defaults(models_run=_wait)

    checking = commands.add_parser("check", help="say what a folder holds and whether it would load")
    checking.add_argument("folder", metavar="DIR|ID", help="a folder of weights, or a model's id")
    checking.add_argument("--model", help="the model it should be; by default known by the folder's name")
    checking.add_argument("--json", action="store_true", help="print it as JSON")
    checking.set_defaults(models_run=check)

    converting = commands.add_parser("convert", help="make a folder of weights of an ELSER or SPLADE you own")
    add_arguments(converting)
    converting.set_defaults(models_run=convert)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; 0 if all is well, 1 if weights are not, 2 for a wrong name or catalogue."""
    settings = load_settings()
    command: Callable[[argparse.Namespace, Settings, Catalog], int] = args.models_run
    try:
        return command(args, settings, Catalog.load(settings.catalog_file, settings.model_aliases))
    except CatalogError as error:
        print(error, file=sys.stderr)
        return 2


def _list(args: argparse.Namespace, settings: Settings, catalog: Catalog) -> int:
    specs = [spec for spec in catalog.models.values() if args.capability in (None, *spec.capabilities)]
    # A wrong name in SF_MODELS is no reason to hide the right ones.
    served = {spec.id for spec in catalog.select(filter(catalog.get, settings.models))}
    rows = [_row(spec, settings, served) for spec in sorted(specs, key=lambda spec: spec.id.lower())]
    print(json.dumps(rows, indent=1) if args.json else _table(rows))
    return 0


def _row(spec: ModelSpec, settings: Settings, served: Container[str]) -> dict[str, Any]:
    return {
        "id": spec.id,
        "built": spec.family.built,
        "served": spec.id in served,
        "serves": sorted(map(str, spec.capabilities)),
        "context": spec.context_length,
        "dimensions": spec.dimensions or None,
        "parameters": spec.parameters,
        "licence": spec.licence,
        "weights": place(spec, settings) or None,
    }


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines: list[list[str]] = []
    for row in rows:
        shown = {**row, "serves": ",".join(row["serves"]), "parameters": amount(row["parameters"])}
        shown |= {"state": _state(row), "weights": row["weights"] or "-"}
        order = ("id", "state", "serves", "context", "dimensions", "parameters", "licence", "weights")
        lines = lines or [[name.upper() for name in order]]
        lines.append(["-" if shown[name] is None else str(shown[name]) for name in order])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _state(row: Mapping[str, Any]) -> str:
    if not row["built"]:
        return "not built yet"
    downloaded = "downloaded" if row["weights"] else "not downloaded"
    return f"served, {downloaded}" if row["served"] else downloaded


def amount(number: int) -> str:
    """A large count in a few characters: 22713216 -> ``22.7M``."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number)


def _show(args: argparse.Namespace, settings: Settings, catalog: Catalog) -> int:
    spec = catalog.require(args.id)
    facts = _facts(spec) | {"weights": place(spec, settings) or None}
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        if value is False or value:  # not what is empty, and no limit of 0, which is none
            print(f"{name.ljust(width)}  {json.dumps(value) if isinstance(value, dict) else _words(value)}")
    return 0


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(spec: ModelSpec) -> dict[str, Any]:
    plain = dataclasses.asdict(spec)
    plain["capabilities"] = sorted(map(str, spec.capabilities))
    return json.loads(json.dumps(plain, default=str))


def _pull(args: argparse.Namespace, settings: Settings, catalog: Catalog) -> int:
    # imported late: only this sub-command needs an HTTP client
    from services.core.catalog.hub import PullError, client

    specs = [catalog.require(name) for name in args.id]
    if args.missing:
        specs = [spec for spec in specs if not _is_here(spec, settings)]
        if not specs:
            return 0
    try:
        with client() as http:
            return max(_pull_one(spec, args, settings, http) for spec in specs)
    except PullError as error:
        print(error, file=sys.stderr)
        return 1


def _wait(args: argparse.Namespace, settings: Settings, catalog: Catalog) -> int:
    deadline = time.monotonic() + args.seconds
    for spec in [catalog.require(name) for name in args.id]:
        told = ""
        while problem := _problem(spec, settings):
            if time.monotonic() > deadline:
                print(f"{problem} Waited {args.seconds:g} s.", file=sys.stderr)
                return 1
            if problem != told:
                print(f"{problem} Waiting.", file=sys.stderr, flush=True)
                told = problem
            time.sleep(_LOOK_SECONDS)
        print(f"{locate(spec, settings)}: there.")
    return 0


def _problem(spec: ModelSpec, settings: Settings) -> str:
    """Why the weights cannot be loaded; empty if they can."""
    try:
        locate(spec, settings)
    except WeightsNotFound as problem:
        return str(problem)
    return ""


def _is_here(spec: ModelSpec, settings: Settings) -> bool:
    try:
        folder = locate(spec, settings)
    except WeightsNotFound:
        return False
    print(f"{folder}: already there.")
    return True


def _pull_one(spec: ModelSpec, args: argparse.Namespace, settings: Settings, http: Any) -> int:
    from services.core.catalog.hub import describe
    from services.core.catalog.pull import pull

    if spec.repository and not spec.commercial and not args.accept_license:
        print(
            f"The weights of {spec.weights_id} are under {spec.licence}, which does not allow commercial use "
            "without an agreement. Add --accept-license if you accept that licence.",
            file=sys.stderr,
        )
        return 1
    if not spec.family.built:
        print(f"{spec.id} cannot be served yet: this version has no network of its family.", file=sys.stderr)
    snapshot = describe(spec, http)
    pinned = "" if spec.pinned else f", the head of {spec.revision} (none is pinned)"
    print(f"{spec.weights_id}: {snapshot.repository} at {snapshot.commit}{pinned}")
    print(f"{len(snapshot.files)} files, {snapshot.size:,} bytes")
    print(f"licence: {spec.licence}; the model card says {snapshot.licence or 'nothing'}", flush=True)
    target = model_root(settings) / spec.weights_id
    with pull_progress(snapshot) as progress:
        fetched = pull(snapshot, target, http, progress, replace=args.force)
    print(f"{target}: fetched and verified." if fetched else f"{target}: already there.")
    return 0
