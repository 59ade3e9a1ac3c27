"""As much of an image builder as our Dockerfile needs: its steps run in roots of Debian, without an engine.

A stage is a folder that begins as a copy of the base root. Every RUN gets namespaces of its own with /proc,
/dev and nothing else of this machine but the package indexes that its pip is configured with. Needs root.
"""

from __future__ import annotations

import configparser
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helm.chart import REPOSITORY

DOCKER = REPOSITORY / "deploy" / "docker"
DEBIAN = "bookworm"
# What the official Python image has beside the interpreter: certificates, headers and venv.
PACKAGES = ("ca-certificates", "python3", "python3-venv", "python3-dev")
_PIP_FILES = (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf")
_RUN_SECONDS = 1500


@dataclass
class Stage:
    """One stage: its root, and what its instructions set."""

    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    folder: str = "/"
    user: str = "0:0"
    entrypoint: tuple[str, ...] = ()
    log: list[str] = field(default_factory=list[str])


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Name and argument of every instruction of a Dockerfile."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, argument = line.partition(" ")
            yield name.upper(), argument.strip()


def needed(dockerfile: str, target: str) -> set[str]:
    """Names of the stages that a stage is made from, with its own."""
    origins: dict[str, set[str]] = {}
    here = ""
    for name, argument in instructions(dockerfile):
        if name == "FROM":
            origin, _, here = argument.partition(" AS ")
            origins[here] = {origin}
        elif name == "COPY" and argument.startswith("--from="):
            origins[here].add(argument.split()[0].removeprefix("--from="))
    found, left = set[str](), {target}
    while left:
        stage = left.pop()
        found.add(stage)
        left |= origins.get(stage, set()) - found
    return found


def context(folder: Path) -> None:
    """Copy what the builder would send to the engine: files git knows that .dockerignore leaves in."""
    rules = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    dropped = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        path = REPOSITORY / name
        if not name or not path.is_file() or not any(name == k or name.startswith(f"{k}/") for k in kept):
            continue
        if any(fnmatch.fnmatch(part, rule) for part in Path(name).parts for rule in dropped):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / name)


def debian(root: Path) -> None:
    """Make the base root, once."""
    if not (root / "usr/bin/python3").exists():
        include = f"--include={','.join(PACKAGES)}"
        subprocess.run(["debootstrap", "--variant=minbase", include, DEBIAN, root], check=True)


class Builder:
    """Runs a Dockerfile; ``work`` holds the stages, ``base`` the root that stands for the Python image."""

    def __init__(self, work: Path, base: Path, arguments: Mapping[str, str]) -> None:
        self.stages: dict[str, Stage] = {}
        self._work, self._base, self._arguments = work, base, dict(arguments)
        self._context = work / "context"
        context(self._context)

    def build(self, dockerfile: Path, target: str) -> Stage:
        """Run the instructions that a stage needs; returns it."""
        text = dockerfile.read_text(encoding="utf-8")
        wanted = needed(text, target)
        stage: Stage | None = None
        known: dict[str, str] = {}
        for name, argument in instructions(text):
            if name == "ARG":
                key, _, default = argument.partition("=")
                known[key] = self._arguments.get(key, default.strip('"'))
            elif name == "FROM":
                skipped = argument.partition(" AS ")[2] not in wanted
                stage = None if skipped else self._from(_filled(argument, known))
            elif stage is not None:
                self._step(stage, name, argument, known)
        return self.stages[target]

    def _from(self, argument: str) -> Stage:
        origin, _, alias = argument.partition(" AS ")
        if origin in self.stages:
            # Later stages only add settings, so they may share the folder.
            stage = self.stages[origin]
        else:
            root = self._work / (alias or "final")
            subprocess.run(["cp", "--archive", "--reflink=auto", self._base, root], check=True)
            stage = Stage(root)
        self.stages[alias or "final"] = stage
        return stage

    def _step(self, stage: Stage, name: str, argument: str, known: Mapping[str, str]) -> None:
        if name == "RUN":
            stage.log.append(self._run(stage, argument, known))
        elif name == "COPY":
            self._copy(stage, _filled(argument, known))
        elif name == "ENV":
            for pair in shlex.split(argument):
                key, _, value = pair.partition("=")
                stage.environment[key] = re.sub(r"\$(\w+)", lambda m: stage.environment.get(m[1], ""), value)
        elif name == "WORKDIR":
            stage.folder = argument
            (stage.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = argument
        elif name == "ENTRYPOINT":
            stage.entrypoint = tuple(re.findall(r'"([^"]*)"', argument))
        else:
            assert name in ("EXPOSE", "STOPSIGNAL", "CMD", "LABEL"), f"{name} is not known here"

    def _run(self, stage: Stage, script: str, known: Mapping[str, str]) -> str:
        variables = {**known, **stage.environment}
        done = subprocess.run(
            _in_root(stage, ["/bin/sh", "-c", script], variables),
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=_RUN_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"RUN {script}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    def _copy(self, stage: Stage, argument: str) -> None:
        words = argument.split()
        origin = self._context
        if words[0].startswith("--from="):
            origin = self.stages[words.pop(0).removeprefix("--from=")].root
        *sources, target = words
        place = stage.root / os.path.join(stage.folder, target).lstrip("/")
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():
                shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True)
            else:
                into = place / path.name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, into)


