"""Fixtures that every test may use."""

import os
import signal
import tarfile
from pathlib import Path

import platformdirs
import pytest

# A shell without job control has its background jobs ignore Ctrl-C, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
def boot_tree(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module tree of the measured boots (`lib/modules/RELEASE`), unpacked once."""
    packed = shared_dir / "data" / "golden" / "boots" / "modroot.tar.xz"
    if not packed.is_file():
        pytest.skip(f"no module tree at {packed}")
    root = tmp_path_factory.mktemp("boots")
    with tarfile.open(packed) as archive:
        archive.extractall(root, filter="data")
    return next(root.glob("lib/modules/*"))


@pytest.fixture(scope="session")
def cached_debian_modules() -> list[Path]:
    """The modules of Debian trees in the user's cache (`modpressure modules fetch-debian`), if there are any."""
    told = os.environ.get("MODPRESSURE_CACHE_DIR")
    cache = Path(told) if told else platformdirs.user_cache_path("modpressure")
    return sorted(path for tree in cache.rglob("lib/modules") for path in tree.rglob("*.ko"))
