"""``search-foundation batch``: submit embedding jobs, watch them, bring their files."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from search_foundation.arguments import positive
from search_foundation.batch_client import KEY_VARIABLE, URL_HELP, BatchClient, CallError, Status, gateway_url
from search_foundation.batch_download import download, to_stdout
from search_foundation.batch_input import InputError, source
from search_foundation.commands.batch_progress import Show, bytes_progress, counts, job_progress

Parsers = Any
"""What ``add_subparsers`` returns; argparse has no public name for it."""

_ID = "the job's id, as 'batch submit' prints it"
_RUNNING = ("pending", "processing")
_SHORTEST_WAIT = 0.25
_LONGEST_WAIT = 10.0
_ENDS = {
    "failed": "The job has failed",
    "cancelled": "The job is cancelled",
    "expired": "The job has expired",
}


def add_parser(subparsers: Parsers) -> None:
    """Add the command and its own sub-commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "batch",
        help="submit embedding jobs, watch them, bring their files",
        description=f"Calls the REST API with the key in the variable {KEY_VARIABLE}.",
    )
    commands = parser.add_subparsers(dest="batch_command", required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Callable[[argparse.Namespace, BatchClient], int]) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--url", help=URL_HELP)
        added.set_defaults(batch_run=run)
        return added

    _add_submit(command("submit", "make a job; its id is printed", _submit))

    watch = command("watch", "show the progress of a job until it ends", _watch_command)
    watch.add_argument("id", help=_ID)
    _add_output(watch, "then bring the output there")

    status = command("status", "tell of a job", _status)
    status.add_argument("id", help=_ID)
    status.add_argument("--json", action="store_true", help="print it as JSON")

    listing = command("list", "list the newest jobs", _list)
    listing.add_argument("--limit", type=positive, default=20, metavar="N", help="how many; 20 by default")
    listing.add_argument("--json", action="store_true", help="print it as JSON")

    cancel = command("cancel", "cancel a job", _cancel)
    cancel.add_argument("id", help=_ID)

    bring = command("download", "bring the output of a job; goes on after a break", _download)
    bring.add_argument("id", help=_ID)
    _add_output(bring, "where to; - is standard output; ID_output.jsonl by default")
    bring.add_argument("--errors", action="store_true", help="bring the failed lines instead")


