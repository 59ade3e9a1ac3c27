"""The command ``search-foundation``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "up": "run the services and the gateway on this machine",
    "serve": "run the gRPC server of some capabilities",
    "gateway": "run Envoy in front of the services",
    "keys": "create, list and revoke API keys",
    "embed": "print vectors of texts, pictures, sounds and films",
    "batch": "submit embedding jobs, watch them, bring their files",
    "chat": "ask a model that answers",
    "webhooks": "print and change the secret that signs webhooks",
    "models": "list the catalogue, fetch weights, check a folder of weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for wrong settings or arguments."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# Processes that the commands start (decoders, workers, Envoy) are new programs, not copies that go on with
# gRPC: its handlers for those abort now and then between fork and exec. Read once, when gRPC is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def _run(words: list[str]) -> int:
    args = _parser(words).parse_args(words)
    if args.config is not None:
        os.environ["SF_CONFIG"] = str(args.config)
    module = importlib.import_module(f"search_foundation.commands.{args.command}")
    from services.core.settings import ConfigurationError

    try:
        return module.run(args)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2


class _Version(argparse.Action):
    """Prints the version, which is looked up only when asked for: that takes longer than the rest."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('search-foundation')}")
        parser.exit()


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Know every command, but import only the module of the one that is asked for."""
    parser = argparse.ArgumentParser(
        prog="search-foundation", description="The Search Foundation API, self-hosted."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="settings file; SF_* variables win over it"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if word in COMMANDS), None)
    for name, text in COMMANDS.items():
        if name == asked:
            importlib.import_module(f"search_foundation.commands.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
