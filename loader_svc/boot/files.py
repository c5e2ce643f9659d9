"""The modules of a tree as a boot needs them: opened and resolved once in each process, for all boots of a sweep."""

from __future__ import annotations

import gzip
import lzma
import os
from dataclasses import replace
from functools import lru_cache
from typing import Final

import zstandard

from loader_svc.boot.kmod import Kmod, KmodConfig
from loader_svc.boot.spec import BootSpec, TreeSource
from loader_svc.catalogue import catalogue_tree
from loader_svc.image import Algorithm, user_decompress
from loader_svc.plan import Plan, Plans
from loader_svc.steps import CallSpec
from loader_svc.trees import ModuleEntry, ModuleTree, UnreadableModule, open_tree
from loader_svc.virtual.files import VirtualFile
from loader_svc.virtual.machine import IMAGE_LIMIT_BYTES
from modpressure.errors import BadRequest, NotFound
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Syscall

TREES_KEPT: Final = 8

ALGORITHMS: Final[dict[str, Algorithm]] = {"gz": "gzip", "xz": "xz", "zst": "zstd"}
"""Suffixes of packed files and what packs them."""

ZSTD_LEVEL: Final = 3
"""The tool's default, as for the other two: distributions pack with these (scripts/Makefile.modinst)."""


@lru_cache(TREES_KEPT)
def opened(source: TreeSource) -> ModuleTree:
    """Return a tree, opened once. TreeError; NotFound for configuration that was asked for and is not there."""
    for place in source.modprobe_dirs:
        # modprobe passes over what is not there; who names it here would wonder why it does nothing.
        if not os.path.exists(place):
            raise NotFound(f"there is no configuration {str(place)!r}", field="modprobe_dir")
    root = catalogue_tree() if source.root is None else source.root
    return open_tree(root, modprobe_dirs=source.modprobe_dirs, kernel_command_line=source.kernel_command_line)


@lru_cache(TREES_KEPT)
def resolved(source: TreeSource, config: KmodConfig) -> Kmod:
    """Return what looks texts up in a tree, made once. TreeError, BadRequest."""
    return Kmod(opened(source), config)


class BootFile(VirtualFile):
    """A module's file as the machine to boot has it: perhaps longer, or packed in another way, than in the tree."""

    __slots__ = ("_entry", "_factor", "_merged", "_plain", "_told_bytes", "packing")

    def __init__(
        self,
        tree: ModuleTree,
        module: str,
        packing: str | None,
        factor: float,
        told_bytes: int | None,
        merged: tuple[BootFile, ...] = (),
    ) -> None:
        """``packing`` None is as in the tree, "" plain; ``told_bytes`` is the plain file's length, if that is told."""
        self._entry: ModuleEntry = tree.module(module)
        super().__init__(self._entry.path, lambda: tree.open_file(module))
        self.packing = self._entry.compression if packing is None else packing
        self._factor = factor
        self._told_bytes = told_bytes
        self._merged = merged
        self._plain: Plan | None = None

    def plan(self, plans: Plans, spec: CallSpec) -> tuple[Plan, Algorithm | None]:
        """Return what becomes of the file in a call, and how it is decompressed: by whom, the call says."""
        plain = self._as_plain(plans)
        if not self.packing:
            return plain, None
        algorithm: Algorithm | None = ALGORITHMS[self.packing]
        if spec.flags & MODULE_INIT_COMPRESSED_FILE:
            algorithm = plans.identity.decompressor_for(algorithm)  # type: ignore[assignment]
        version = plain.version._replace(size_bytes=self._packed_bytes(plain))
        return replace(plain, version=version, is_packed=True), algorithm

    def _as_plain(self, plans: Plans) -> Plan:
        """Return what becomes of the file where nobody has to decompress it."""
        if self._plain is None:
            packed = self._entry.compression
            descriptor = self.open()
            try:
                algorithm = ALGORITHMS.get(packed)
                plan = plans.of(descriptor, self.path, algorithm, by_kernel=False, flags=0)
            finally:
                os.close(descriptor)
            file_bytes = plan.unpacked_bytes
            told_bytes = self._told_bytes
            long_bytes = round(file_bytes * self._factor) if told_bytes is None else told_bytes
            # A signature stays as long as it is.
            image_bytes = long_bytes - (file_bytes - plan.image_bytes) if plan.image_bytes else 0
            layout = plan.layout
            for other in self._merged:
                its = other._as_plain(plans)
                long_bytes += its.version.size_bytes
                image_bytes += its.image_bytes
                if layout is not None and its.layout is not None:
                    both = zip(layout.rounded, its.layout.rounded, strict=True)
                    layout = replace(
                        layout,
                        rounded=tuple(mine + more for mine, more in both),
                        core_bytes=layout.core_bytes + its.layout.core_bytes,
                        init_bytes=layout.init_bytes + its.layout.init_bytes,
                        total_bytes=layout.total_bytes + its.layout.total_bytes,
                        text_bytes=layout.text_bytes + its.layout.text_bytes,
                    )
            self._plain = replace(
                plan,
                version=plan.version._replace(size_bytes=long_bytes),
                is_packed=False,
                unpacked_bytes=long_bytes,
                image_bytes=max(image_bytes, 0),
                layout=layout,
            )
        return self._plain

    def _packed_bytes(self, plain: Plan) -> int:
        """Return the length of the packed file: as in the tree, or else found out by packing it."""
        entry = self._entry
        if self.packing == entry.compression and entry.size_bytes is not None:
            packed_bytes, file_bytes = entry.size_bytes, _plain_bytes(self)
        else:
            packed_bytes, file_bytes = _packed_bytes(self, self.packing)
        return max(round(packed_bytes * plain.version.size_bytes / max(file_bytes, 1)), 1)

    def content(self) -> bytes:
        """Return the plain file's bytes. Whatever ``user_decompress`` raises."""
        with open(self.open(), "rb") as file:
            packed = file.read()
        algorithm = ALGORITHMS.get(self._entry.compression)
        if algorithm is None:
            return packed
        return b"".join(user_decompress(packed, algorithm, limit_bytes=IMAGE_LIMIT_BYTES))


