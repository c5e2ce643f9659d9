"""The command ``modpressure`` as its users have it: an executable, whose processes are all real."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loader_svc.catalogue import catalogue_tree
from tests.services import Launch, launching

EXECUTABLE = Path(sysconfig.get_path("scripts")) / "modpressure"
TIMEOUT_SECONDS = 90
SMALL = ("crc32c_generic", "libcrc32c", "xfs", "pcspkr", "loop")
"""What the small tree has of the catalogue."""


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output as one JSON document."""
        return json.loads(self.out)


@dataclass
class Cli:
    """Runs commands with the settings of a machine."""

    environment: dict[str, str]
    directory: Path

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command, its output in pipes."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(
            [EXECUTABLE, *arguments],
            stdin=subprocess.DEVNULL,
            text=True,
            env=self.environment,
            cwd=self.directory,
            **pipes,
        )

    def __call__(self, *arguments: str) -> Done:
        """Run a command to its end; whatever it does, it shows no stack trace."""
        with self.start(*arguments) as process:
            done = end(process)
        return done

    def fails(self, code: int, *arguments: str) -> str:
        """Run a command that has to fail; return its only line on standard error."""
        done = self(*arguments)
        assert done.code == code, done
        assert done.err.startswith("modpressure") and done.err.count("\n") == 1, done.err
        return done.err.rstrip("\n")


def end(process: subprocess.Popen[str]) -> Done:
    """Wait for a process to end."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in (err or ""), err
    return Done(process.returncode, out or "", err or "")


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass
class Up:
    """``modpressure up`` that runs."""

    process: subprocess.Popen[str]
    running: dict[str, Any]
    cli: Cli
    log: Path
    ended: Done | None = field(default=None)

    @property
    def pids(self) -> list[int]:
        """The services' processes."""
        return list(self.running["pids"].values())

    def stop(self, number: signal.Signals = signal.SIGINT) -> Done:
        """Stop it as Ctrl-C does, and check that it leaves no process behind."""
        if self.ended is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            self.ended = self.wait()
        return self.ended

    def wait(self) -> Done:
        """Wait until it ends by itself, and check that it leaves no process behind."""
        with self.process:
            done = end(self.process)
        self.ended = Done(done.code, done.out, self.log.read_text())
        assert not [pid for pid in self.pids if alive(pid)]
        assert "Traceback" not in self.ended.err, self.ended.err
        return self.ended


StartUp = Callable[..., Up]


def base_environment(directory: Path) -> dict[str, str]:
    """Return an environment without what whoever runs the tests has set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODPRESSURE_")}
    environment.pop("COLUMNS", None)
    return {
        **environment,
        "XDG_CONFIG_HOME": str(directory),
        "XDG_STATE_HOME": str(directory),
        "TMPDIR": str(directory),
    }


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Commands without services."""
    return Cli(base_environment(tmp_path), tmp_path)


def up_in(directory: Path, started: list[Up]) -> StartUp:
    """Return a function that starts ``modpressure up`` on free ports and waits until it is ready."""

    def start(*arguments: str) -> Up:
        cli = Cli(base_environment(directory), directory)
        log = directory / f"up-{len(started)}.log"
        with log.open("w") as file:
            process = cli.start("up", "--port", "0", "--json", *arguments, stderr=file)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"it ended with {process.wait()}: {log.read_text()}"
        running = json.loads(line)
        cli.environment["MODPRESSURE_CLIENT_STATS"] = running["stats"]
        cli.environment["MODPRESSURE_CLIENT_LOADERS"] = ",".join(running["loaders"])
        started.append(Up(process, running, cli, log))
        return started[-1]

    return start


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[StartUp]:
    """Start machines of one's own; they are stopped at the end."""
    started: list[Up] = []
    yield up_in(tmp_path, started)
    for up in started:
        up.stop()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start single services that end with the test."""
    with launching(tmp_path / "state") as start:
        yield start


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of a few modules, and files that are none."""
    source, tree = catalogue_tree("plain"), tmp_path_factory.mktemp("tree")
    for path in source.rglob("*.ko"):
        if path.stem.replace("-", "_") in SMALL:
            shutil.copy(path, tree / path.name)
    (tree / "nonsense.ko").write_bytes(b"this is no ELF file" * 100)
    (tree / "empty.ko").touch()
    return tree


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory, small_tree: Path) -> Iterator[Up]:
    """One machine for many tests, which take a system of their own each: three loaders on the small tree."""
    started: list[Up] = []
    up = up_in(tmp_path_factory.mktemp("machine"), started)("--loaders", "3", "--tree", str(small_tree))
    yield up
    assert up.stop().code == 128 + signal.SIGINT
