"""What ``--help`` says of every command."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

import pytest

from search_foundation.capabilities import implemented
from search_foundation.cli import COMMANDS, main


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_has_words(name: str) -> None:
    root = argparse.ArgumentParser()
    importlib.import_module(f"search_foundation.commands.{name}").add_parser(root.add_subparsers())
    silent = [
        f"{parser.prog}: {action.metavar or action.dest}"
        for parser in parsers(root)
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not silent


@pytest.mark.parametrize("command", ["serve", "up"])
def test_the_capabilities_are_listed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(implemented()) in shown
