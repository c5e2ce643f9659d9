"""Fixtures that every test may use."""

import logging
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

# Read when grpc is loaded. Children here run another program at once; what grpc does in each fork for those that do not
# has crashed children that were forked while other threads were within it.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"

import grpc.aio
import pytest
import structlog
from hypothesis import settings

from tests import postgres

# How long an example takes tells of the machine and who else is on it: no test judges time.
settings.register_profile("modpressure", settings.default, deadline=None)
settings.load_profile("modpressure")

# A shell without job control has its background jobs ignore Ctrl-C, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Held to the end: without it, grpc stops its poller whenever the last channel or server of a test is collected, and
# waits for it within the collector. Where a call of an ended event loop is still open, that is for ever.
grpc.aio.init_grpc_aio()


@pytest.fixture(autouse=True)
def log_of_its_own() -> Iterator[None]:
    """Have no test log to the standard error of an earlier one, which pytest has closed."""
    yield
    structlog.reset_defaults()
    logging.getLogger().handlers = [
        each for each in logging.getLogger().handlers if type(each) is not logging.StreamHandler
    ]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared folder (measured data, specifications): beside the repository, or where told."""
    told = os.environ.get("MODPRESSURE_SHARED")
    path = Path(told) if told else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"no shared folder at {path} (MODPRESSURE_SHARED names another)")
    return path


@pytest.fixture(scope="session")
def golden_modules(shared_dir: Path) -> list[Path]:
    """The loadable modules among the measured files."""
    found = sorted((shared_dir / "data" / "golden" / "ko").rglob("*.ko"))
    if not found:
        pytest.skip("no .ko files among the measured data")
    return found


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server on which databases may be created: the one that is named, else one of our own."""
    if told := os.environ.get(postgres.VARIABLE):
        yield told
    elif postgres.programs() is None:
        pytest.skip(f"no PostgreSQL is installed here, and {postgres.VARIABLE} names no server")
    else:
        with postgres.running_server() as server:
            yield server.url


@pytest.fixture
def postgres_database(postgres_server: str) -> Iterator[str]:
    """URL of an empty PostgreSQL database of the test's own."""
    with postgres.new_database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def boot_tree(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module tree of the measured boots (`lib/modules/RELEASE`), unpacked once."""
    packed = shared_dir / "data" / "golden" / "boots" / "modroot.tar.xz"
    if not packed.is_file():
        pytest.skip(f"no module tree at {packed}")
    root = tmp_path_factory.mktemp("boots")
    with tarfile.open(packed) as archive:
        archive.extractall(root, filter="data")
    return next(root.glob("lib/modules/*"))