def _add_submit(submit: argparse.ArgumentParser) -> None:
    submit.add_argument(
        "file", metavar="FILE|-|URL", help="JSONL; an https://, s3:// or gs:// URL is sent on"
    )
    submit.add_argument("--model", required=True, help="id of the model that embeds the lines")
    submit.add_argument("--task", help="what the vectors are for, as retrieval.passage; the model's default")
    submit.add_argument(
        "--dimensions",
        type=positive,
        metavar="N",
        help="numbers of a vector; by default all it has",
    )
    submit.add_argument("--raw", action="store_true", help="vectors as they are, not of length 1")
    submit.add_argument("--webhook", metavar="URL", help="is told when the job ends")
    submit.add_argument("--watch", action="store_true", help="show the progress until the job ends")
    _add_output(submit, "watch, then bring the output there")


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; 0 if done, 1 if the server or the job says no, 2 for a wrong file or argument."""
    command: Callable[[argparse.Namespace, BatchClient], int] = args.batch_run
    try:
        with BatchClient(gateway_url(args.url)) as client:
            return command(args, client)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except CallError as error:
        print(error, file=sys.stderr)
        return 1


def _submit(args: argparse.Namespace, client: BatchClient) -> int:
    options = {
        "task": args.task,
        "dimensions": args.dimensions,
        "normalized": False if args.raw else None,
        "webhook_url": args.webhook,
    }
    given = {name: value for name, value in options.items() if value is not None}
    status = client.create(orjson.dumps({"model": args.model, **source(args.file), **given}))
    print(status["batch_id"], flush=True)
    if args.watch or args.output is not None:
        return _watch(args, client, status["batch_id"])
    return 0


def _watch_command(args: argparse.Namespace, client: BatchClient) -> int:
    return _watch(args, client, args.id)


def _watch(args: argparse.Namespace, client: BatchClient, batch_id: str) -> int:
    try:
        with job_progress() as show:
            status = _until_ended(client, batch_id, show)
    except KeyboardInterrupt:
        more = ("--output", args.output) if args.output is not None else ()
        print(
            f"The job goes on. To see it again:\n  {_again(args, 'watch', batch_id, *more)}", file=sys.stderr
        )
        raise
    return _ended(args, client, status)


def _until_ended(client: BatchClient, batch_id: str, show: Show) -> Status:
    """Follow a job, also over times in which the server does not answer."""
    failures = 0
    began = time.monotonic()
    while True:
        try:
            status, wait = client.status(batch_id)
        except CallError as error:
            if not error.temporary:
                raise
            if failures == 0:
                print(f"{error} Trying again.", file=sys.stderr, flush=True)
            wait = min(2.0**failures, _LONGEST_WAIT)
            failures += 1
        else:
            failures = 0
            show(status)
            if status["status"] not in _RUNNING:
                return status
            # At first more often than the server asks for: a small job would be over between two looks.
            wait = min(wait, max(_SHORTEST_WAIT, (time.monotonic() - began) / 8))
        time.sleep(wait)


def _ended(args: argparse.Namespace, client: BatchClient, status: Status) -> int:
    done, failed, total = counts(status)
    batch_id = status["batch_id"]
    if status["status"] != "completed":
        why = f": {str(status['error']).rstrip('.')}" if status.get("error") else ""
        print(f"{_ENDS.get(status['status'], 'The job has ended')}{why}.", file=sys.stderr)
        if status.get("error_file_url"):
            print(f"Why lines failed:\n  {_again(args, 'download', batch_id, '--errors')}", file=sys.stderr)
        return 1
    print(f"{done - failed:,} of {total:,} lines embedded, {failed:,} failed.", file=sys.stderr)
    if failed:
        print(f"Why they failed:\n  {_again(args, 'download', batch_id, '--errors')}", file=sys.stderr)
    if args.output is not None:
        return _bring(args, client, batch_id, "output")
    if done > failed:
        print(f"The output:\n  {_again(args, 'download', batch_id)}", file=sys.stderr)
    return 0


def _download(args: argparse.Namespace, client: BatchClient) -> int:
    return _bring(args, client, args.id, "errors" if args.errors else "output")


def _bring(args: argparse.Namespace, client: BatchClient, batch_id: str, file: str) -> int:
    if args.output == "-":
        to_stdout(client, batch_id, file)
        return 0
    target = Path(args.output or f"{batch_id.replace('/', '_')}_{file}.jsonl")
    errors = ("--errors",) if file == "errors" else ()
    again = _again(args, "download", batch_id, *errors, "--output", str(target))
    try:
        with bytes_progress(target.name) as progress:
            size = download(client, batch_id, file, target, progress)
    except (KeyboardInterrupt, CallError) as error:
        if isinstance(error, KeyboardInterrupt) or error.temporary:
            print(f"To go on from here:\n  {again}", file=sys.stderr)
        raise
    except OSError as error:
        print(f"Cannot write {target}: {error.strerror}. To go on from here:\n  {again}", file=sys.stderr)
        return 1
    print(f"{target}: {size:,} bytes", file=sys.stderr)
    return 0


def _again(args: argparse.Namespace, command: str, batch_id: str, *more: str) -> str:
    url = () if args.url is None else ("--url", args.url)
    return shlex.join(["search-foundation", "batch", command, batch_id, *more, *url])


def _status(args: argparse.Namespace, client: BatchClient) -> int:
    _print(client.status(args.id)[0], as_json=args.json)
    return 0


def _cancel(args: argparse.Namespace, client: BatchClient) -> int:
    _print(client.cancel(args.id), as_json=False)
    return 0


def _print(status: Status, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(status, indent=1))
        return
    facts = {**status, **(status.get("stats") or {})}
    facts.pop("stats", None)
    width = max(map(len, facts))
    for name, value in facts.items():
        if value is not None:
            print(f"{name.ljust(width)}  {value}")


def _list(args: argparse.Namespace, client: BatchClient) -> int:
    found = client.list(args.limit)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    lines = [("ID", "STATUS", "MODEL", "CREATED", "DONE", "FAILED")]
    for status in found:
        done, failed, total = counts(status)
        lines.append(
            (
                status["batch_id"],
                status["status"],
                status["model"],
                status["created_at"],
                f"{done}/{total}",
                str(failed),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))
    return 0