def run(
    stage: Stage, words: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None
) -> list[str]:
    """The command line of a container: read-only root, no capability, ``folder`` for its writable places."""
    command = [*stage.entrypoint, *words]
    return _in_root(stage, command, {**stage.environment, **(variables or {})}, writable=folder)


def _in_root(
    stage: Stage, command: Sequence[str], variables: Mapping[str, str], writable: Path | None = None
) -> list[str]:
    root = shlex.quote(str(stage.root))
    steps = ["set -e", f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc"]
    steps += [f"mount --rbind /dev {root}/dev"]
    if writable is None:
        for path in lent():
            kind = "mkdir -p" if path.is_dir() else "touch"
            inside = shlex.quote(f"{stage.root}{path}")
            steps += [f"mkdir -p $(dirname {inside})", f"{kind} {inside}"]
            steps += [f"mount --bind -o ro {shlex.quote(str(path))} {inside}"]
    else:
        steps += [f"mount -o remount,ro,bind {root}"]
        for place in ("tmp", "var/lib/search-foundation", "models", "run/search-foundation"):
            (writable / place).mkdir(parents=True, exist_ok=True)
            os.chown(writable / place, *map(int, stage.user.split(":")))
            steps += [f"mount --bind {shlex.quote(str(writable / place))} {root}/{place}"]
    user, _, group = stage.user.partition(":")
    drop = f"setpriv --reuid {user} --regid {group} --clear-groups"
    if user != "0":
        drop += " --no-new-privs --inh-caps=-all --bounding-set=-all"
    pairs = " ".join(shlex.quote(f"{key}={value}") for key, value in variables.items())
    inner = f"cd {shlex.quote(stage.folder)} && exec {shlex.join(command)}"
    # setpriv comes from the root itself, so the drop happens inside.
    steps += [f"exec chroot {root} {drop} env -i {pairs} /bin/sh -c {shlex.quote(inner)}"]
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", "\n".join(steps)]


def lent() -> Iterator[Path]:
    """Files and folders of this machine that pip needs to find packages, and the name servers."""
    yield Path("/etc/resolv.conf")
    for path in _PIP_FILES:
        if not path.exists():
            continue
        yield path
        parser = configparser.ConfigParser()
        parser.read(path)
        for value in (value for section in parser.sections() for value in parser[section].values()):
            for word in value.split():
                found = Path(word.removeprefix("file://"))
                if found.is_absolute() and found.is_dir():
                    yield found.parent if found.name == "simple" else found
    yield Path("/etc/ssl/certs/ca-certificates.crt")


def _filled(text: str, known: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda m: known[m[1]], text)
