"""``search-foundation keys``: create, list, top up and revoke API keys."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import yaml

from services.batch.quotas import Holdings, figures
from services.batch.table import JobTable
from services.batch.tables import BATCH
from services.core.access.control import uses_database
from services.core.access.key_table import KeyTable
from services.core.access.keys import KeyRecord, digest, new_key
from services.core.access.schema import ACCESS
from services.core.errors import ServiceError
from services.core.settings import ConfigurationError, Settings, Tier, load_settings
from services.core.storage import Database

Parsers = Any
"""What ``add_subparsers`` returns; argparse has no public name for it."""

_ID = "the key's id, as 'keys list' shows it"
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def add_parser(subparsers: Parsers) -> None:
    """Add the command and its own sub-commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser("keys", help="create, list and revoke API keys")
    commands = parser.add_subparsers(dest="keys_command", required=True, metavar="COMMAND")

    create = commands.add_parser(
        "create", help="make a key and print it, this one time; only its SHA-256 is kept"
    )
    create.add_argument("--name", default="", type=_name, help="what it is for")
    create.add_argument("--tier", help="plan it has; SF_DEFAULT_TIER by default")
    create.add_argument(
        "--balance", type=_tokens, metavar="TOKENS", help="tokens it may use; endless by default"
    )
    create.add_argument(
        "--expires",
        type=_moment,
        metavar="WHEN",
        help="90m, 12h, 30d, 8w, or a date like 2027-06-30; never by default",
    )
    create.add_argument(
        "--entry", action="store_true", help="print an entry for SF_KEYS_FILE instead of storing the key"
    )
    create.set_defaults(keys_run=_create)

    listing = commands.add_parser("list", help="list the keys of the database, without the keys themselves")
    listing.add_argument("--json", action="store_true", help="print it as JSON")
    listing.set_defaults(keys_run=_list)

    usage = commands.add_parser(
        "usage", help="show what keys have stored and unfinished, and what their tiers allow"
    )
    usage.add_argument("--json", action="store_true", help="print it as JSON")
    usage.set_defaults(keys_run=_usage)

    top_up = commands.add_parser("top-up", help="grant more tokens to a key that has a balance")
    top_up.add_argument("id", help=_ID)
    top_up.add_argument("tokens", type=_tokens, help="tokens to grant, as 1000000 or 1_000_000")
    top_up.set_defaults(keys_run=_top_up)

    revoke = commands.add_parser("revoke", help="close a key for good")
    revoke.add_argument("id", help=_ID)
    revoke.set_defaults(keys_run=_revoke)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; 0 if done, 1 if there is no such key or no database, 2 for wrong settings."""
    settings = load_settings()
    if getattr(args, "tier", None) is not None and args.tier not in settings.tiers:
        raise ConfigurationError(f"No tier '{args.tier}'; there are: {', '.join(sorted(settings.tiers))}.")
    if getattr(args, "entry", False):
        return _print_entry(args, settings)
    if not uses_database(settings):
        raise ConfigurationError(
            f"Keys come from {settings.keys_file} (SF_KEYS_FILE): edit that file, with entries of"
            " 'search-foundation keys create --entry'."
        )
    return asyncio.run(_with_table(args, settings))


async def _with_table(args: argparse.Namespace, settings: Settings) -> int:
    command: Callable[[argparse.Namespace, Settings, KeyTable], Awaitable[int]] = args.keys_run
    database = await Database.open(settings, ACCESS)
    try:
        return await command(args, settings, KeyTable(database))
    except ServiceError:
        return _fail(f"The database {database.name} cannot be used; see the reason above.")
    finally:
        await database.close()


async def _create(args: argparse.Namespace, settings: Settings, table: KeyTable) -> int:
    key, record = await table.create(
        tier=args.tier or settings.default_tier,
        name=args.name,
        balance=args.balance,
        expires_at=args.expires.timestamp() if args.expires else None,
    )
    where = table.database.name
    print(f"{record.id}, tier {record.tier}, in {where}. The key is shown this once:", file=sys.stderr)
    print(key)
    return 0


def _print_entry(args: argparse.Namespace, settings: Settings) -> int:
    key = new_key()
    entry = {
        "id": re.sub(r"[^A-Za-z0-9._-]+", "-", args.name)[:64] or f"key-{digest(key).hex()[:8]}",
        "digest": f"sha256:{digest(key).hex()}",
        "tier": args.tier or settings.default_tier,
        "balance": args.balance,
        "expires": args.expires.isoformat() if args.expires else None,
    }
    print("The key is shown this once; the entry goes under 'keys' in the file:", file=sys.stderr)
    print(key, file=sys.stderr)
    present = {name: value for name, value in entry.items() if value is not None}
    print(yaml.safe_dump([present], sort_keys=False), end="")
    return 0


async def _list(args: argparse.Namespace, settings: Settings, table: KeyTable) -> int:
    records = await table.list()
    now = datetime.now(UTC).timestamp()
    rows = [_row(record, now) for record in records]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    header = ("ID", "NAME", "TIER", "STATE", "TOKENS LEFT", "CREATED", "EXPIRES")
    _table(header, [tuple("-" if row[c] is None else str(row[c]) for c in row) for row in rows])
    return 0


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


async def _usage(args: argparse.Namespace, settings: Settings, table: KeyTable) -> int:
    jobs = JobTable(table.database)
    await table.database.use(BATCH)
    rows: list[dict[str, Any]] = []
    for record in await table.list():
        tier = settings.tiers.get(record.tier, Tier())
        used = figures(await jobs.usage(record.id), tier)
        rows.append({"id": record.id, "name": record.name, "tier": record.tier, **used})
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    names = [name.replace("_", " ").upper() for name in figures(Holdings(), Tier())]
    _table(("ID", "NAME", "TIER", *names), [tuple(map(_cell, row.values())) for row in rows])
    return 0


def _cell(value: Any) -> str:
    """Write a cell; of a quota, what is used of what is allowed."""
    if not isinstance(value, dict):
        return str(value)
    return f"{value['used']:,}" if value["limit"] is None else f"{value['used']:,} of {value['limit']:,}"


async def _top_up(args: argparse.Namespace, settings: Settings, table: KeyTable) -> int:
    if await table.top_up(args.id, args.tokens):
        print(f"{args.id} has {args.tokens:,} tokens more.")
        return 0
    return _fail(f"No key with a balance has the id '{args.id}'.")


async def _revoke(args: argparse.Namespace, settings: Settings, table: KeyTable) -> int:
    if await table.revoke(args.id):
        print(f"{args.id} is revoked; running servers notice within {settings.key_cache_seconds:g} seconds.")
        return 0
    return _fail(f"No open key has the id '{args.id}'. 'search-foundation keys list' shows them all.")


def _row(record: KeyRecord, now: float) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "tier": record.tier,
        "state": _state(record, now),
        "tokens_left": None if record.balance is None else record.balance - record.spent,
        "created": _date(record.created_at),
        "expires": None if record.expires_at is None else _date(record.expires_at),
    }


def _state(record: KeyRecord, now: float) -> str:
    if record.revoked_at is not None:
        return "revoked"
    return "open" if record.usable(now) else "expired"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def _name(text: str) -> str:
    if len(text) > 200:
        raise argparse.ArgumentTypeError("at most 200 characters")
    return text


def _tokens(text: str) -> int:
    if not re.fullmatch(r"[0-9][0-9_,]*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of tokens")
    tokens = int(re.sub("[_,]", "", text))
    if tokens > 2**62:
        raise argparse.ArgumentTypeError("too many tokens")
    return tokens


def _moment(text: str) -> datetime:
    """Read a span from now, or a date with or without time (UTC unless it says otherwise)."""
    if span := re.fullmatch(r"([0-9]{1,5})([mhdw])", text):
        return datetime.now(UTC) + timedelta(**{_UNITS[span[2]]: int(span[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a span like 30d nor a date like 2027-06-30"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment <= datetime.now(UTC):
        raise argparse.ArgumentTypeError(f"'{text}' has passed")
    return moment
