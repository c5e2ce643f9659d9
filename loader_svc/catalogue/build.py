"""Build the catalogue's modules, as a tree like ``/lib/modules/RELEASE``, into a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path

import platformdirs

from loader_svc.catalogue.errors import CatalogueError
from loader_svc.catalogue.identity import SYMVERS, Identity
from loader_svc.catalogue.indexes import write_indexes
from loader_svc.catalogue.object_file import module_image
from loader_svc.catalogue.packed import Catalogue, catalogue
from loader_svc.catalogue.packing import SUFFIXES, Variant, pack

IDENTITY = "identity.toml"


def catalogue_tree(variant: Variant = "plain", cache_dir: Path | None = None) -> Path:
    """Return the directory ``.../lib/modules/RELEASE`` with the catalogue's modules; they are built if they aren't yet.

    The first call takes seconds, later ones none. ``cache_dir`` is the user's cache by default. Any number of processes
    may ask at once: one builds, the others wait for it. ``identity.toml`` and ``Module.symvers``, the kernel that the
    modules load into, are three directories up. Raises `CatalogueError`.
    """
    if variant not in SUFFIXES:
        raise CatalogueError(f"the catalogue has no variant {variant!r}; it has {', '.join(SUFFIXES)}")
    facts = catalogue()
    identity = Identity(facts.kernel, facts)
    base = (cache_dir or platformdirs.user_cache_path("modpressure")) / "catalogue"
    root = base / f"{_key(facts)}-{variant}"
    tree = root / "lib" / "modules" / identity.release
    if root.is_dir():
        return tree
    try:
        base.mkdir(parents=True, exist_ok=True)
        with _locked(base / f".{root.name}.lock"):
            if not root.is_dir():
                _build_into(root, tree.relative_to(root), facts, identity, variant)
    except OSError as error:
        raise CatalogueError(f"cannot build the module catalogue below {base}: {error}") from error
    return tree


def _key(facts: Catalogue) -> str:
    """Differs whenever the built files could: by the facts, or by the code that builds from them."""
    digest = hashlib.sha256(facts.digest.encode() + _code_digest())
    return digest.hexdigest()[:16]


@cache
def _code_digest() -> bytes:
    files = sorted(resources.files("loader_svc.catalogue").iterdir(), key=lambda file: file.name)
    digest = hashlib.sha256()
    for file in files:
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.digest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for. The file stays: removing it would let two hold it."""
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(root: Path, tree: Path, facts: Catalogue, identity: Identity, variant: Variant) -> None:
    """Build beside ``root`` and rename, so that ``root`` is there whole or not at all."""
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        work.chmod(0o755)
        _write_tree(work / tree, facts, identity, variant)
        (work / IDENTITY).write_text(identity.toml())
        (work / SYMVERS).write_text(identity.symvers())
        try:
            work.rename(root)
        except OSError:
            if not root.is_dir():  # else somebody was faster, on a file system without locks
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_tree(tree: Path, facts: Catalogue, identity: Identity, variant: Variant) -> None:
    """Write modules and indexes. The threads are for compression, which runs without the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="catalogue") as pool:
        jobs: list[Future[None]] = []
        for module in facts.values():
            file = tree / (module.path + SUFFIXES[variant])
            file.parent.mkdir(parents=True, exist_ok=True)
            jobs.append(pool.submit(_write_module, file, module_image(module, identity), variant))
        for job in jobs:
            job.result()
    kernel = facts.kernel
    (tree / "modules.order").write_text("".join(f"{path}\n" for path in kernel.order))
    (tree / "modules.builtin").write_text("".join(f"{path}\n" for path in kernel.builtin))
    (tree / "modules.builtin.modinfo").write_bytes(b"")
    write_indexes(tree)


def _write_module(file: Path, image: bytes, variant: Variant) -> None:
    file.write_bytes(pack(image, variant))
