"""Remedies in the modules' files, and in who decompresses them."""

from __future__ import annotations

from dataclasses import replace

from loader_svc.boot import BootSpec
from loader_svc.boot.files import opened
from loader_svc.remedies.remedy import RemedyError

COMPRESSIONS = {"plain": "", "gz": "gz", "xz": "xz", "zst": "zst"}


class Compression:
    """Files that are packed in another way, or not at all."""

    def __init__(self, word: str) -> None:
        """``word`` is one of ``plain``, ``gz``, ``xz``, ``zst``."""
        self._compression = COMPRESSIONS[word]
        self.name = f"files:{word}"
        self.sentence = "modules that are not compressed" if word == "plain" else f"modules compressed as .{word}"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with such files."""
        if compression_of(spec) == self._compression:
            return spec
        return replace(spec, modules=replace(spec.modules, compression=self._compression))


class KernelDecompresses:
    """A libkmod that hands compressed files to the kernel (kmod 34, where the kernel knows the method)."""

    name = "kernel-decompresses"
    sentence = "libkmod hands compressed files to the kernel"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with such a libkmod; the same if nothing is compressed."""
        if spec.userland.hands_over or not compression_of(spec):
            return spec
        return replace(spec, userland=replace(spec.userland, reads_decompression=True))


class LibkmodDecompresses:
    """A libkmod that decompresses by itself and calls init_module (kmod 30), which no kernel shares results of."""

    name = "libkmod-decompresses"
    sentence = "libkmod decompresses by itself, so that calls share nothing"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with such a libkmod; the same if nothing is compressed."""
        if not spec.userland.hands_over or not compression_of(spec):
            return spec
        return replace(spec, userland=replace(spec.userland, reads_decompression=False))


class Merged:
    """A module with all that it depends on in one file: fewer calls, and less to collide on."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.name = f"merge:{module}"
        self.sentence = f"{module} and what it depends on in one file"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with the modules merged. UnknownModule if the tree does not have the module."""
        needed = opened(spec.tree).depends(self.module)
        merged = dict(spec.modules.merged) | dict.fromkeys(needed, self.module)
        return replace(spec, modules=replace(spec.modules, merged=tuple(merged.items()))) if needed else spec


def compression_of(spec: BootSpec) -> str:
    """Return how the files of a boot are packed: "" for plain. RemedyError if its tree has no modules."""
    if spec.modules.compression is not None:
        return spec.modules.compression
    tree = opened(spec.tree)
    for name in tree.names():
        return tree.module(name).compression
    raise RemedyError("the tree has no modules")
