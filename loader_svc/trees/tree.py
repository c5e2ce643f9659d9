"""A tree of kernel modules: what is in it, what a name or alias stands for, what loads in which order."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from loader_svc.trees.cache import IndexCache
from loader_svc.trees.config import ModprobeConfig, read_config
from loader_svc.trees.confine import Opener
from loader_svc.trees.depmod import index_files
from loader_svc.trees.errors import OutsideTree, TreeNotFound, UnknownModule
from loader_svc.trees.index import TreeIndex
from loader_svc.trees.names import checked_alias, checked_name, compression, module_name
from loader_svc.trees.resolve import LoadStep, ModuleRef, Resolver
from loader_svc.trees.scan import looks_like_tree, scan_tree
from loader_svc.trees.texts import index_texts


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One module of a tree."""

    name: str
    """With ``_`` for ``-``."""
    path: str
    """Its file, relative to the tree's root."""
    compression: str
    """How the file is packed, by its suffix: "" (not), "gz", "xz" or "zst"."""
    size_bytes: int | None
    """Length of the file; None if ``modules.dep`` lists a file that there is not."""


class Softdeps(NamedTuple):
    """What a module would like loaded before and after it: names or aliases, as written."""

    pre: tuple[str, ...]
    post: tuple[str, ...]


class ModuleTree:
    """The modules of one kernel release, resolved as modprobe of kmod 30 resolves them.

    Immutable: changes of the files show in a tree opened anew. All methods are plain and quick but for ``open_file``,
    and may be called from any thread.
    """

    def __init__(self, root: Path, identity: str, index: TreeIndex, config: ModprobeConfig) -> None:
        self._root = root
        self._opener = Opener(root)
        self._identity = identity
        self._index = index
        self._config = config
        self._resolver = Resolver(index, config)
        paths = {name: index.paths[place] for name, place in self._resolver.places.items()}
        self._outside = {
            module_name(path): path for path in index.outside if paths.get(module_name(path), path) == path
        }

    @property
    def root(self) -> Path:
        """The directory of the tree, absolute."""
        return self._root

    @property
    def release(self) -> str:
        """The kernel's release, by the directory's name."""
        return self._root.name

    @property
    def identity(self) -> str:
        """Fingerprint of the module files' paths and lengths: equal for every replica with the same tree mounted."""
        return self._identity

    @property
    def config(self) -> ModprobeConfig:
        """The configuration that the tree is resolved with, its own soft dependencies included."""
        return self._config

    @property
    def builtin(self) -> list[str]:
        """Names of what is built into the kernel."""
        return list(self._index.builtin)

    def names(self) -> list[str]:
        """Names of the modules, in the tree's order (that of ``modules.order``, where there is one)."""
        return [name for name in self._resolver.places if name not in self._outside]

    def module(self, name: str) -> ModuleEntry:
        """Return the module ``name`` (no alias).

        Raises BadModuleName, UnknownModule, or OutsideTree if its file does not lie in the tree.
        """
        place = self._place(name)
        path, size_bytes = self._index.paths[place], self._index.sizes_bytes[place]
        return ModuleEntry(module_name(path), path, compression(path) or "", size_bytes if size_bytes >= 0 else None)

    def depends(self, name: str) -> list[str]:
        """List the names of all modules that ``name`` needs, nearest first: they are loaded from the last to the first.

        Raises as ``module``.
        """
        return [module_name(self._index.paths[other]) for other in self._index.depends[self._place(name)]]

    def softdeps(self, name: str) -> Softdeps:
        """Return the soft dependencies of the module ``name``. Raises as ``module``."""
        return Softdeps(*self._resolver.softdeps(module_name(self._index.paths[self._place(name)])))

    def aliases(self, name: str) -> list[str]:
        """List the alias patterns of the module ``name``, as written in it. Raises as ``module``."""
        name = module_name(self._index.paths[self._place(name)])
        pairs = zip(self._index.alias_patterns, self._index.alias_modules, strict=True)
        return [pattern for pattern, module in pairs if module == name]

    def exporter(self, symbol: str) -> str | None:
        """Return the name of the module that exports a symbol, None if none of the tree does."""
        return self._exporters.get(symbol)

    @property
    def exports(self) -> Container[str]:
        """All symbols that modules of the tree export."""
        return self._exporters.keys()

    @cached_property
    def _exporters(self) -> dict[str, str]:
        return dict(zip(self._index.symbols, self._index.symbol_modules, strict=True))

    def is_builtin(self, name: str) -> bool:
        """Whether ``name`` is built into the kernel. BadModuleName."""
        return self._resolver.is_builtin(checked_name(name))

    def is_blacklisted(self, name: str) -> bool:
        """Whether the configuration blacklists the module ``name``, which keeps aliases from leading to it."""
        return self._resolver.is_blacklisted(checked_name(name))

    def lookup(self, text: str) -> list[ModuleRef]:
        """List what libkmod finds for a name or alias, such as a device's MODALIAS, in order and with repeats.

        Empty if that is nothing. Blacklisted modules are among them. BadModuleName if it can be no name and no alias.
        """
        return self._resolver.lookup(checked_alias(text))

    def resolve_alias(self, text: str) -> list[str]:
        """List the names that ``modprobe --resolve-alias`` prints for a name or alias.

        Raises BadModuleName, UnknownModule, OutsideTree.
        """
        return [ref.name for ref in self._found(text)]

    def load_order(self, text: str, options: str = "") -> list[LoadStep]:
        """List what modprobe does to load a name or alias, with ``options`` for the module itself.

        It is as if nothing was loaded yet. Empty if all that an alias leads to is blacklisted. Raises BadModuleName,
        UnknownModule, OutsideTree.
        """
        steps = []
        for ref in self._found(text):
            if ref.alias is None or not self._resolver.is_blacklisted(ref.name):
                steps += self._resolver.steps(ref, options)
        return steps

    def steps(self, ref: ModuleRef, options: str = "") -> list[LoadStep]:
        """List what modprobe does for one of the modules that ``lookup`` gave, blacklisted or not."""
        return self._resolver.steps(ref, options)

    def show_depends(self, text: str, options: str = "") -> list[str]:
        """List the lines that ``modprobe --show-depends`` prints for a name or alias. Raises as ``load_order``."""
        return [self._line(step) for step in self.load_order(text, options)]

    def open_file(self, name: str) -> int:
        """Open the file of the module ``name`` to be read; return its descriptor, which the caller closes.

        The file lies in the tree, whatever links lead to it, and is a regular one. BadModuleName, UnknownModule,
        OutsideTree, or UnreadableModule if there is no such file by now.
        """
        return self._opener.open(self._index.paths[self._place(name)])

    def _place(self, name: str) -> int:
        key = checked_name(name)
        if key in self._outside:
            raise OutsideTree(self._outside[key])
        place = self._resolver.places.get(key)
        if place is None:
            raise UnknownModule(name, self.release, builtin=self._resolver.is_builtin(key))
        return place

    def _found(self, text: str) -> list[ModuleRef]:
        found = self.lookup(text)
        outside = self._outside.get(found[0].name if found else text.replace("-", "_"))
        if outside is not None:
            raise OutsideTree(outside)
        if not found:
            raise UnknownModule(text, self.release)
        return found

    def _line(self, step: LoadStep) -> str:
        if step.kind == "builtin":
            return f"builtin {step.module}"
        return f"{step.kind} {step.command or self._root / step.path} {step.options}"


