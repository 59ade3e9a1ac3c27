"""``search-foundation webhooks``: print and change the secret that signs webhooks."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from services.batch.tables import BATCH
from services.batch.webhook import Secrets, WebhookSecrets, given
from services.core.errors import ServiceError
from services.core.settings import ConfigurationError, Settings, load_settings
from services.core.storage import Database

Change = Callable[[WebhookSecrets], Awaitable[Secrets]]


def add_parser(subparsers: Any) -> None:
    """Add the command and its own sub-commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "webhooks", help="print and change the secret that signs webhooks"
    )
    commands = parser.add_subparsers(dest="webhooks_command", required=True, metavar="COMMAND")

    def command(name: str, text: str, change: Change) -> None:
        commands.add_parser(name, help=text, description=text).set_defaults(webhooks_change=change)

    command("secret", "print what signs webhooks, the newest first", WebhookSecrets.current)
    command("rotate", "make a new secret; the one before signs as well until 'retire'", WebhookSecrets.rotate)
    command("retire", "sign with the newest secret alone", WebhookSecrets.retire)


def run(args: argparse.Namespace) -> int:
    """Print the secrets that sign from now on, one a line; 1 without the database, 2 for wrong settings."""
    settings = load_settings()
    change: Change = args.webhooks_change
    if given(settings) and change is not WebhookSecrets.current:
        raise ConfigurationError("SF_WEBHOOK_SECRET is set and signs alone: change that variable.")
    return asyncio.run(_print(settings, change))


async def _print(settings: Settings, change: Change) -> int:
    database = await Database.open(settings, BATCH)
    try:
        print("\n".join(await change(WebhookSecrets(settings, database))))
    except ServiceError:
        print(f"The database {database.name} cannot be used; see the reason above.", file=sys.stderr)
        return 1
    finally:
        await database.close()
    return 0
