"""A PostgreSQL server of the tests' own, from the programs that the machine has."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

VARIABLE = "MODPRESSURE_TEST_POSTGRES_URL"
"""Names a server on which databases may be created, such as postgresql://postgres@127.0.0.1/postgres."""

START_SECONDS = 60


def programs() -> Path | None:
    """Return the directory of initdb and postgres, the newest where Debian has several; None if there is none."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return installed[-1].parent if installed else None


@dataclass
class PostgresServer:
    """A server that runs in a directory of its own, on a free port of the loopback."""

    url: str
    start: Callable[[], subprocess.Popen[bytes]]
    """Start it and return its process once it answers."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it and its workers as kill -9 does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have it and its workers stand still, as SIGSTOP does: connections stand, and nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)
        # What stands still has no more children.
        workers = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        stopped = [self.process.pid, *map(int, workers)]
        try:
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """End it at once, as a crash does but for its workers and shared memory, and start it again."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(START_SECONDS)
        self.process = self.start()


ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def account() -> dict[str, Any]:
    """Return what subprocess is to be told so that a program runs as a user who may run the server: never root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def initialise(directory: str, *options: str) -> None:
    """Make a cluster in ``directory``, which then belongs to whoever runs the server."""
    found = programs()
    assert found is not None
    if user := account():
        os.chown(directory, user["user"], user["group"])
    initdb = [str(found / "initdb"), "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", *options]
    command = [*initdb, f"{directory}/data"]
    subprocess.run(command, check=True, capture_output=True, cwd=directory, env=ENVIRONMENT, **account())


def free_port() -> int:
    """Return a port of the loopback on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def server_command(directory: str, port: int, **settings: str) -> list[str]:
    """Return the command that serves the cluster of ``directory`` on the loopback.

    What is written outlives the server, not the machine.
    """
    found = programs()
    assert found is not None
    all_settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": directory,
        "fsync": "off",
        **settings,
    }
    options = [text for name, value in all_settings.items() for text in ("-c", f"{name}={value}")]
    return [str(found / "postgres"), "-D", f"{directory}/data", *options]


@contextlib.contextmanager
def running_server() -> Iterator[PostgresServer]:
    """Start a server that nobody else uses; at the end it and its files are gone."""
    found = programs()
    assert found is not None
    # Not pytest's: only the user who runs the tests may enter that.
    with tempfile.TemporaryDirectory(prefix="modpressure-postgres-") as directory:
        initialise(directory)
        port = free_port()
        command = server_command(directory, port)
        ready = [str(found / "pg_isready"), "--host=127.0.0.1", f"--port={port}", "--timeout=1"]

        def start() -> subprocess.Popen[bytes]:
            with open(f"{directory}/log", "ab") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, env=ENVIRONMENT, **account())
            for _ in range(START_SECONDS * 10):
                if process.poll() is not None or subprocess.run(ready, capture_output=True).returncode == 0:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
            assert process.poll() is None, Path(f"{directory}/log").read_text()
            return process

        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        server = PostgresServer(url, start, start())
        try:
            yield server
        finally:
            # A fast shutdown: it ends its connections.
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGINT)
            server.process.wait(START_SECONDS)


@contextlib.contextmanager
def new_database(server_url: str) -> Iterator[str]:
    """Create an empty database on a server; give its URL, and drop it at the end."""
    url = sa.make_url(server_url).set(drivername="postgresql+psycopg")
    name = f"modpressure_test_{uuid.uuid4().hex}"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()
