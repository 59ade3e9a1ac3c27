"""Real Redis and PostgreSQL servers for tests, each on a free port with its files in a folder of its own."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

_START_SECONDS = 120.0
_PORTS = range(12_000, 32_000)
_CHOICE = random.SystemRandom()

_given: set[int] = set()


class MissingServerError(RuntimeError):
    """A server program is not installed; the text says how to get it."""


def free_port() -> int:
    """Find a port nobody listens on, and never the same twice.

    Below those that the kernel hands out, to listeners on port 0 and to every outgoing connection: one of
    those could be gone by the time a server binds it.
    """
    for _ in range(1000):
        port = _CHOICE.choice(_PORTS)
        if port not in _given and _binds(port):
            _given.add(port)
            return port
    raise RuntimeError(f"no free port among {_PORTS}")


def _binds(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class RedisServer:
    """A redis-server that forgets everything when it stops."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        program = _find("redis-server", "redis-server")
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": "", "appendonly": "no"}
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
        _wait_for_port(self.port, self.process)

    def stop(self) -> None:
        _end(self.process, signal.SIGTERM)

    def kill(self) -> None:
        _end(self.process, signal.SIGKILL)

    def freeze(self) -> None:
        """Let it hang: connections stay open and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@dataclass
class PostgresServer:
    """A PostgreSQL cluster; run as user ``postgres`` when the tests run as root, which it refuses."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://sf:secret-word@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Create an empty database and give its URL."""
        name = f"test_{next(self._numbers)}"
        self.run_sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def run_sql(self, statement: str) -> None:
        psql = _find_postgres("psql")
        command = [psql, "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url()]
        subprocess.run(command, check=True, capture_output=True)

    def create(self) -> None:
        password = self.folder / "password"
        password.write_text("secret-word")
        if _postgres_user() is not None:
            shutil.chown(self.folder, "postgres")
            shutil.chown(password, "postgres")
        command = [
            _find_postgres("initdb"), "--no-sync", "--auth=scram-sha-256", "--username=sf",
            f"--pwfile={password}", "--encoding=UTF8", "--locale=C", str(self.folder / "data"),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, user=_postgres_user(), cwd=self.folder)

    def start(self) -> None:
        command = [
            _find_postgres("postgres"), "-D", str(self.folder / "data"), "-p", str(self.port),
            "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}",
            "-c", "fsync=off", "-c", "shared_buffers=16MB",
        ]  # fmt: skip
        with (self.folder / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, user=_postgres_user(), cwd=self.folder
            )
        _wait_for_port(self.port, self.process)
        self._wait_until_ready()

    def stop(self) -> None:
        """Stop at once, cutting every connection."""
        _end(self.process, signal.SIGINT)

    def _wait_until_ready(self) -> None:
        probe = [_find_postgres("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        deadline = time.monotonic() + _START_SECONDS
        while subprocess.run(probe, check=False).returncode != 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not get ready; see {self.folder / 'postgres.log'}")
            time.sleep(0.05)


def start_redis(folder: Path) -> RedisServer:
    """Start a Redis server of one's own; the caller stops it."""
    server = RedisServer(folder, free_port())
    server.start()
    return server


def start_postgres() -> PostgresServer:
    """Create and start a cluster in a folder of its own under /tmp; the caller stops and removes it.

    pytest's temporary folders are closed to other users, so they cannot hold it.
    """
    server = PostgresServer(Path(tempfile.mkdtemp(prefix="sf-postgres-")), free_port())
    server.create()
    server.start()
    return server


@functools.cache
def shared_redis() -> RedisServer:
    """One Redis for the test run, started at first use; never stop it in a test."""
    server = start_redis(Path(tempfile.mkdtemp(prefix="sf-redis-")))
    atexit.register(remove, server)
    return server


@functools.cache
def shared_postgres() -> PostgresServer:
    """One cluster for the test run, started at first use; never stop it in a test."""
    server = start_postgres()
    atexit.register(remove, server)
    return server


def remove(server: RedisServer | PostgresServer) -> None:
    """Stop a server and delete its files."""
    server.stop()
    shutil.rmtree(server.folder, ignore_errors=True)


def _find(program: str, package: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise MissingServerError(f"These tests need {program}: run `apt-get install {package}`.")
    return path


def _find_postgres(program: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return str(found[-1]) if found else _find(program, "postgresql")


def _postgres_user() -> str | None:
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise MissingServerError("PostgreSQL refuses root: run `apt-get install postgresql`.") from None


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not listen on port {port}; exit status {process.poll()}")


def _end(process: subprocess.Popen[bytes] | None, how: signal.Signals) -> None:
    if process is not None and process.poll() is None:
        process.send_signal(how)
        process.wait(timeout=_START_SECONDS)
