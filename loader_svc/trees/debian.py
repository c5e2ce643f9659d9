"""Fetch a real Debian kernel's module tree with apt's own client, without being root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from loader_svc.trees.errors import TreeError
from modpressure.errors import Unavailable

UPDATE_TIMEOUT_SECONDS = 300.0
DOWNLOAD_TIMEOUT_SECONDS = 1800.0
LOCAL_TIMEOUT_SECONDS = 300.0

_PACKAGE = re.compile(r"linux-image-(?P<version>[0-9]+\.[0-9]+\.[0-9][0-9.+~a-z-]*?)-(?P<arch>[a-z0-9]+)(-unsigned)?")
_FLAVOURS = ("rt", "cloud")  # the same kernel again, built for something special


class DebianUnavailable(TreeError, Unavailable):
    """No Debian kernel can be had here: no apt, no network, or no such package."""


@dataclass(frozen=True, slots=True)
class DebianKernel:
    """A kernel package that was unpacked."""

    package: str
    version: str
    """The package's version, which is more than the kernel's."""
    root: Path
    """The module tree, ``.../lib/modules/RELEASE``."""


def fetch_debian(package: str | None = None, directory: Path | None = None) -> DebianKernel:
    """Unpack a kernel package below ``directory`` (by default the user's cache), or find it there from an earlier time.

    ``package`` defaults to the newest kernel that apt knows for this machine's architecture. Where apt has no package
    lists, it is given some of its own below ``directory``; nothing of the system is changed. Raises DebianUnavailable.
    """
    directory = _directory(directory)
    if package is not None and not re.fullmatch(r"[a-z0-9][a-z0-9+.~-]+", package):
        raise DebianUnavailable(f"{package!r} is no name of a package")
    if package is None:
        candidates = kernel_packages(directory)
        if not candidates:
            raise DebianUnavailable("apt knows no kernel package for this machine's architecture")
        package = candidates[0]
    try:
        version = _field(_apt("apt-cache", directory, "show", "--no-all-versions", package), "Version")
    except DebianUnavailable as error:
        raise DebianUnavailable(f"nothing is known of the package {package}: {error}") from None
    target = directory / f"{package}_{version.replace('/', '_').replace(':', '_')}"
    if not target.is_dir():
        _unpack(package, directory, target)
    releases = sorted((target / "lib" / "modules").iterdir())
    if not releases:
        raise DebianUnavailable(f"the package {package} {version} holds no modules")
    return DebianKernel(package, version, releases[0])


def kernel_packages(directory: Path | None = None) -> list[str]:
    """Names of the kernel packages that apt knows for this machine's architecture, newest first.

    Of packages with the same kernel the unsigned one counts: it is complete in itself. Raises DebianUnavailable.
    """
    directory = _directory(directory)
    arch = _run(["dpkg", "--print-architecture"], LOCAL_TIMEOUT_SECONDS).strip()
    names = _search(directory)
    if not names:
        directory.mkdir(parents=True, exist_ok=True)
        _apt("apt-get", directory, "update", timeout_seconds=UPDATE_TIMEOUT_SECONDS, own_lists=True)
        names = _search(directory)
    found: dict[str, str] = {}
    for name in sorted(names):  # "...-unsigned" comes behind the signed one
        parts = _PACKAGE.fullmatch(name)
        if parts and parts["arch"] == arch and parts["version"].rsplit("-", 1)[-1] not in _FLAVOURS:
            found[parts["version"]] = name
    return [found[version] for version in sorted(found, key=_version_key, reverse=True)]


def _directory(directory: Path | None) -> Path:
    return platformdirs.user_cache_path("modpressure") / "debian" if directory is None else directory


def _search(directory: Path) -> list[str]:
    lines = _apt("apt-cache", directory, "search", "--names-only", "^linux-image-[0-9]").splitlines()
    return [line.split(" ", 1)[0] for line in lines]


def _version_key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]+", version)]


def _unpack(package: str, directory: Path, target: Path) -> None:
    """Download ``package`` and unpack it into ``target``, which is there whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=directory) as work:
        _apt("apt-get", directory, "download", package, timeout_seconds=DOWNLOAD_TIMEOUT_SECONDS, cwd=Path(work))
        (archive,) = Path(work).glob("*.deb")
        tree = Path(work) / "tree"
        _run(["dpkg-deb", "--extract", str(archive), str(tree)], LOCAL_TIMEOUT_SECONDS)
        if not (tree / "lib" / "modules").is_dir() and (tree / "usr" / "lib" / "modules").is_dir():
            (tree / "lib").mkdir(exist_ok=True)
            (tree / "usr" / "lib" / "modules").rename(tree / "lib" / "modules")
        if not (tree / "lib" / "modules").is_dir():
            raise DebianUnavailable(f"the package {package} holds no modules")
        try:
            tree.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody else was faster
                raise


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        if line.startswith(f"{name}: "):
            return line[len(name) + 2 :].strip()
    raise DebianUnavailable(f"apt says nothing of a field {name}")


def _apt(
    tool: str,
    directory: Path,
    *arguments: str,
    timeout_seconds: float = LOCAL_TIMEOUT_SECONDS,
    cwd: Path | None = None,
    own_lists: bool = False,
) -> str:
    """Run a tool of apt's, on the package lists below ``directory`` if there are some."""
    lists, cache = directory / "apt" / "lists", directory / "apt" / "cache"
    options = []
    if own_lists:
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    if lists.is_dir():
        options = [f"--option=Dir::State::Lists={lists}", f"--option=Dir::Cache={cache}"]
    return _run([tool, *options, *arguments], timeout_seconds, cwd)


def _run(command: list[str], timeout_seconds: float, cwd: Path | None = None) -> str:
    """Run a command and return what it prints; DebianUnavailable with its last words if it fails."""
    if shutil.which(command[0]) is None:
        raise DebianUnavailable(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise DebianUnavailable(f"{command[0]} took longer than {timeout_seconds:.0f} seconds") from None
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise DebianUnavailable(f"{command[0]} failed: {words[-1]}")
    return done.stdout