@lru_cache(4096)
def _plain_bytes(file: BootFile) -> int:
    return len(file.content())


@lru_cache(4096)
def _packed_bytes(file: BootFile, packing: str) -> tuple[int, int]:
    """Pack a file; return the lengths, packed and plain."""
    content = file.content()
    if packing == "gz":
        return len(gzip.compress(content)), len(content)
    if packing == "xz":
        # As the kernel wants it: CRC32, no larger dictionary than it has room for.
        return len(lzma.compress(content, check=lzma.CHECK_CRC32)), len(content)
    return len(zstandard.ZstdCompressor(ZSTD_LEVEL).compress(content)), len(content)


class BootFiles:
    """One tree under one configuration, for one kernel."""

    def __init__(self, spec: BootSpec) -> None:
        machine, modules = spec.machine, spec.modules
        builtin = modules.builtin | frozenset(machine.builtin)
        config = KmodConfig(modules.blacklist, builtin, modules.merged, machine.needs)
        self.tree = opened(spec.tree)
        self.kmod = resolved(spec.tree, config)
        self.plans = Plans(IMAGE_LIMIT_BYTES, spec.identity)
        self._identity: KernelIdentity = spec.identity
        self._factor = machine.file_factor
        self._told = dict(machine.file_bytes)
        self._packing = modules.compression
        self._merged = modules.merged
        self._files: dict[str, BootFile | None] = {}
        self._calls: dict[tuple[str, str, bool, object], CallSpec] = {}

    def file(self, module: str) -> BootFile | None:
        """Return the file of a module; None if the tree has none that can be opened."""
        if module not in self._files:
            self._files[module] = self._find(module)
        return self._files[module]

    def _find(self, module: str) -> BootFile | None:
        if module not in self.kmod.places:
            return None
        merged = [self._find(name) for name, owner in self._merged if owner == module]
        file = BootFile(
            self.tree,
            module,
            self._packing,
            self._factor,
            self._told.get(module),
            tuple(each for each in merged if each is not None),
        )
        try:
            os.close(file.open())
        except UnreadableModule:
            return None
        return file

    def call_spec(self, file: BootFile, module: str, options: str, spec: BootSpec) -> CallSpec:
        """Return how libkmod hands a file over.

        A plain one by finit_module; a packed one by finit_module with flag 4 if this libkmod does that and
        /sys/module/compression names the same method, else decompressed, by init_module (``do_finit_module``,
        ``do_init_module``, libkmod/libkmod-module.c, kmod 30 and 34).
        """
        hands_over = spec.userland.hands_over
        key = (module, options, hands_over, spec.policy)
        made = self._calls.get(key)
        if made is None:
            syscall, flags = Syscall.FINIT_MODULE, 0
            if file.packing:
                if hands_over and ALGORITHMS[file.packing] in self._identity.decompressors:
                    flags = MODULE_INIT_COMPRESSED_FILE
                else:
                    syscall = Syscall.INIT_MODULE
            made = self._calls[key] = CallSpec(module, file.path, spec.policy, syscall, flags, options)
        return made


_kept: list[tuple[BootSpec, BootFiles]] = []


def _has_same_files(one: BootSpec, other: BootSpec) -> bool:
    mine, its = one.machine, other.machine
    return (one.tree, one.modules, one.identity) == (other.tree, other.modules, other.identity) and (
        mine.builtin,
        mine.needs,
        mine.file_factor,
        mine.file_bytes,
    ) == (its.builtin, its.needs, its.file_factor, its.file_bytes)


def files_of(spec: BootSpec) -> BootFiles:
    """Return the files of a boot, made once for all boots with the same ones.

    TreeError; BadRequest for a tree that has nothing for any of the machine's devices.
    """
    for other, files in _kept:
        if _has_same_files(other, spec):
            return files
    files = BootFiles(spec)
    if not files.tree.names():
        raise BadRequest(
            f"the module tree {files.tree.release} has no modules, or a modules.dep that names none", field="tree"
        )
    modaliases = spec.machine.modaliases()
    if modaliases and not any(files.kmod.plan(modalias).entries for modalias in modaliases):
        raise BadRequest(
            f"the module tree {files.tree.release} has no module for any device of the machine {spec.machine.name!r}",
            field="tree",
        )
    _kept.append((spec, files))
    del _kept[:-TREES_KEPT]
    return files