def open_tree(
    root: Path,
    *,
    modprobe_dirs: Sequence[Path] = (),
    cache_dir: Path | None = None,
    kernel_command_line: str = "",
) -> ModuleTree:
    """Open the tree of modules in ``root``: ``/lib/modules/RELEASE``, or any directory that has module files in it.

    Where ``root`` is no tree itself but has one in ``lib/modules``, that one is meant. If there is ``modules.dep``, it
    and the texts beside it say what there is, else the files themselves do. The index is kept in ``cache_dir`` (by
    default the user's cache directory) for as long as nothing in the tree changes. ``modprobe_dirs`` are directories or
    files of configuration (modprobe.d(5)), ``kernel_command_line`` may add to it; neither of the host's own is taken
    unasked.

    Takes a second or two for a whole distribution's tree that is not in the cache; call it in a thread. Raises
    TreeNotFound or TreeTooBig, both of TreeError.
    """
    root = _tree_root(root.absolute())
    scan = scan_tree(root)
    cache = IndexCache(cache_dir)
    fingerprint = scan.fingerprint()
    index = cache.load(fingerprint)
    if index is None:
        index = index_texts(scan) if "modules.dep" in scan.texts else index_files(scan)
        cache.store(fingerprint, index)
    return ModuleTree(root, scan.identity(), index, read_config(modprobe_dirs, index.softdeps, kernel_command_line))


def _tree_root(root: Path) -> Path:
    """Find the directory of the tree that ``root`` means."""
    try:
        mode = os.stat(root).st_mode
    except (FileNotFoundError, ValueError):
        raise TreeNotFound(f"there is no directory {str(root)!r}") from None
    except OSError as error:
        raise TreeNotFound(f"{str(root)!r} can't be looked into: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise TreeNotFound(f"{str(root)!r} is not a directory")
    if looks_like_tree(root):
        return root
    for below in ("lib/modules", "usr/lib/modules"):
        try:
            with os.scandir(root / below) as entries:
                releases = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            continue
        if len(releases) == 1:
            return root / below / releases[0]
        if releases:
            raise TreeNotFound(f"{str(root / below)!r} has {len(releases)} releases, name one: {', '.join(releases)}")
    return root
